"""Mixtures of LoRA experts on disk: every expert a normal PEFT adapter, the gates beside them.

A folder holds ``expert-0``, ``expert-1`` and so on, each as PEFT saves an adapter, then
``mixture.safetensors`` (gates, modules trained whole, fingerprint of the base) and
``mixture.json`` (``num-experts``, ``top-k``, ``gate``).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flwr_moe._lazy import require
from flwr_moe.lora.build import add_lora_experts, lora_mixture
from flwr_moe.lora.layer import GateKind
from flwr_moe.lora.sites import LoRASite, find_sites

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
"""File names of an adapter, as PEFT has them."""

MIXTURE_WEIGHTS, MIXTURE_CONFIG = "mixture.safetensors", "mixture.json"

PEFT_PREFIX = "base_model.model."
"""What PEFT puts before the base model's names."""

PARTS = ("lora_A", "lora_B")


def save_experts(model: nn.Module, folder: Path | str) -> None:
    """Write a mixture: one PEFT adapter folder for each expert, gates and settings beside them.

    ``PeftModel.from_pretrained(base, folder / "expert-3")`` loads expert 3, and modules trained
    whole with it. A submodel's experts are numbered from 0.

    Parameters
    ----------
    model : nn.Module
        Made by `add_lora_experts`, or a submodel of such.
    folder : path
        Made if it does not exist; files of the same names are replaced.

    Raises
    ------
    ValueError
        If the model is no mixture, or its layers hold different numbers of experts.
    """
    mixture = lora_mixture(model)
    state = {key: tensor.detach().cpu() for key, tensor in model.state_dict().items()}
    sizes = {len(state[_expert_key(site, "lora_A")]) for site in mixture.sites.adapted}
    if len(sizes) > 1:
        raise ValueError(f"layers hold {sorted(sizes)} experts, expected the same number in each")
    num_experts = sizes.pop()
    config = copy.deepcopy(mixture.sites.config)
    config.inference_mode = True
    whole = {key: tensor for key, tensor in state.items() if _is_under(key, mixture.sites.saved)}
    for e in range(num_experts):
        adapter = {PEFT_PREFIX + key: tensor for key, tensor in whole.items()}
        for site in mixture.sites.adapted:
            for part in PARTS:
                adapter[_peft_key(site, part)] = state[_expert_key(site, part)][e].contiguous()
        home = Path(folder) / f"expert-{e}"
        config.save_pretrained(str(home))
        save_file(adapter, home / WEIGHTS, {"format": "pt"})
    experts = {_expert_key(site, part) for site in mixture.sites.adapted for part in PARTS}
    rest = {key: tensor.contiguous() for key, tensor in state.items() if key not in experts}
    save_file(rest, Path(folder) / MIXTURE_WEIGHTS, {"format": "pt"})
    top_k = min(mixture.top_k, num_experts)
    settings = {"num-experts": num_experts, "top-k": top_k, "gate": mixture.gate}
    (Path(folder) / MIXTURE_CONFIG).write_text(json.dumps(settings, indent=1) + "\n")


def load_experts(base: nn.Module, folder: Path | str) -> nn.Module:
    """Make `base`, in place, the mixture that `save_experts` wrote to `folder`.

    Raises
    ------
    ValueError
        If a file is missing or broken, a tensor does not fit, or the mixture belongs to another
        base model.
    """
    folder = Path(folder)
    settings = _read_settings(folder / MIXTURE_CONFIG)
    count = settings["num-experts"]
    homes = [folder / f"expert-{e}" for e in range(count)]
    rest = _read_tensors(folder / MIXTURE_WEIGHTS)
    config = _read_config(homes[0])
    adapters = [_read_tensors(home / WEIGHTS) for home in homes]
    model = add_lora_experts(
        base,
        config,
        count,
        settings["top-k"],
        gate=settings["gate"],
        generator=torch.Generator().manual_seed(0),
    )
    _load(model, rest | _stacked(lora_mixture(model).sites.adapted, adapters, homes))
    return model


