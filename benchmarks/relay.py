"""The relay's aggregation of 800 experts of 100,000 numbers, against reading them once.

`mix` is timed on a random mixing matrix with three peers an expert, in place, with one thread and
with two. Reading once is the sum over every distinct expert the matrix needs, in the same blocks of
columns; copying once, given for comparison, also writes them. All are the best of several
repetitions, taken in turn. Prints one JSON line; `ratio` is the time of `mix` over that of reading
once with as many threads, and should be at most the bar.
"""

import json
import time
from collections.abc import Callable

import numpy as np
import torch
from scipy.sparse import csr_array

from flwr_moe.experts.mixing import BLOCK_BYTES, mix

EXPERTS, PARAMETERS, PEERS, REPEATS, BAR = 800, 100_000, 3, 7, 2.0


def seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def main() -> None:
    rng = np.random.default_rng(0)
    theta_PN = rng.standard_normal((EXPERTS, PARAMETERS), dtype=np.float32)
    others = [rng.choice(EXPERTS - 1, PEERS, replace=False) for _ in range(EXPERTS)]
    columns = np.array([[p, *(q + (q >= p))] for p, q in enumerate(others)])
    rows = np.repeat(np.arange(EXPERTS), PEERS + 1)
    weights = np.full(columns.size, 1 / (PEERS + 1))
    a_PP = csr_array((weights, (rows, columns.ravel())), shape=(EXPERTS, EXPERTS))
    out_PN, needed = np.zeros_like(theta_PN), np.unique(columns)
    assert len(needed) == EXPERTS  # so that a slice of all rows reads what is needed
    mixed_PN = theta_PN.copy()
    source, target = torch.from_numpy(theta_PN), torch.from_numpy(out_PN)
    width = BLOCK_BYTES // (4 * EXPERTS)
    blocks = [slice(i, i + width) for i in range(0, PARAMETERS, width)]

    def read() -> None:
        for block in blocks:
            source[:, block].sum()

    def copy() -> None:
        for block in blocks:
            target[:, block] = source[:, block]

    work = {"read": read, "copy": copy, "mix": lambda: mix(a_PP, mixed_PN, mixed_PN)}
    result: dict[str, object] = {"benchmark": "relay", "bar": BAR, "needed_experts": len(needed)}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        best = dict.fromkeys(work, float("inf"))
        for _ in range(REPEATS):
            for name, run in work.items():
                best[name] = min(best[name], seconds(run))
        key = "ratio" if threads == 1 else "ratio_two_threads"
        result[key] = round(best["mix"] / best["read"], 2)
        result[f"threads_{threads}"] = {name: round(value, 4) for name, value in best.items()}
        result[f"mix_over_copy_{threads}"] = round(best["mix"] / best["copy"], 2)
    result["met"] = bool(max(result["ratio"], result["ratio_two_threads"]) <= BAR)  # type: ignore[call-overload]
    print(json.dumps(result))


if __name__ == "__main__":
    main()
