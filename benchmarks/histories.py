"""Runs every system for a short while with a fixed seed and keeps each ``history.csv``.

A change that should alter nothing leaves all of them the same byte for byte:

    python benchmarks/histories.py --out runs/before
    python benchmarks/histories.py --out runs/after --against runs/before

Digits run with all settings of a system that take another path through the code; images are a few
of CIFAR-10 (skipped by name without ``--data``), texts a few made-up ones with a tiny encoder.
Nodes run one after the other in this process; ``--engine flower`` takes Flower's own engine.
Prints one JSON line a case and one for all; the exit code is 1 if a history differs.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import logging
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

SMALL = [
    *("num-clients=4", "num-clusters=2", "num-experts=4", "horizon-hours=10"),
    *("max-local-steps=10", "local-steps=5", "ems-fl.num-features=64"),
]
WIRELESS = [*SMALL, "links=wireless", "partition=iid", "num-rounds=3", "eval-every-minutes=0"]
IMAGES = [*WIRELESS, "num-train=160", "num-test=80", "model-width=0.125", "batch-size=8"]
TEXTS = [
    *("num-clients=4", "num-clusters=2", "num-experts=4", "num-rounds=3", "max-local-steps=4"),
    *("local-steps=2", "ems-fl.num-features=24", "text.max-length=10", "text.lora-layers=1"),
    *("text.num-public=40", "num-test=40", "lora.rank=2"),
]
EMO = ["emo.overlays=1", "emo.steps=40", "emo.period=1", "emo.controller=every-round"]

CASES: dict[str, tuple[str, list[str]]] = {
    **{
        f"digits-{name}": (name, SMALL)
        for name in ("ems-fl", "fedavg", "fedavg-until-pass", "fedasync", "fedbuff")
    },
    "digits-ems-fl-plain": ("ems-fl", [*SMALL, "ems-fl.gate=plain", "ems-fl.wait-for-all=true"]),
    "digits-ems-fl-linear": ("ems-fl", [*SMALL, "ems-fl.gate=linear", "ems-fl.train-shared=true"]),
    "digits-ems-fl-half": ("ems-fl", [*SMALL, "wire-dtype=bfloat16"]),
    "digits-fedmoe-da": ("fedmoe-da", [*WIRELESS, "partition=dirichlet"]),
    "digits-fedmoe-da-relay": (
        "fedmoe-da",
        [*WIRELESS, "partition=conflict", "fedmoe-da.relay=true", "fedmoe-da.interval=1"],
    ),
    "digits-local": ("local", [*WIRELESS, "partition=conflict"]),
    "digits-splitfed": ("splitfed", WIRELESS),
    "digits-fedsl": ("fedsl", WIRELESS),
    "digits-fedsl-shared": ("fedsl", [*WIRELESS, "SPLIT.server=shared", "SPLIT.interval=1"]),
    "digits-fedsl-ushape": ("fedsl", [*WIRELESS, "SPLIT.labels=client"]),
    "digits-emo": ("emo", [*WIRELESS, *EMO]),
    **{
        f"cifar10-{name}": (name, [*IMAGES, *(EMO if name == "emo" else [])])
        for name in ("fedavg", "splitfed", "fedsl", "emo")
    },
    **{f"texts-{name}": (name, TEXTS) for name in ("ems-fl", "fedavg", "fedasync", "fedmoe-da")},
}
SPLIT_SECTION = "split"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="default: all")
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--against", metavar="DIR", help="histories to compare with")
    parser.add_argument("--data", metavar="DIR", help="holds cifar10/ as parquet")
    parser.add_argument("--engine", choices=("in-process", "flower"), default="in-process")
    arguments = parser.parse_args()
    out = Path(arguments.out).resolve()
    against = Path(arguments.against).resolve() if arguments.against else None
    data = str(Path(arguments.data).resolve()) if arguments.data else None
    out.mkdir(parents=True, exist_ok=True)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    if arguments.engine == "in-process":
        use_local_grid()
    differ, skipped = [], []
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        # Relative paths of one length: some orders hold a path, and its bytes are counted.
        write_texts(Path("news"))
        for name in arguments.cases or CASES:
            if name.startswith("cifar10") and not arguments.data:
                skipped.append(name)
                continue
            text, wall_s = history(name, data)
            (out / f"{name}.csv").write_bytes(text)
            line = {"case": name, "rows": text.count(b"\n") - 1, "wall-s": round(wall_s, 1)}
            line["sha256"] = hashlib.sha256(text).hexdigest()[:16]
            if against is not None:
                line["same"] = (against / f"{name}.csv").read_bytes() == text
                if not line["same"]:
                    differ.append(name)
            print(json.dumps(line), flush=True)
    print(json.dumps({"differ": differ, "skipped": skipped}))
    return int(bool(differ))


def history(name: str, data: str | None) -> tuple[bytes, float]:
    """Run one case by the command a user would type; its history and the seconds it took."""
    from flwr_moe.cli import main as flwr_moe

    system, settings = CASES[name]
    command = ["compare", system, "--out", "results"]
    if name.startswith("cifar10"):
        command += ["--task", "cifar10", "--data", str(data)]
    elif name.startswith("texts"):
        command += ["--task", "ag-news", "--data", "news", "--set", "model=news/encoder"]
    for assignment in settings:
        command += ["--set", assignment.replace("SPLIT", SPLIT_SECTION)]
    shutil.rmtree("results", ignore_errors=True)
    began = time.perf_counter()
    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        code = flwr_moe(command)
    if code:
        raise SystemExit(f"{name}: {' '.join(command)}: exit code {code}\n{told.getvalue()}")
    return Path("results/history.csv").read_bytes(), time.perf_counter() - began


def use_local_grid() -> None:
    """Let comparisons run on a Grid of this process in place of Flower's engine."""
    from flwr_moe.app import compare
    from tests.local_grid import LocalGrid

    compare.simulate = lambda app, nodes, run: run(LocalGrid(app, nodes))  # type: ignore[assignment]


def write_texts(folder: Path) -> None:
    """Write a few texts on four topics, and a tiny encoder of them."""
    from tests.tasks.tiny_text import write_encoder, write_news

    write_news(folder / "ag_news")
    write_encoder(folder / "encoder")


if __name__ == "__main__":
    sys.exit(main())
