"""FedSL against SplitFed, read off the results folders of a comparison.

    flwr-moe compare fedsl splitfed --task cifar10 --links wireless --seeds 3 … --out runs/fedsl
    python benchmarks/fedsl.py runs/fedsl

Per seed: final accuracy less SplitFed's (bar: at least -0.01), and bytes between clients and
server, both ways and of all kinds, over SplitFed's (bar: 1/8). Prints one JSON line. Step times are
those of `benchmarks/split.py`.
"""

from __future__ import annotations

import argparse
import json
import sys
from statistics import fmean

from flwr_moe.report import load_results

ACCURACY_BAR, BYTES_BAR = -0.01, 1 / 8


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", help="of one comparison, or of its parts")
    runs = [run for f in parser.parse_args().folders for run in load_results(f).runs]
    of = {(run.system, run.seed): run for run in runs}
    seeds = []
    for seed in sorted({run.seed for run in runs if run.system == "fedsl"}):
        fedsl, splitfed = of["fedsl", seed], of["splitfed", seed]
        seeds.append(
            {
                "seed": seed,
                "fedsl": fedsl.history[-1].accuracy,
                "splitfed": splitfed.history[-1].accuracy,
                "margin": fedsl.history[-1].accuracy - splitfed.history[-1].accuracy,
                "bytes-ratio": fedsl.summary["server-bytes"] / splitfed.summary["server-bytes"],
                "time-ratio": fedsl.history[-1].time_s / splitfed.history[-1].time_s,
            }
        )
    keys = ("margin", "bytes-ratio", "time-ratio")
    mean = {key: fmean(float(found[key]) for found in seeds) for key in keys}
    bars = {"margin": ACCURACY_BAR, "bytes-ratio": BYTES_BAR}
    print(json.dumps({"benchmark": "fedsl", "ratio": mean, "bar": bars, "seeds": seeds}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
