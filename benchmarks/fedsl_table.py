"""FedSL with one choice changed at a time: pruning rate, bits, dropout, cut, server half, interval.

    python benchmarks/fedsl_table.py --data DIR --seeds 1 --out runs/fedsl-table.md

CIFAR-10 (8,000 training images, all test images), 8 clients, a small VGG at half width, the
settings of README. Prints one JSON line per run and writes a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import mean
from typing import Any

from flwr_moe.app.compare import run_one
from flwr_moe.app.settings import Settings

COMMON: dict[str, Any] = {
    "task": "cifar10",
    "links": "wireless",
    "partition": "iid",
    "num-clients": 8,
    "num-train": 8000,
    "model-width": 0.5,
    "local-steps": 31,
    "batch-size": 32,
    "learning-rate": 0.003,
    "eval-every-minutes": 1e6,
    "split.cut": "features.1",
    "split.prune": 0.25,
    "split.bits": 8,
    "split.dropout": 0.36,
    "split.interval": 1,
    "split.server": "shared",
}
SPLITFED = "SplitFed: nothing compressed"
VARIANTS: dict[str, dict[str, Any]] = {
    SPLITFED: {},
    "FedSL: prune 0.25, 8 bits, dropout 0.36, cut features.1": {},
    "prune 0": {"split.prune": 0.0},
    "prune 0.5": {"split.prune": 0.5},
    "4 bits": {"split.bits": 4},
    "16 bits": {"split.bits": 16},
    "dropout 0": {"split.dropout": 0.0},
    "dropout 0.7": {"split.dropout": 0.7},
    "cut features.0": {"split.cut": "features.0"},
    "cut features.2": {"split.cut": "features.2"},
    "average every 5 rounds": {"split.interval": 5},
    "a server half for each client": {"split.server": "copies"},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="folder with the data sets")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--out", type=Path, default=Path("runs/fedsl-table.md"))
    parser.add_argument("--only", nargs="*", default=list(VARIANTS))
    arguments = parser.parse_args()
    rows = []
    for name in arguments.only:
        runs = []
        for seed in range(arguments.seeds):
            settings = Settings.from_mapping(
                {
                    **COMMON,
                    **VARIANTS[name],
                    "data": arguments.data,
                    "num-rounds": arguments.rounds,
                }
            )
            run = run_one("splitfed" if name == SPLITFED else "fedsl", settings, seed)
            line = {
                "variant": name,
                "seed": seed,
                "final": run.history[-1].accuracy,
                "server-mb": (run.history[-1].uplink_bytes + run.history[-1].downlink_bytes) / 1e6,
                "minutes": run.history[-1].time_s / 60,
            }
            print(json.dumps(line), flush=True)
            runs.append(line)
        cells = [
            name,
            " · ".join(f"{run['final']:.3f}" for run in runs),
            f"{mean(run['server-mb'] for run in runs):,.0f}",
            f"{mean(run['minutes'] for run in runs):,.0f}",
        ]
        rows.append("| " + " | ".join(cells) + " |")
    head = f"| {arguments.rounds} rounds | accuracy | MB through the server | virtual minutes |"
    table = "\n".join([head, "| --- " * 4 + "|", *rows]) + "\n"
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(table)
    print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
