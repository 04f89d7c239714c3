"""What was learnt, as a folder that transformers or PEFT load without this package."""

from __future__ import annotations

import copy
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from flwr.app import Array, ArrayRecord
from numpy.typing import NDArray
from torch import Tensor, nn

from flwr_moe._lazy import require
from flwr_moe.arrays import tensors_of
from flwr_moe.report.shards import MAX_SHARD_BYTES, write_shards

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

State = ArrayRecord | Mapping[str, Tensor | NDArray[Any]]

_LAYER = re.compile(r".*?\.\d+\.")


def save_pretrained_model(
    model: nn.Module,
    arrays: State,
    folder: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> list[Path]:
    """Write a federated model so that ``from_pretrained`` of transformers loads it.

    The folder gets ``config.json``, ``generation_config.json`` where the model generates text, and
    safetensors with the names that checkpoints of its kind have on the Hugging Face Hub, which may
    differ from those in memory (experts fused or one by one). Tensors are taken from `arrays`,
    converted and written layer by layer. The config is written last: a folder with one is complete.

    A mixture of LoRA experts is written by :func:`~flwr_moe.lora.io.save_experts` instead:
    every expert a folder that PEFT loads.

    Parameters
    ----------
    model : nn.Module
        A model of transformers, on the meta device too; or a module around a single such model
        that has no tensors of its own; or a mixture of LoRA experts, which is left with `arrays`
        loaded.
    arrays : ArrayRecord or mapping
        The state of `model`, such as ``result.arrays``.
    folder : path
        Made if it does not exist.
    tokenizer : PreTrainedTokenizerBase, optional
        Written beside the model.
    max_shard_bytes : int
        Largest sum of a file's tensors; not for LoRA.

    Returns
    -------
    list of Path
        The files with tensors.

    Raises
    ------
    ValueError
        If the model is of neither kind, or a tensor is missing, unknown or of another shape.
    ResultsError
        If the folder holds a model.

    Notes
    -----
    Source: ours. Takes version 5 of transformers.
    """
    mixture = next((m for m in model.modules() if "lora_mixture" in vars(m)), None)
    inner, prefix = _pretrained(model) if mixture is None else (None, "")
    _check(model, arrays)
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    if inner is None:
        files = _save_mixture(model, mixture, arrays, target)
    else:
        files = write_shards(
            target, _checkpoint(inner, arrays, prefix), max_shard_bytes=max_shard_bytes
        )
        if inner.can_generate():
            inner.generation_config.save_pretrained(str(target))
        config = copy.deepcopy(inner.config)
        config.architectures = [type(inner).__name__]
        config.dtype = _float_dtype(arrays)
        config.save_pretrained(str(target))
    if tokenizer is not None:
        tokenizer.save_pretrained(str(target))
    return files


def _save_mixture(
    model: nn.Module, mixture: nn.Module | None, arrays: State, target: Path
) -> list[Path]:
    # Imported late: only mixtures need PEFT.
    from flwr_moe.lora.io import save_experts

    if mixture is not model:
        raise ValueError(
            f"{type(model).__name__} is a module around a mixture of LoRA experts, "
            "expected the mixture and its own arrays"
        )
    model.load_state_dict({key: _tensor(arrays[key]) for key in arrays})
    save_experts(model, target)
    return sorted(target.rglob("*.safetensors"))


def _pretrained(model: nn.Module) -> tuple[PreTrainedModel, str]:
    """Find the model of transformers, and what stands before its tensors' names."""
    pretrained_model = require("transformers").PreTrainedModel
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, pretrained_model):
            others = [key for key in model.state_dict() if not key.startswith(prefix)]
            if others:
                raise ValueError(
                    f"{type(model).__name__} has {others[0]!r} beside {name!r}, expected a module "
                    "around one model of transformers and nothing else"
                )
            return module, prefix
    raise ValueError(
        f"{type(model).__name__} is no model of transformers and no mixture of LoRA experts"
    )


def _check(model: nn.Module, arrays: State) -> None:
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    for key in [*expected, *arrays]:
        shape = tuple(arrays[key].shape) if key in arrays else None
        if shape != expected.get(key):
            raise ValueError(f"array {key!r} has shape {shape}, expected {expected.get(key)}")


def _checkpoint(model: PreTrainedModel, arrays: State, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Tensors under their names in checkpoints, one layer of the model in memory at a time."""
    from transformers.core_model_loading import revert_weight_conversion

    # A tied tensor is saved once, under the name it is tied to.
    left_out = {
        *getattr(model, "all_tied_weights_keys", {}),
        *(model._keys_to_ignore_on_save or ()),
    }
    layers: dict[str, list[str]] = {}
    for key in arrays:
        name = key.removeprefix(prefix)
        if name not in left_out:
            layer = _LAYER.match(name)
            layers.setdefault(layer[0] if layer else "", []).append(name)
    for names in layers.values():
        state = {name: _tensor(arrays[prefix + name]) for name in names}
        yield from revert_weight_conversion(model, state).items()
        del state


def _tensor(values: Array | Tensor | NDArray[Any]) -> Tensor:
    if isinstance(values, Array):
        return tensors_of(ArrayRecord({"it": values}))["it"]
    return torch.as_tensor(values)


def _float_dtype(arrays: State) -> str:
    """Return the dtype of the largest floating-point array."""
    floats = [key for key in arrays if "float" in str(arrays[key].dtype)]
    largest = max(floats, key=lambda key: math.prod(arrays[key].shape))
    return str(arrays[largest].dtype).removeprefix("torch.")