def from_peft(
    base: nn.Module,
    folders: Sequence[Path | str],
    top_k: int,
    *,
    gate: GateKind = "token",
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Make `base`, in place, a mixture that starts from trained PEFT adapters, one an expert.

    Modules that the adapters trained whole (a classification head) are averaged: a mixture has
    one of each.

    Parameters
    ----------
    base : nn.Module
        The model all adapters were trained on.
    folders : sequence of path
        Adapter folders as PEFT saves them (``adapter_config.json``,
        ``adapter_model.safetensors``); the same layers, ranks and scaling in each.
    top_k, gate, generator
        As in `add_lora_experts`; the gates start at random.

    Returns
    -------
    nn.Module
        `base`.

    Raises
    ------
    ValueError
        If there are no folders, a file is missing or broken, or an adapter does not fit the base
        or the first adapter.

    Notes
    -----
    Source: ours.
    """
    homes = [Path(folder) for folder in folders]
    if not homes:
        raise ValueError("folders is empty, expected at least one PEFT adapter")
    configs = [_read_config(home) for home in homes]
    adapters = [_read_tensors(home / WEIGHTS) for home in homes]
    sites = [find_sites(base, config) for config in configs]
    for home, other in zip(homes[1:], sites[1:], strict=True):
        if (other.adapted, other.saved) != (sites[0].adapted, sites[0].saved):
            raise ValueError(
                f"adapter {home} adapts {_summary(other.adapted)}, expected as {homes[0]}: "
                f"{_summary(sites[0].adapted)}"
            )
    experts = _stacked(sites[0].adapted, adapters, homes)
    model = add_lora_experts(base, configs[0], len(homes), top_k, gate=gate, generator=generator)
    state = model.state_dict()
    files = list(zip(adapters, homes, strict=True))
    for key in state:
        if _is_under(key, sites[0].saved):
            whole = [_named(a, PEFT_PREFIX + key, home) for a, home in files]
            state[key] = torch.stack([w.double() for w in whole]).mean(0).to(state[key])
    _load(model, state | experts)
    return model


def _stacked(
    sites: Sequence[LoRASite], adapters: Sequence[Mapping[str, Tensor]], homes: Sequence[Path]
) -> dict[str, Tensor]:
    """Stack adapters as the experts of a mixture."""
    experts = {}
    for site in sites:
        shapes = {"lora_A": (site.rank, site.d_in), "lora_B": (site.d_out, site.rank)}
        for part, shape in shapes.items():
            key = _peft_key(site, part)
            tensors = [_named(a, key, home) for a, home in zip(adapters, homes, strict=True)]
            for tensor, home in zip(tensors, homes, strict=True):
                if tuple(tensor.shape) != shape:
                    raise ValueError(
                        f"{key} in {home} has shape {tuple(tensor.shape)}, expected {shape}"
                    )
            experts[_expert_key(site, part)] = torch.stack(tensors)
    return experts


def _load(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"the mixture does not fit {type(model).__name__}: {error}") from error


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path} is missing, expected a folder written by save_experts") from error
    except ValueError as error:
        raise ValueError(f"{path} is broken, expected JSON ({error})") from error
    numbers = [settings.get(key) for key in ("num-experts", "top-k")]
    if not all(isinstance(n, int) and n >= 1 for n in numbers):
        raise ValueError(f"{path} says num-experts and top-k are {numbers}, expected at least 1")
    return dict(settings)


def _read_config(home: Path) -> Any:
    if not (home / CONFIG).is_file():
        raise ValueError(f"{home / CONFIG} is missing, expected a PEFT adapter folder")
    config = require("peft").LoraConfig.from_pretrained(str(home))
    config.inference_mode = False
    return config


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"{path} is missing, expected tensors in safetensors format")
    try:
        return dict(load_file(path))
    except SafetensorError as error:
        raise ValueError(f"{path} is broken, expected safetensors ({error})") from error


def _named(adapter: Mapping[str, Tensor], key: str, home: Path) -> Tensor:
    if key not in adapter:
        raise ValueError(f"adapter {home} has no tensor {key!r}, expected one for this base model")
    return adapter[key]


def _is_under(key: str, modules: Sequence[str]) -> bool:
    return key.startswith(tuple(f"{name}." for name in modules))


def _expert_key(site: LoRASite, part: str) -> str:
    return f"{site.name}.experts.{part}"


def _peft_key(site: LoRASite, part: str) -> str:
    return f"{PEFT_PREFIX}{site.name}.{part}.weight"


def _summary(sites: Sequence[LoRASite]) -> str:
    return ", ".join(f"{s.name} (rank {s.rank}, scaling {s.scaling:g})" for s in sites[:3])
