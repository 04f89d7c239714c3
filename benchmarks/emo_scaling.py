"""Accuracy over the parameters of overlays: deeper tails, wider ones, and more side by side.

    flwr-moe compare emo --task cifar10 … --out runs/emo
    python benchmarks/emo_scaling.py runs/emo --out runs/emo-scaling

Takes the small model of a results folder, caches the activations of all its devices once at 8
bits, and trains tails of many sizes for the same number of steps on it, in one overlay. Weights are
fitted on the public share, accuracy is on the held-out images. Writes scaling.json and scaling.png
and prints one JSON line: `ratio` is the gain of the best ensemble over the small model.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch

from flwr_moe.app.emo import load_ensemble
from flwr_moe.app.settings import Settings
from flwr_moe.app.systems.emo import EMOSettings
from flwr_moe.app.tasks import build_task
from flwr_moe.overlay.block import encode, tap_output
from flwr_moe.overlay.cache import ReplayCache
from flwr_moe.overlay.ensemble import Ensemble
from flwr_moe.overlay.tails import build_tail
from flwr_moe.overlay.training import Recipe, Trainee
from flwr_moe.report import load_results

SIZES = {"vertical": (1, 2, 3, 4, 5), "horizontal": (1, 2, 4)}


def plot(points: list[dict[str, Any]], small: float, path: Path) -> None:
    """Draw accuracy over parameters, a line for each way of scaling."""
    figure, axes = plt.subplots(figsize=(6, 4))
    for scaling in dict.fromkeys(point["scaling"] for point in points):
        mine = [point for point in points if point["scaling"] == scaling]
        axes.plot(
            [p["parameters"] for p in mine], [p["ensemble"] for p in mine], "o-", label=scaling
        )
    axes.axhline(small, color="gray", linestyle="--", label="small model alone")
    axes.set_xscale("log")
    axes.set_xlabel("parameters of an overlay")
    axes.set_ylabel("accuracy of the ensemble")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--out", type=Path, default=Path("runs/emo-scaling"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    settings = Settings.from_mapping(load_results(args.folder).settings)
    task = build_task(settings, settings.num_clients, args.seed)
    saved = load_ensemble(args.folder, args.seed)
    small, front = saved.small, saved.front
    public, tests = task.public_data(), task.test_data()
    x, y = torch.cat([t.x for t in tests]), torch.cat([t.y for t in tests])
    shape = tuple(tap_output(front, public.x[:1]).shape[1:])
    cache = ReplayCache(
        None,
        fingerprint="scaling",
        shape=shape,
        num_classes=task.num_classes,
        devices=range(task.num_clients),
    )
    for device in range(task.num_clients):
        data = task.train_data(device)
        generator = torch.Generator().manual_seed(device)
        block = encode(tap_output(front, data.x), torch.arange(len(data)), data.y, generator)
        cache.put(device, 0, block)
    alone = float((Ensemble(small, front).predict(x) == y).double().mean())
    points = []
    plans = [
        (scaling, size, settings.of(EMOSettings).width)
        for scaling, sizes in SIZES.items()
        for size in sizes
    ]
    plans += [("wider", 3, width) for width in (16, 32, 96)]
    for scaling, size, width in plans:
        kind = scaling if scaling in SIZES else "vertical"
        tail = build_tail(shape, task.num_classes, kind, size, width, args.seed)
        recipe = Recipe(settings.of(EMOSettings).learning_rate, args.steps)
        began = time.perf_counter()
        Trainee(tail, recipe).train(cache.draw, args.steps, args.seed)
        took = time.perf_counter() - began
        ensemble = Ensemble(small, front, [tail])
        ensemble.fit(public.x, public.y)
        points.append(
            {
                "scaling": scaling,
                "size": size,
                "width": width,
                "parameters": sum(p.numel() for p in tail.parameters()),
                "ensemble": float((ensemble.predict(x) == y).double().mean()),
                "tail": float((ensemble.members(x)[1].argmax(1) == y).double().mean()),
                "seconds": round(took, 1),
            }
        )
        print(points[-1], file=sys.stderr, flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    best = max(float(point["ensemble"]) for point in points)
    found = {"benchmark": "emo_scaling", "ratio": best - alone, "small": alone, "points": points}
    (args.out / "scaling.json").write_text(json.dumps(found, indent=1))
    plot(points, alone, args.out / "scaling.png")
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
