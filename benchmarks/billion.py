"""A device that owns an eighth of the experts trains one step of a model of a billion parameters.

The model is transformers' Qwen3-MoE with 32 experts in each of 8 layers; 95 % of its parameters
are in experts. A fresh process builds the full model on the meta device, cuts the submodel out,
fills it with random numbers in place of the download and trains all it holds for one step of a
causal language model on random tokens. Its peak resident size, everything included, must stay
below 8 GB. Beside it stands what the full model needs for parameters, gradients and optimiser
states alone, activations not counted; `ratio` is the device's peak over that. With
``--measure-full`` the full model takes the same step, if that is expected below 10 GB (bfloat16
with SGD). Prints one JSON line.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from typing import Any

import torch
from torch import nn

BAR_GB, FULL_LIMIT_GB = 8.0, 10.0
OWNED_SHARE, EXPERTS = 8, 32
VOCABULARY, BATCH, LENGTH = 16_000, 4, 128
COPIES = {"adam": 4, "sgd": 2}  # parameters, gradients, and Adam's two moments
CONFIG: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 1216,
}


def peak_gb() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--optimiser", choices=tuple(COPIES), default="adam")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--measure-full", action="store_true", help="train the full model too")
    parser.add_argument("--process", choices=("own", "full"), help=argparse.SUPPRESS)
    return parser.parse_args()


def meta_model(dtype: torch.dtype) -> nn.Module:
    from transformers.models.qwen3_moe import Qwen3MoeConfig, Qwen3MoeForCausalLM

    with torch.device("meta"):
        model: Any = Qwen3MoeForCausalLM(Qwen3MoeConfig(**CONFIG))
        return model.to(dtype)


def measure(options: argparse.Namespace) -> dict[str, float]:
    from flwr_moe.experts import ExpertLayout

    torch.set_num_threads(1)
    torch.manual_seed(0)
    full = meta_model(getattr(torch, options.dtype))
    imported = peak_gb()
    owned = range(EXPERTS // OWNED_SHARE if options.process == "own" else EXPERTS)
    model: Any = ExpertLayout.of(full).submodel(full, owned).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02)
    if options.checkpointing:
        model.activation_checkpointing_enable()
    kind = torch.optim.Adam if options.optimiser == "adam" else torch.optim.SGD
    # One tensor at a time: no second copy of all gradients.
    optimiser = kind(model.parameters(), lr=1e-4, foreach=False)
    start = time.perf_counter()
    tokens = torch.randint(VOCABULARY, (BATCH, LENGTH))
    loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    optimiser.step()
    return {
        "peak_gb": round(peak_gb(), 3),
        "imported_gb": round(imported, 3),
        "parameters": sum(p.numel() for p in model.parameters()),
        "parameter_gb": round(sum(p.nbytes for p in model.parameters()) / 1e9, 3),
        "loss": round(loss.item(), 3),
        "step_s": round(time.perf_counter() - start, 1),
    }


def in_fresh_process(which: str) -> dict[str, float]:
    command = [sys.executable, __file__, *sys.argv[1:], "--process", which]
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=1200)
    return json.loads(run.stdout.splitlines()[-1])


def main(options: argparse.Namespace) -> None:
    model = meta_model(getattr(torch, options.dtype))
    full_gb = sum(p.nbytes for p in model.parameters()) * COPIES[options.optimiser] / 1e9
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    parameters = sum(p.numel() for p in model.parameters())
    if options.measure_full and full_gb + 2 > FULL_LIMIT_GB:
        sys.exit(f"the full model needs {full_gb:.1f} GB, expected below {FULL_LIMIT_GB - 2:g}")
    own = in_fresh_process("own")
    summary = {
        "benchmark": "billion",
        "ratio": round(own["peak_gb"] / full_gb, 3),
        "bar_gb": BAR_GB,
        "passed": own["peak_gb"] < BAR_GB,
        "full_parameters": parameters,
        "share_in_experts": round(experts / parameters, 3),
        "owned_share": 1 / OWNED_SHARE,
        "dtype": options.dtype,
        "optimiser": options.optimiser,
        "checkpointing": options.checkpointing,
        "tokens": BATCH * LENGTH,
        "own": own,
        "full_states_gb": round(full_gb, 2),
    }
    if options.measure_full:
        summary["full"] = in_fresh_process("full")
    print(json.dumps(summary))


if __name__ == "__main__":
    chosen = arguments()
    if chosen.process:
        print(json.dumps(measure(chosen)))
    else:
        main(chosen)
