"""Which linear layers a LoRA config adapts, with which rank: PEFT's own rules, asked of PEFT."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from torch import nn

from flwr_moe._lazy import require

if TYPE_CHECKING:
    from peft import LoraConfig

# Fields of a LoraConfig that mixtures follow, then those that say nothing about the adapter.
KNOWN_FIELDS = {
    "r",
    "target_modules",
    "exclude_modules",
    "lora_alpha",
    "lora_dropout",
    "fan_in_fan_out",
    "use_rslora",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "task_type",
    "peft_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "runtime_config",
}

HEAD_NAMES = {"classifier", "score"}

MAX_NAMES = 12
"""Names of existing layers that an error message lists."""


@dataclass(frozen=True)
class LoRASite:
    """One linear layer to adapt.

    Attributes
    ----------
    name : str
        Its name in the model.
    d_in, d_out : int
        Its widths.
    rank : int
        Rank of its adapters.
    scaling : float
        Factor on their answer, alpha / r, or alpha / sqrt(r) for ``use_rslora``.
    dropout : float
        Dropout probability of the adapters' input.
    """

    name: str
    d_in: int
    d_out: int
    rank: int
    scaling: float
    dropout: float


@dataclass(frozen=True)
class LoRASites:
    """What a LoRA config chooses in a model.

    Attributes
    ----------
    adapted : tuple of LoRASite
        Linear layers to adapt, in the order of ``model.named_modules()``.
    saved : tuple of str
        Modules that are trained whole (``modules_to_save``).
    config : LoraConfig
        The config with PEFT's defaults for this model filled in.
    """

    adapted: tuple[LoRASite, ...]
    saved: tuple[str, ...]
    config: LoraConfig


def find_sites(model: nn.Module, config: LoraConfig) -> LoRASites:
    """Let PEFT choose the layers of `model` that `config` adapts; neither is changed.

    Raises
    ------
    ValueError
        If PEFT is not installed, the config asks for something mixtures do not do, nothing
        matches, or what matches is no linear layer that is called as a module.
    """
    lora = require("peft")
    _check_config(config)
    names = _linear_names(model)
    kind = type(model).__name__
    if not names:
        raise ValueError(f"{kind} has no linear layer to adapt")
    skeleton = _skeleton(model)
    config = copy.deepcopy(config)
    config.fan_in_fan_out = any(_is_conv1d(module) for module in skeleton.modules())
    existing = ", ".join(list(dict.fromkeys(n.rsplit(".", 1)[-1] for n in names))[:MAX_NAMES])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lora.inject_adapter_in_model(config, skeleton, low_cpu_mem_usage=True)
    except ValueError as error:
        raise ValueError(
            f"target_modules {config.target_modules!r} fit nothing to adapt in {kind}: it has "
            f"linear layers called {existing} (PEFT says: {_first_line(error)})"
        ) from error

    layer_type = lora.tuners.lora.LoraLayer
    wrapper_type = lora.utils.ModulesToSaveWrapper
    adapted, saved = [], []
    for name, module in skeleton.named_modules():
        if isinstance(module, layer_type):
            base = module.get_base_layer()
            parent = skeleton.get_submodule(name.rpartition(".")[0])
            if type(module) is not lora.tuners.lora.Linear or not _is_linear(base):
                raise ValueError(
                    f"target {name} is a {type(base).__name__}, expected a linear layer"
                )
            if isinstance(parent, nn.MultiheadAttention):
                raise ValueError(
                    f"target {name} is never called: torch's attention reads its weight"
                )
            d_in, d_out = module.in_features, module.out_features
            rank, scaling = module.r["default"], module.scaling["default"]
            dropout = float(getattr(module.lora_dropout["default"], "p", 0.0))
            adapted.append(LoRASite(name, d_in, d_out, rank, scaling, dropout))
        elif isinstance(module, wrapper_type):
            saved.append(name)
    wanted = config.modules_to_save or ()
    # For a task of classification PEFT adds both names that a head may have.
    either = HEAD_NAMES if config.task_type and _any_matches(HEAD_NAMES, saved) else set()
    missing = [m for m in wanted if m not in either and not _any_matches({m}, saved)]
    if missing:
        raise ValueError(f"modules_to_save {missing[0]!r} does not exist in {kind}")
    return LoRASites(tuple(adapted), tuple(saved), config)


def _check_config(config: LoraConfig) -> None:
    lora = require("peft")
    if not isinstance(config, lora.LoraConfig):
        raise ValueError(f"config is a {type(config).__name__}, expected a peft.LoraConfig")
    if config.init_lora_weights is not True:
        raise ValueError(f"init_lora_weights is {config.init_lora_weights!r}, expected True")
    usual = lora.LoraConfig()
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name not in KNOWN_FIELDS and value != getattr(usual, field.name):
            raise ValueError(
                f"{field.name} is {value!r}, expected {getattr(usual, field.name)!r}: "
                "LoRA experts do not support it"
            )


def _skeleton(model: nn.Module) -> nn.Module:
    """Copy the structure of `model`, its tensors on the meta device."""
    tensors = (*model.parameters(), *model.buffers())
    memo: dict[int, object] = {
        id(t): nn.Parameter(t.detach().to("meta"), False)
        if isinstance(t, nn.Parameter)
        else t.to("meta")
        for t in tensors
    }
    return copy.deepcopy(model, memo)


def _linear_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if name and _is_linear(module)]


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def _is_conv1d(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def _any_matches(wanted: Iterable[str], names: list[str]) -> bool:
    return any(name == w or name.endswith(f".{w}") for name in names for w in wanted)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
