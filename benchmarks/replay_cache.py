"""One gigabyte of activations on a node that may use 200 MB of memory.

A fresh process fills a replay cache on disk, opens it again, draws 1,000 batches of 64 and trains
a tail on some more. Prints one JSON line: `ratio` is 200 MB over the memory the process took at
most beyond that of its libraries, `growth_mb` how much it took on between draw 100 and draw 1,000.
`read_mbps` is the rate of activations read and decoded, counted in their stored bytes. Pages of
the files that the system keeps are its own and given back when needed; they do not count.
"""

import json
import os
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

ALLOWED_BYTES, BAR_GROWTH_MB = 200e6, 5.0
SHAPE, CLASSES, DEVICES = (8, 16, 16), 10, 16
SAMPLES_A_BLOCK, RAM_BYTES = 1024, 64 * 2**20
BATCH, DRAWS, STEPS = 64, 1000, 50


def own_bytes() -> int:
    """Memory of this process alone, without pages of files."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


def main() -> int:
    import numpy as np
    import torch

    from flwr_moe.overlay.block import Block
    from flwr_moe.overlay.cache import ReplayCache
    from flwr_moe.overlay.tails import build_tail
    from flwr_moe.overlay.training import Recipe, Trainee

    torch.set_num_threads(1)
    blocks = round(1e9 / (SAMPLES_A_BLOCK * int(np.prod(SHAPE)))) + 1
    generator = torch.Generator().manual_seed(0)

    def block(n: int) -> Block:
        return Block(
            torch.randint(256, (SAMPLES_A_BLOCK, *SHAPE), dtype=torch.uint8, generator=generator),
            torch.ones(SHAPE[0]),
            torch.arange(SAMPLES_A_BLOCK),
            torch.randint(CLASSES, (SAMPLES_A_BLOCK,), generator=generator),
            False,
        )

    def opened(folder: str) -> ReplayCache:
        return ReplayCache(
            folder,
            fingerprint="benchmark",
            shape=SHAPE,
            num_classes=CLASSES,
            devices=range(DEVICES),
            ram_bytes=RAM_BYTES,
        )

    trainee = Trainee(build_tail(SHAPE, CLASSES, width=16), Recipe(total_steps=1000))
    base = peak = own_bytes()
    with tempfile.TemporaryDirectory() as folder:
        with closing(opened(folder)) as cache:
            for n in range(blocks):
                cache.put(n % DEVICES, 0, block(n), n // DEVICES)
                peak = max(peak, own_bytes())
        began = time.perf_counter()
        cache = opened(folder)
        open_s = time.perf_counter() - began
        rng = np.random.default_rng(0)
        settled = 0
        spent = 0.0
        for n in range(DRAWS):
            began = time.perf_counter()
            cache.draw(BATCH, rng)
            spent += time.perf_counter() - began
            peak = max(peak, own_bytes())
            if n == 100:
                settled = own_bytes()
        growth = (own_bytes() - settled) / 1e6
        trainee.train(cache.draw, STEPS, seed=0)
        peak = max(peak, own_bytes())
        stored = cache.stats()["bytes"]
        cache.close()
    ratio = ALLOWED_BYTES / (peak - base)
    print(
        json.dumps(
            {
                "ratio": round(ratio, 2),
                "bar": 1.0,
                "stored_mb": round(stored / 1e6),
                "peak_mb": round((peak - base) / 1e6, 1),
                "growth_mb": round(growth, 2),
                "bar_growth_mb": BAR_GROWTH_MB,
                "open_s": round(open_s, 2),
                "draws_per_s": round(DRAWS / spent, 1),
                "read_mbps": round(DRAWS * BATCH * int(np.prod(SHAPE)) / spent / 1e6, 1),
                "trained_steps": trainee.step,
            }
        )
    )
    return 0 if ratio >= 1.0 and growth <= BAR_GROWTH_MB else 1


if __name__ == "__main__":
    sys.exit(main())
