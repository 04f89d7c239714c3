"""What the deployment benchmarks share: certificates, processes, SuperLink and SuperNodes."""

import contextlib
import datetime
import ipaddress
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
PEM = serialization.Encoding.PEM
BAR = 1.0


@dataclass(frozen=True)
class Identity:
    """Files for TLS: an authority's certificate, and one for this machine with its key."""

    ca: Path
    certificate: Path
    key: Path

    @property
    def flags(self) -> tuple[str, ...]:
        """The files as Flower's commands and `flwr-moe serve` take them."""
        own = ("--ssl-certfile", str(self.certificate), "--ssl-keyfile", str(self.key))
        return *own, "--ssl-ca-certfile", str(self.ca)


def make_certificates(folder: Path) -> Identity:
    """Write an authority, and a certificate for 127.0.0.1 and localhost, to a folder."""
    keys = {name: ec.generate_private_key(ec.SECP256R1()) for name in ("authority", "server")}
    now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)

    def named(name: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])

    paths = []
    for name, key in keys.items():
        addresses = [
            x509.DNSName("localhost"),
            x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
        ]
        certificate = (
            x509.CertificateBuilder()
            .subject_name(named(name))
            .issuer_name(named("authority"))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - day)
            .not_valid_after(now + day)
            .add_extension(x509.BasicConstraints(name == "authority", None), critical=True)
            .add_extension(x509.SubjectAlternativeName(addresses), critical=False)
            .sign(keys["authority"], hashes.SHA256())
        )
        paths.append(folder / f"{name}.pem")
        paths[-1].write_bytes(certificate.public_bytes(PEM))
    key_path = folder / "server.key"
    key_path.touch(mode=0o600)
    key_path.write_bytes(
        keys["server"].private_bytes(
            PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return Identity(paths[0], paths[1], key_path)


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody listened on a moment ago."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


class Processes:
    """Processes with a log each; `stop` ends them and what they have started."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder, self.environment = folder, environment
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        """Start a program of this Python environment; its output goes to NAME.log."""
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [str(BIN / command[0]), *command[1:]],
                cwd=ROOT,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.running[name] = process
        return process

    def kill(self, name: str) -> None:
        """Kill a process and all that it has started, as a power cut would."""
        _kill_family({self.running[name].pid})
        self.running[name].wait()

    def log(self, name: str) -> str:
        """Read what a process has written so far."""
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def is_connected(self, name: str, port: int) -> bool:
        """Whether a process, or what it has started, holds a connection to a port (on Linux)."""
        held = set()
        for pid in _with_descendants({self.running[name].pid}):
            with contextlib.suppress(OSError):
                for entry in Path(f"/proc/{pid}/fd").iterdir():
                    with contextlib.suppress(OSError):
                        held.add(os.readlink(entry))
        rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        inodes = {row[9] for row in rows if row[2].endswith(f":{port:04X}") and row[3] == "01"}
        return any(f"socket:[{inode}]" in held for inode in inodes)

    def lasted(self, *ended: str) -> bool:
        """Whether all still run, except for those that have ended for a reason."""
        return all(p.poll() is None for name, p in self.running.items() if name not in ended)

    def stop(self) -> None:
        """Kill everything that runs."""
        _kill_family({p.pid for p in self.running.values() if p.poll() is None})
        for process in self.running.values():
            process.wait()

    def print_logs(self) -> None:
        """Write the end of every log to standard error."""
        for path in sorted(self.folder.glob("*.log")):
            lines = path.read_text(errors="replace").splitlines()[-40:]
            print(f"--- {path.name}", *lines, sep="\n", file=sys.stderr)


def _signal(pids: set[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _kill_family(roots: set[int]) -> None:
    """Kill processes, all of them halted first so that none starts another unseen."""
    halted: set[int] = set()
    while new := _with_descendants(roots) - halted:
        _signal(new, signal.SIGSTOP)
        halted |= new
    _signal(halted, signal.SIGKILL)


def _with_descendants(roots: set[int]) -> set[int]:
    """Process ids of some processes, their children, and so on."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True)
    pairs = (line.split() for line in listed.stdout.splitlines())
    parents = {int(pid): int(parent) for pid, parent in pairs}
    family = set(roots)
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    return family


def wait_until(what: str, condition: Callable[[], bool], run: subprocess.Popen[bytes]) -> None:
    """Wait for ten minutes at most, and no longer than the program lasts."""
    deadline = time.monotonic() + 600
    while not condition():
        if run.poll() is not None:
            raise RuntimeError(f"the program ended, with code {run.returncode}, before {what}")
        if time.monotonic() > deadline:
            raise RuntimeError(f"gave up waiting for {what}")
        time.sleep(0.1)


@contextlib.contextmanager
def always_stopped(processes: Processes) -> Iterator[None]:
    """Stop the processes whatever happens; a termination signal counts as an interruption."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except BaseException:
        processes.print_logs()
        raise
    finally:
        processes.stop()
        signal.signal(signal.SIGTERM, before)


def environment(folder: Path, **more: str) -> dict[str, str]:
    """Environment of all programs: Flower keeps its files in the folder."""
    return {
        **os.environ,
        "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}",
        "FLWR_HOME": str(folder / "flower"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        **more,
    }


def deploy(
    processes: Processes, identity: Identity, node_configs: list[str], insecure: bool = False
) -> None:
    """Start a SuperLink and a SuperNode for each config, and name the connection for `flwr run`.

    With `insecure`, Flower's own connections are plain.
    """
    link, *runtimes = free_ports(1 + len(node_configs))
    address = f"127.0.0.1:{link}"
    home = Path(processes.environment["FLWR_HOME"])
    home.mkdir()
    trust = "insecure = true" if insecure else f'root-certificates = "{identity.ca}"'
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "{address}"\n{trust}\n'
    )
    processes.start(
        "superlink",
        *("flower-superlink", "--host", "127.0.0.1", "--port", str(link)),
        *(("--insecure",) if insecure else identity.flags),
    )
    _wait_for_port(link)
    for node, (port, config) in enumerate(zip(runtimes, node_configs, strict=True)):
        secure = ("--root-certificates", str(identity.ca), *identity.flags)
        own = f"partition-id={node} num-partitions={len(node_configs)}"
        processes.start(
            f"supernode-{node}",
            *("flower-supernode", "--superlink", address, "--port", str(port)),
            *("--node-config", f"{own} {config}"),
            *(("--insecure",) if insecure else secure),
        )


def start_run(processes: Processes, settings: dict[str, object]) -> subprocess.Popen[bytes]:
    """Start `flwr run` with settings."""
    given = " ".join(f"{key}={json.dumps(value)}" for key, value in settings.items())
    return processes.start("run", "flwr", "run", ".", "--stream", "--run-config", given)


def told(out: Path, system: str) -> dict[str, Any]:
    """Read what a run's summary says of its system, nothing if there is none."""
    path = out / "summary.json"
    return json.loads(path.read_text())["systems"][system][0] if path.is_file() else {}


def print_verdict(name: str, checks: dict[str, bool], **measured: object) -> None:
    """Print the benchmark's line; `ratio` is the share of checks that held."""
    ratio = sum(checks.values()) / len(checks)
    line = {
        "benchmark": name,
        "ratio": round(ratio, 3),
        "bar": BAR,
        "passed": ratio >= BAR,
        "checks": checks,
        **measured,
    }
    print(json.dumps(line))


def _wait_for_port(port: int) -> None:
    deadline = time.monotonic() + 120
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise RuntimeError(f"nobody listens on port {port}") from None
            time.sleep(0.3)
