"""FedSL over real processes and TLS, with a SuperNode that is killed in the middle of a round.

Starts a SuperLink and three SuperNodes on loopback, with certificates made for the occasion, and
runs FedSL with `flwr run`. The ServerApp's tensor exchange, which serves the server half, speaks
TLS under a name of its own and takes nodes with a certificate only. When a node has a connection
to it in its second round, that SuperNode and what it has started are killed (SIGKILL). Prints one
JSON line; `ratio` is the share of `checks` that held, the bar is 1. All processes are stopped by
their process ids in the end; if a check failed, the ends of their logs go to standard error.
"""

import secrets
import tempfile
import time
from pathlib import Path
from typing import Any

from deployment import (
    Identity,
    Processes,
    always_stopped,
    deploy,
    environment,
    free_ports,
    make_certificates,
    print_verdict,
    start_run,
    told,
    wait_until,
)

from flwr_moe.exchange import ExchangeClient, ExchangeError

NODES, ROUNDS, STEPS, BATCH, VICTIM = 3, 3, 150, 16, 2
VALUES = 64
"""At the cut of the digits' model; FedSL prunes a quarter of them and drops half of the rest."""


def measure(folder: Path) -> dict[str, Any]:
    """Run once; what was checked and measured."""
    processes = Processes(folder, environment(folder))
    out, token = folder / "results", secrets.token_urlsafe(24)
    with always_stopped(processes):
        identity = make_certificates(folder)
        files = {"ca": identity.ca, "cert": identity.certificate, "key": identity.key}
        config = " ".join(f'exchange-{name}="{path}"' for name, path in files.items())
        deploy(processes, identity, [config] * NODES)
        (port,) = free_ports(1)
        url = f"https://localhost:{port}"
        settings = {
            "system": "fedsl",
            "links": "real",
            "partition": "iid",  # starts untrained
            "num-clients": NODES,
            "num-clusters": NODES,
            "num-rounds": ROUNDS,
            "local-steps": STEPS,
            "batch-size": BATCH,
            "split.cut": "stem",
            "split.bits": 8,
            "split.dropout": 0.5,
            "split.prune": 0.25,
            "split.interval": 2,
            "exchange-listen": f"127.0.0.1:{port}",
            "exchange-url": url,
            "exchange-ssl-certfile": str(identity.certificate),
            "exchange-ssl-keyfile": str(identity.key),
            "exchange-ssl-ca-certfile": str(identity.ca),
            "exchange-token": token,
            "eval-every-minutes": 0.0,
            "out": str(out),
        }
        began = time.monotonic()
        run = start_run(processes, settings)
        victim = f"supernode-{VICTIM}"

        def in_second_session() -> bool:
            orders = processes.log(victim).count("Receiving: train.split")
            return orders >= 2 and processes.is_connected(victim, port)

        wait_until("round 2", in_second_session, run)
        processes.kill(victim)
        guarded = _guarded(url, token, identity)
        code = run.wait(timeout=900)
        wall_s = time.monotonic() - began
        summary = told(out, "fedsl")
        checks = {"run-ended-well": code == 0, "strangers-stayed-out": guarded}
        checks |= _checks(summary)
        checks["other-programs-lasted"] = processes.lasted("run", victim)
        if not all(checks.values()):
            processes.print_logs()
    keys = ("bytes-by-kind", "device-steps", "server-half-batches", "unfinished-rounds", "events")
    return {
        "checks": checks,
        "rounds": ROUNDS,
        "accuracy": [summary.get("initial-accuracy"), summary.get("final-accuracy")],
        **{key: summary.get(key) for key in keys},
        "wall-s": round(wall_s, 1),
    }


def _guarded(url: str, token: str, identity: Identity) -> bool:
    """Whether the exchange takes the right certificate and token, and neither alone."""
    mine = (identity.certificate, identity.key)

    def taken(token: str, cert: tuple[Path, Path] | None) -> bool:
        with ExchangeClient(url, token, verify=identity.ca, cert=cert) as client:
            try:
                client.names()
            except ExchangeError:
                return False
        return True

    return [taken(token, mine), taken(token, None), taken("other", mine)] == [True, False, False]


def _checks(summary: dict[str, Any]) -> dict[str, bool]:
    """Check a run's figures; bytes are known to the byte, since every batch is of one size."""
    events, kinds = summary.get("events", {}), summary.get("bytes-by-kind", {})
    replied = summary.get("device-steps", 0)
    kept = VALUES * 3 // 4 // 2
    # A byte for each value, a scale of four for each row, and the label.
    up, down = BATCH * (kept + 4 + 1), BATCH * (kept + 4)
    return {
        # Of the victim's orders the first was answered and the second was not; then it is gone.
        "rounds-went-on": replied == STEPS * (ROUNDS * (NODES - 1) + 1),
        "victims-round-rejected": events.get("rejected") == 1,
        "victims-round-unfinished": summary.get("unfinished-rounds") == 1,
        "killed-in-mid-session": 0 < summary.get("server-half-batches", 0) - replied < STEPS,
        "accuracy-above-start": (
            summary.get("final-accuracy", 0) > summary.get("initial-accuracy", 1) + 0.2
        ),
        "activations-booked": kinds.get("uplink", {}).get("activation") == replied * up,
        "gradients-booked": kinds.get("downlink", {}).get("gradient") == replied * down,
    }


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="flwr-moe-deploy-") as folder:
        print_verdict("deploy_split", **measure(Path(folder)))


if __name__ == "__main__":
    main()
