"""Peak memory and step time of a device that owns a sixth of the experts, against the full model.

Each model is built and trained in a fresh process of its own. Memory is the peak resident size over
building the model and one step of SGD with momentum, above what the process had after importing
torch and one step of a tiny model (the first optimiser of a process makes torch load some 80 MB of
code, given as `library_mb`). Time is the median of the steps after it. Prints one JSON line; both
ratios are the device's over the full model's, so smaller is better.
"""

import json
import resource
import statistics
import subprocess
import sys
import time

import torch
from torch import nn

from flwr_moe.experts import ExpertLayout, SparseMoE

WIDTH, HIDDEN, EXPERTS, LAYERS, CLASSES = 1024, 1024, 12, 2, 10
OWNED = [3, 8]
BATCH, STEPS = 32, 7


def peak_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def full_model() -> nn.Module:
    blocks = [SparseMoE(WIDTH, HIDDEN, EXPERTS) for _ in range(LAYERS)]
    return nn.Sequential(nn.Linear(64, WIDTH), *blocks, nn.Linear(WIDTH, CLASSES))


def own_model() -> nn.Module:
    with torch.device("meta"):
        model = full_model()
    model = ExpertLayout.of(model).submodel(model, OWNED)
    with torch.no_grad():  # in place of the download
        for parameter in model.parameters():
            parameter.uniform_(-0.03, 0.03)
    return model


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def step_time(model: nn.Module, optimiser: torch.optim.Optimizer) -> float:
    x, target = torch.randn(BATCH, 64), torch.randint(CLASSES, (BATCH,))
    start = time.perf_counter()
    optimiser.zero_grad()
    nn.functional.cross_entropy(model(x), target).backward()
    optimiser.step()
    return time.perf_counter() - start


def measure(which: str) -> dict[str, float]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    imported = peak_bytes()
    tiny = nn.Linear(64, CLASSES)
    step_time(tiny, sgd(tiny))
    baseline = peak_bytes()
    model = full_model() if which == "full" else own_model()
    optimiser = sgd(model)
    step_time(model, optimiser)
    peak = peak_bytes()
    return {
        "parameter_mb": sum(p.nbytes for p in model.parameters()) / 1e6,
        "peak_mb": (peak - baseline) / 1e6,
        "library_mb": (baseline - imported) / 1e6,
        "step_s": statistics.median(step_time(model, optimiser) for _ in range(STEPS)),
    }


def main() -> None:
    results = {}
    for which in ("full", "own"):
        command = [sys.executable, __file__, which]
        run = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
        results[which] = json.loads(run.stdout)
    full, own = results["full"], results["own"]
    summary = {
        "benchmark": "submodel",
        "owned_share": len(OWNED) / EXPERTS,
        "peak_memory_ratio": round(own["peak_mb"] / full["peak_mb"], 3),
        "step_time_ratio": round(own["step_s"] / full["step_s"], 3),
        "parameter_ratio": round(own["parameter_mb"] / full["parameter_mb"], 3),
        "full": {key: round(value, 4) for key, value in full.items()},
        "own": {key: round(value, 4) for key, value in own.items()},
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1])))
    else:
        main()
