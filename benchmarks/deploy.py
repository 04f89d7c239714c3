"""FedMoE-DA over real processes and TLS, with a tensor exchange that is killed and comes back.

Starts a SuperLink, three SuperNodes and three `flwr-moe serve` on loopback, with certificates made
for the occasion, and runs FedMoE-DA with `flwr run`. Every expert is mixed with all others, so that
it is known what goes missing. When all nodes have trained round 2, the exchange of node 2 is killed
(SIGKILL); once the others are in round 4 it is started again on the same folder. Prints one JSON
line; `ratio` is the share of `checks` that held, the bar is 1. All processes are stopped by their
process ids in the end; if a check failed, the ends of their logs go to standard error.
"""

import argparse
import contextlib
import datetime
import hashlib
import ipaddress
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from flwr_moe.exchange import ExchangeClient, ExchangeError

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
NODES, EXPERTS, ROUNDS, VICTIM = 3, 4, 6, 2
BAR = 1.0
PEM = serialization.Encoding.PEM


def make_certificates(folder: Path) -> tuple[Path, Path, Path]:
    """Write an authority and a certificate for 127.0.0.1: paths of CA, certificate and key."""
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
    return paths[0], paths[1], key_path


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

    def stop(self) -> None:
        """Kill everything, children first halted so that none starts another unseen."""
        roots = {process.pid for process in self.running.values() if process.poll() is None}
        halted: set[int] = set()
        while new := _descendants(roots) - halted:
            _signal(new, signal.SIGSTOP)
            halted |= new
        _signal(halted, signal.SIGKILL)
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


def _descendants(roots: set[int]) -> set[int]:
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
        time.sleep(0.3)


class Exchanges:
    """The three `flwr-moe serve`, and what they hold."""

    def __init__(self, processes: Processes, folder: Path, ports: list[int]) -> None:
        self.processes, self.folder, self.ports = processes, folder, ports
        self.ca, self.certificate, self.key = make_certificates(folder)
        token = processes.environment["FLWR_MOE_TOKEN"]
        self.urls = [f"https://127.0.0.1:{port}" for port in ports]
        self.clients = [ExchangeClient(url, token, verify=self.ca) for url in self.urls]

    def start(self, node: int) -> None:
        """Start a node's exchange, and return when it answers."""
        process = self.processes.start(
            f"exchange-{node}",
            *("flwr-moe", "serve", "--folder", str(self.folder / f"store-{node}")),
            *("--host", "127.0.0.1", "--port", str(self.ports[node])),
            *("--ssl-certfile", str(self.certificate), "--ssl-keyfile", str(self.key)),
        )
        wait_until(f"exchange {node} answers", lambda: self._answers(node), process)

    def kill(self, node: int) -> None:
        """Kill a node's exchange as a power cut would."""
        process = self.processes.running[f"exchange-{node}"]
        process.send_signal(signal.SIGKILL)
        process.wait()

    def _answers(self, node: int) -> bool:
        try:
            return self.clients[node].health() == {"status": "ok"}
        except ExchangeError:
            return False

    def has_round(self, node: int, number: int) -> bool:
        """Whether a node has published all experts of a round."""
        return sum(f".v{number}." in name for name in self.clients[node].names()) >= EXPERTS

    def checksums(self, node: int) -> dict[str, str]:
        """Digests of all tensors of a node's exchange, by name."""
        client = self.clients[node]
        sums = {}
        for name in client.names():
            digest = hashlib.sha256()
            for key, tensor in sorted(client.get(name).items()):
                digest.update(key.encode() + tensor.numpy().tobytes())
            sums[name] = digest.hexdigest()
        return sums


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


def deploy(processes: Processes, exchanges: Exchanges, insecure: bool, out: Path) -> None:
    """Start the SuperLink and the SuperNodes, and name the connection for `flwr run`."""
    link, *runtimes = free_ports(1 + NODES)
    address = f"127.0.0.1:{link}"
    home = Path(processes.environment["FLWR_HOME"])
    home.mkdir()
    trust = "insecure = true" if insecure else f'root-certificates = "{exchanges.ca}"'
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "{address}"\n{trust}\n'
    )
    identity = (
        *("--ssl-certfile", str(exchanges.certificate), "--ssl-keyfile", str(exchanges.key)),
        *("--ssl-ca-certfile", str(exchanges.ca)),
    )
    processes.start(
        "superlink",
        *("flower-superlink", "--host", "127.0.0.1", "--port", str(link)),
        *(("--insecure",) if insecure else identity),
    )
    _wait_for_port(link)
    for node, port in enumerate(runtimes):
        config = (
            f'partition-id={node} num-partitions={NODES} exchange-url="{exchanges.urls[node]}" '
            f'exchange-ca="{exchanges.ca}"'
        )
        secure = ("--root-certificates", str(exchanges.ca), *identity)
        processes.start(
            f"supernode-{node}",
            *("flower-supernode", "--superlink", address, "--port", str(port)),
            *("--node-config", config),
            *(("--insecure",) if insecure else secure),
        )


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


