"""Finds each system's own learning rate and local steps on the default task.

Tunes on a seed of its own, whose split no comparison uses by default:

    python benchmarks/tune.py fedavg --rates 0.0005 0.001 0.003 --steps 50 100 200

Prints one JSON line per setting, and the best at the end.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys

from flwr_moe.app.compare import DEFAULT_CLIENTS, run_one
from flwr_moe.app.settings import Settings, parse_assignments

TUNING_SEED = 100


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("system")
    parser.add_argument("--rates", type=float, nargs="+", required=True)
    parser.add_argument("--steps", type=int, nargs="+", default=[0], help="0: until the next pass")
    parser.add_argument("--seed", type=int, default=TUNING_SEED)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    base = Settings.from_mapping(parse_assignments(arguments.set))
    base = base.replace(num_clients=base.num_clients or DEFAULT_CLIENTS)
    best: dict[str, float] = {}
    for rate, steps in itertools.product(arguments.rates, arguments.steps):
        settings = base.replace(learning_rate=rate, local_steps=steps)
        run = run_one(arguments.system, settings, arguments.seed)
        accuracies = [row.accuracy for row in run.history]
        line = {
            "system": arguments.system,
            "set": arguments.set,
            "learning-rate": rate,
            "local-steps": steps,
            "best-accuracy": max(accuracies),
            "final-accuracy": accuracies[-1],
            "best-hours": run.history[accuracies.index(max(accuracies))].time_s / 3600,
            "evaluations": len(accuracies),
            "wall-s": run.summary["wall-s"],
        }
        print(json.dumps(line), flush=True)
        if line["best-accuracy"] > best.get("best-accuracy", 0.0):
            best = line
    print(json.dumps({"best": best}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
