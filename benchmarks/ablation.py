"""EMS-FL with one choice changed at a time, on the default task and network.

    python benchmarks/ablation.py --seeds 2 --out runs/ablation.md

Prints one JSON line per run and writes the table of README as Markdown.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import mean

from flwr_moe.app.compare import DEFAULT_CLIENTS, run_one
from flwr_moe.app.settings import Settings

VARIANTS: dict[str, dict[str, str | bool]] = {
    "default: random features, exact, shared frozen": {},
    "gate: plain": {"ems-fl.gate": "plain"},
    "gate: linear, on the model's features": {"ems-fl.gate": "linear"},
    "assignment: greedy": {"ems-fl.assignment": "greedy"},
    "assignment: random": {"ems-fl.assignment": "random"},
    "assignment: exact, after all clusters were seen": {"ems-fl.wait-for-all": True},
    "shared layers: trained": {"ems-fl.train-shared": True},
    "inference: most probable cluster only": {"ems-fl.inference": "gate"},
    "gate: linear, assembled model answers": {
        "ems-fl.gate": "linear",
        "ems-fl.inference": "gate",
    },
}
GOAL = 0.9


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--hours", type=float, default=48.0, help="virtual hours of each run")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation.md"))
    parser.add_argument("--only", nargs="*", default=list(VARIANTS))
    arguments = parser.parse_args()
    rows = []
    for name in arguments.only:
        runs = []
        for seed in range(arguments.seeds):
            settings = Settings.from_mapping(VARIANTS[name]).replace(
                num_clients=DEFAULT_CLIENTS, horizon_hours=arguments.hours
            )
            run = run_one("ems-fl", settings, seed)
            reached = [row.time_s / 3600 for row in run.history if row.accuracy >= GOAL]
            line = {
                "variant": name,
                "seed": seed,
                "best": max(row.accuracy for row in run.history),
                "final": run.history[-1].accuracy,
                "hours-to-goal": reached[0] if reached else None,
                "captured-mass": run.summary["captured-mass"],
                "gate-accuracy": run.summary["gate-accuracy"],
                "assigned-affinity": run.summary["assigned-affinity"],
                "best-affinity": run.summary["best-affinity"],
                "uplink-kb-per-update": run.summary["uplink-bytes-per-update"] / 1000,
            }
            print(json.dumps(line), flush=True)
            runs.append(line)
        hours = [run["hours-to-goal"] for run in runs]
        cells = [
            name,
            f"{mean(run['final'] for run in runs):.3f}",
            f"{mean(run['best'] for run in runs):.3f}",
            " · ".join("–" if h is None else f"{h:.1f}" for h in hours),
            *(
                f"{mean(run[key] for run in runs):.3f}"
                for key in ("captured-mass", "gate-accuracy", "assigned-affinity")
            ),
            f"{mean(run['uplink-kb-per-update'] for run in runs):.0f}",
        ]
        rows.append("| " + " | ".join(cells) + " |")
    head = (
        f"| EMS-FL after {arguments.hours:g} h, seeds: {arguments.seeds} | final | best "
        f"| hours to {GOAL:.2f} "
        "| captured mass | gate accuracy | affinity of own experts | uplink kB per update |"
    )
    table = "\n".join([head, "| --- " * 8 + "|", *rows]) + "\n"
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(table)
    print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