def measure(folder: Path, insecure: bool) -> dict[str, object]:
    """Run once; what was checked and measured."""
    token = secrets.token_urlsafe(24)
    environment = {
        **os.environ,
        "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}",
        "FLWR_HOME": str(folder / "flower"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_MOE_TOKEN": token,
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
    }
    processes = Processes(folder, environment)
    out = folder / "results"
    with always_stopped(processes):
        exchanges = Exchanges(processes, folder, free_ports(NODES))
        for node in range(NODES):
            exchanges.start(node)
        deploy(processes, exchanges, insecure, out)
        settings = {
            "system": "fedmoe-da",
            "links": "real",
            "partition": "dirichlet",
            "num-clients": NODES,
            "num-clusters": NODES,
            "num-experts": EXPERTS,
            "num-rounds": ROUNDS,
            "local-steps": 20,
            "fedmoe-da.p": NODES * EXPERTS - 1,
            "exchange-token": token,
            "exchange-timeout-s": 2.0,
            "eval-every-minutes": 0.0,
            "out": str(out),
        }
        given = " ".join(f"{key}={json.dumps(value)}" for key, value in settings.items())
        began = time.monotonic()
        run = processes.start("run", "flwr", "run", ".", "--stream", "--run-config", given)
        others = [node for node in range(NODES) if node != VICTIM]
        every = range(NODES)
        wait_until("round 2", lambda: all(exchanges.has_round(n, 2) for n in every), run)
        before = exchanges.checksums(VICTIM)
        exchanges.kill(VICTIM)
        wait_until("round 3", lambda: all(exchanges.has_round(n, 3) for n in others), run)
        wait_until("round 4", lambda: any(exchanges.has_round(n, 4) for n in others), run)
        exchanges.start(VICTIM)
        after = exchanges.checksums(VICTIM)
        code = run.wait(timeout=900)
        wall_s = time.monotonic() - began
        back = exchanges.has_round(VICTIM, ROUNDS)
        return _verdict(processes, out, code, wall_s, before, after, back)


def _verdict(
    processes: Processes,
    out: Path,
    code: int,
    wall_s: float,
    before: dict[str, str],
    after: dict[str, str],
    back: bool,
) -> dict[str, object]:
    path = out / "summary.json"
    told = json.loads(path.read_text())["systems"]["fedmoe-da"][0] if path.is_file() else {}
    events = told.get("events", {})
    rejected, lost = events.get("rejected", 0), events.get("peer-lost", 0)
    # In every round without it, each of the others misses all experts of the victim.
    per_round = (NODES - 1) * EXPERTS
    checks = {
        "run-ended-well": code == 0,
        # Of rounds 3 to 6 the first surely, the last surely not: it came back in round 4.
        "victims-rounds-rejected": 1 <= rejected < ROUNDS - 2,
        "others-missed-its-experts": per_round <= lost <= per_round * rejected,
        "accuracy-reported": 0 < told.get("final-accuracy", 0) <= 1,
        "experts-went-from-peer-to-peer": told.get("peer-bytes", 0) > 0,
        "stored-blobs-survived": bool(before) and before.items() <= after.items(),
        "victim-took-part-again": back,
        "all-programs-lasted": all(
            process.poll() is None for name, process in processes.running.items() if name != "run"
        ),
    }
    if not all(checks.values()):
        processes.print_logs()
    return {
        "checks": checks,
        "rounds": ROUNDS,
        "events": events,
        "blobs-before": len(before),
        "accuracy": [told.get("initial-accuracy"), told.get("final-accuracy")],
        "bytes": {k: told.get(f"{k}-bytes") for k in ("uplink", "downlink", "peer")},
        "wall-s": round(wall_s, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--insecure", action="store_true", help="Flower's own connections without TLS"
    )
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="flwr-moe-deploy-") as folder:
        result = measure(Path(folder), chosen.insecure)
    checks = result["checks"]
    assert isinstance(checks, dict)
    ratio = sum(checks.values()) / len(checks)
    summary = {
        "benchmark": "deploy",
        "ratio": round(ratio, 3),
        "bar": BAR,
        "passed": ratio >= BAR,
        "superlink-tls": not chosen.insecure,
        **result,
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
