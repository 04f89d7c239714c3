"""Training in less memory: half precision, and activations that are computed anew."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

TRAIN_DTYPES = ("float32", "bfloat16")


def check_train_dtype(dtype: str) -> None:
    """Raise ValueError unless models can be trained in this dtype."""
    if dtype not in TRAIN_DTYPES:
        raise ValueError(f"train-dtype is {dtype!r}, expected one of {', '.join(TRAIN_DTYPES)}")


def prepare(model: nn.Module, dtype: str = "float32", checkpointing: bool = False) -> nn.Module:
    """Make a model train in less memory, in place; before its submodel is built, or after.

    Parameters
    ----------
    model : nn.Module
        Real or on the meta device; a submodel that is built from it afterwards is prepared too.
    dtype : str
        ``"float32"`` leaves the model as it is. With ``"bfloat16"`` its parameters are kept and
        trained in half precision, and tables outside its state (positions) are kept so; other
        buffers (rotary frequencies, routing corrections), and normalisation by running statistics,
        stay as they are. Floating-point inputs are cast on their way in, an output that is a
        tensor is cast to float32. Of a LoRA mixture the frozen base is cast, and what is trained
        stays float32; a base that several models share is better loaded in half precision to
        begin with.
    checkpointing : bool
        Keep the activations between the layers of transformers' models only, and compute the
        others anew in the backward pass (gradient checkpointing; Chen et al. 2016).

    Returns
    -------
    nn.Module
        `model`.

    Raises
    ------
    ValueError
        If the dtype is unknown, or no part of the model can compute activations anew.

    Notes
    -----
    Source: ours. In bfloat16 a weight moves only by steps of more than 2^-9 of its size: small
    learning rates come to nothing. Every step allocates half of what it does in float32.
    """
    check_train_dtype(dtype)
    if dtype == "bfloat16":
        if any("submodels_share" in vars(module) for module in model.modules()):
            _halve_base(model)
        else:
            _halve_parameters(model)
        model.register_forward_pre_hook(_cast_inputs_to_half, with_kwargs=True)
        model.register_forward_hook(_cast_output_to_single)
    if checkpointing:
        _checkpoint(model)
    return model


def as_sent(state: Mapping[str, Tensor], sent: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give a trained state the dtypes of the state that was sent for training.

    In which dtype a device trains is its own affair: whoever sent float32 gets float32 back, and
    halves it again where the wire is half as wide. Nothing is lost on the way.
    """
    return {key: tensor.to(sent[key].dtype) for key, tensor in state.items()}


def _halve_parameters(model: nn.Module) -> None:
    halved: dict[int, nn.Parameter] = {}
    for module in _that_can_be_halved(model):
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_floating_point():
                half = nn.Parameter(parameter.detach().bfloat16(), parameter.requires_grad)
                # One tensor for tied parameters.
                module._parameters[name] = halved.setdefault(id(parameter), half)


def _halve_base(model: nn.Module) -> None:
    """Halve the frozen base of a LoRA mixture."""
    halved: dict[int, Tensor] = {}
    for module in _that_can_be_halved(model):
        for name in vars(module).get("submodels_share", ()):
            buffer = module.get_buffer(name)
            if buffer.is_floating_point():
                module._buffers[name] = halved.setdefault(id(buffer), buffer.bfloat16())
        # LoRA experts take any input; modules that are trained whole need that of their dtype.
        if module._parameters and not hasattr(module, "lora_A"):
            module.register_forward_pre_hook(_cast_inputs_to_own)


def _that_can_be_halved(model: nn.Module) -> Iterator[nn.Module]:
    """Modules but those with running statistics; tables of theirs have been halved."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            continue
        for name in module._non_persistent_buffers_set - set(
            vars(module).get("submodels_share", ())
        ):
            table = module._buffers[name]
            # Added to activations, they would make them single again; frequencies are 1-D.
            if table is not None and table.ndim > 1 and table.is_floating_point():
                module._buffers[name] = table.bfloat16()
        yield module


def _cast_inputs_to_half(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    half = torch.bfloat16
    return tuple(_cast(args, half)), dict(zip(kwargs, _cast(kwargs.values(), half), strict=True))


def _cast_inputs_to_own(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(_cast(args, next(module.parameters(recurse=False)).dtype))


def _cast_output_to_single(module: nn.Module, args: object, output: Any) -> Any:
    (cast,) = _cast([output], torch.float32)
    return cast


def _cast(values: Iterable[Any], dtype: torch.dtype) -> Iterable[Any]:
    for value in values:
        is_float = isinstance(value, Tensor) and value.is_floating_point()
        yield value.to(dtype) if is_float else value


def _checkpoint(model: nn.Module) -> None:
    found = 0
    inside: set[int] = set()
    for module in model.modules():
        # Newer versions of transformers have another name for it.
        enable = getattr(module, "activation_checkpointing_enable", None) or getattr(
            module, "gradient_checkpointing_enable", None
        )
        able = getattr(module, "supports_gradient_checkpointing", True)
        if enable is not None and able and id(module) not in inside:
            enable({"use_reentrant": False})
            inside |= {id(part) for part in module.modules()}
            found += 1
    if not found:
        raise ValueError(
            f"gradient-checkpointing is true and {type(model).__name__} has no part that can "
            "compute its activations anew, expected a model of transformers that supports it"
        )
