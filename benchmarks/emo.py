"""EMO against FedAvg and SplitFed, read off the results folders of a comparison.

    flwr-moe compare emo fedavg splitfed --task cifar10 --links wireless --seeds 3 … --out runs/emo
    python benchmarks/emo.py runs/emo

Per seed: how far the ensemble ends above FedAvg and above the best FedAvg ever reached, and
whether the small model ends as FedAvg's does. Then, at the highest accuracy that both EMO and
SplitFed reached, the bytes over all links and the virtual time of EMO over those of SplitFed.
Prints one JSON line; bars: 0.10, 1/7.17 and 1/6.9.
"""

from __future__ import annotations

import argparse
import json
import sys
from statistics import fmean
from typing import Any

from flwr_moe.report import RunRecord, load_results

MARGIN_BAR, BYTES_BAR, TIME_BAR = 0.10, 1 / 7.17, 1 / 6.9


def reached(run: RunRecord, accuracy: float) -> Any:
    """First row of a run's history that is at least that accurate."""
    return next(row for row in run.history if row.accuracy >= accuracy)


def total_bytes(row: Any) -> int:
    """Bytes over all links up to a row."""
    return int(row.uplink_bytes + row.downlink_bytes + row.peer_bytes)


def against_splitfed(emo: RunRecord, splitfed: RunRecord) -> dict[str, float]:
    """Bytes and time to the highest accuracy that both reached."""
    goal = min(max(row.accuracy for row in run.history) for run in (emo, splitfed))
    mine, theirs = reached(emo, goal), reached(splitfed, goal)
    return {
        "goal": goal,
        "splitfed-best": max(row.accuracy for row in splitfed.history),
        "bytes-ratio": total_bytes(mine) / total_bytes(theirs),
        "time-ratio": mine.time_s / theirs.time_s,
        # What EMO needs for its final accuracy, which SplitFed may never reach, beside all that
        # SplitFed spent.
        "final-bytes-ratio": total_bytes(emo.history[-1]) / total_bytes(splitfed.history[-1]),
        "final-time-ratio": emo.history[-1].time_s / splitfed.history[-1].time_s,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", help="of one comparison, or of its parts")
    runs = [run for f in parser.parse_args().folders for run in load_results(f).runs]
    of = {(run.system, run.seed): run for run in runs}
    seeds = []
    for seed in sorted({run.seed for run in runs if run.system == "emo"}):
        emo, fedavg = of["emo", seed], of["fedavg", seed]
        found: dict[str, Any] = {
            "seed": seed,
            "emo": emo.history[-1].accuracy,
            "fedavg": fedavg.history[-1].accuracy,
            "margin": emo.history[-1].accuracy - fedavg.history[-1].accuracy,
            "above-fedavg-best": emo.history[-1].accuracy
            - max(row.accuracy for row in fedavg.history),
            "same-small-model": emo.summary["small-accuracy"] == fedavg.history[-1].accuracy,
        }
        if ("splitfed", seed) in of:
            found |= against_splitfed(emo, of["splitfed", seed])
        seeds.append(found)
    mean = {
        key: fmean(found[key] for found in seeds)
        for key in ("margin", "above-fedavg-best", "bytes-ratio", "time-ratio")
        if all(key in found for found in seeds)
    }
    bars = {"margin": MARGIN_BAR, "bytes-ratio": BYTES_BAR, "time-ratio": TIME_BAR}
    print(json.dumps({"benchmark": "emo", "ratio": mean, "bar": bars, "seeds": seeds}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
