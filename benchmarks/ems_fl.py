"""EMS-FL against the conventional systems, read off the results folder of a comparison.

    flwr-moe compare ems-fl fedavg fedavg-until-pass fedasync --seeds 3 --out runs/main
    python benchmarks/ems_fl.py runs/main

Per seed: the time to FedAvg's best accuracy (FedAvg in the better of its two forms) over the time
FedAvg took to it, the final accuracy less the best that any other system ever reached, and
uplink bytes per update over FedAvg's. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import sys

from flwr_moe.report import RunRecord, load_results

FEDAVG = ("fedavg", "fedavg-until-pass")


def best(run: RunRecord) -> tuple[float, float]:
    """Best accuracy of a run and the first time in seconds at which it was reached."""
    row = max(run.history, key=lambda row: (row.accuracy, -row.time_s))
    return row.accuracy, row.time_s


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    runs = load_results(parser.parse_args().folder).runs
    seeds = []
    for ems in (run for run in runs if run.system == "ems-fl"):
        others = [run for run in runs if run.seed == ems.seed and run is not ems]
        fedavg = max((run for run in others if run.system in FEDAVG), key=lambda run: best(run)[0])
        goal, fedavg_s = best(fedavg)
        reached = [row.time_s for row in ems.history if row.accuracy >= goal]
        seeds.append(
            {
                "seed": ems.seed,
                "fedavg": fedavg.system,
                "fedavg-best": goal,
                "fedavg-hours": fedavg_s / 3600,
                "ems-fl-hours-to-it": reached[0] / 3600 if reached else None,
                "time-ratio": reached[0] / fedavg_s if reached else None,
                "best-of-others": max(best(run)[0] for run in others),
                "ems-fl-final": ems.history[-1].accuracy,
                "final-margin": ems.history[-1].accuracy - max(best(run)[0] for run in others),
                "bytes-per-update-ratio": ems.summary["uplink-bytes-per-update"]
                / fedavg.summary["uplink-bytes-per-update"],
            }
        )
    ratios = [seed["time-ratio"] for seed in seeds]
    worst = None if None in ratios or not ratios else max(ratios)
    print(json.dumps({"ratio": worst, "seeds": seeds}, indent=None))
    return 0


if __name__ == "__main__":
    sys.exit(main())
