"""FedMoE-DA over real processes and TLS, with a tensor exchange that is killed and comes back.

Starts a SuperLink, three SuperNodes and three `flwr-moe serve` on loopback, with certificates made
for the occasion, and runs FedMoE-DA with `flwr run`. Every expert is mixed with all others, so that
it is known what goes missing. When all nodes have trained round 2, the exchange of node 2 is killed
(SIGKILL); once the others are in round 4 it is started again on the same folder. Prints one JSON
line; `ratio` is the share of `checks` that held, the bar is 1. All processes are stopped by their
process ids in the end; if a check failed, the ends of their logs go to standard error.
"""

import argparse
import hashlib
import secrets
import tempfile
import time
from pathlib import Path
from typing import Any

from deployment import (
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

NODES, EXPERTS, ROUNDS, VICTIM = 3, 4, 6, 2


class Exchanges:
    """The three `flwr-moe serve`, and what they hold."""

    def __init__(self, processes: Processes, folder: Path, ports: list[int]) -> None:
        self.processes, self.folder, self.ports = processes, folder, ports
        self.identity = make_certificates(folder)
        token = processes.environment["FLWR_MOE_TOKEN"]
        self.urls = [f"https://127.0.0.1:{port}" for port in ports]
        self.clients = [ExchangeClient(url, token, verify=self.identity.ca) for url in self.urls]

    def start(self, node: int) -> None:
        """Start a node's exchange, and return when it answers."""
        process = self.processes.start(
            f"exchange-{node}",
            *("flwr-moe", "serve", "--folder", str(self.folder / f"store-{node}")),
            *("--host", "127.0.0.1", "--port", str(self.ports[node])),
            *("--ssl-certfile", str(self.identity.certificate)),
            *("--ssl-keyfile", str(self.identity.key)),
        )
        wait_until(f"exchange {node} answers", lambda: self._answers(node), process)

    def kill(self, node: int) -> None:
        """Kill a node's exchange as a power cut would."""
        self.processes.kill(f"exchange-{node}")

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


def measure(folder: Path, insecure: bool) -> dict[str, Any]:
    """Run once; what was checked and measured."""
    token = secrets.token_urlsafe(24)
    processes = Processes(folder, environment(folder, FLWR_MOE_TOKEN=token))
    out = folder / "results"
    with always_stopped(processes):
        exchanges = Exchanges(processes, folder, free_ports(NODES))
        for node in range(NODES):
            exchanges.start(node)
        ca = exchanges.identity.ca
        configs = [f'exchange-url="{url}" exchange-ca="{ca}"' for url in exchanges.urls]
        deploy(processes, exchanges.identity, configs, insecure)
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
        began = time.monotonic()
        run = start_run(processes, settings)
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
) -> dict[str, Any]:
    summary = told(out, "fedmoe-da")
    events = summary.get("events", {})
    rejected, lost = events.get("rejected", 0), events.get("peer-lost", 0)
    # In every round without it, each of the others misses all experts of the victim.
    per_round = (NODES - 1) * EXPERTS
    checks = {
        "run-ended-well": code == 0,
        # Of rounds 3 to 6 the first surely, the last surely not: it came back in round 4.
        "victims-rounds-rejected": 1 <= rejected < ROUNDS - 2,
        "others-missed-its-experts": per_round <= lost <= per_round * rejected,
        "accuracy-reported": 0 < summary.get("final-accuracy", 0) <= 1,
        "experts-went-from-peer-to-peer": summary.get("peer-bytes", 0) > 0,
        "stored-blobs-survived": bool(before) and before.items() <= after.items(),
        "victim-took-part-again": back,
        "all-programs-lasted": processes.lasted("run"),
    }
    if not all(checks.values()):
        processes.print_logs()
    return {
        "checks": checks,
        "rounds": ROUNDS,
        "events": events,
        "blobs-before": len(before),
        "accuracy": [summary.get("initial-accuracy"), summary.get("final-accuracy")],
        "bytes": {k: summary.get(f"{k}-bytes") for k in ("uplink", "downlink", "peer")},
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
    print_verdict("deploy", **{"superlink-tls": not chosen.insecure, **result})


if __name__ == "__main__":
    main()
