"""Running a model on shapes alone, and what passes through it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

ExampleInputs = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]


class Passed(NamedTuple):
    """What a module gave, and the forward FLOPs of the model up to and including it."""

    output: Any
    flops: int


def as_call(inputs: ExampleInputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return example inputs as positional and keyword arguments.

    A mapping gives keyword arguments, a tuple or list positional ones, anything else is the only
    argument.
    """
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)), {}


def unused_arguments(model: nn.Module, inputs: ExampleInputs | None) -> dict[str, Any]:
    """Return the defaults of the optional arguments that the example does not give.

    Raises
    ------
    ValueError
        If the example does not fit the model's forward pass.
    """
    signature = inspect.signature(model.forward)
    given: set[str] = set()
    if inputs is not None:
        args, kwargs = as_call(inputs)
        try:
            given = set(signature.bind(*args, **kwargs).arguments)
        except TypeError as error:
            raise ValueError(f"example_inputs do not fit the model: {error}") from error
    return {
        name: parameter.default
        for name, parameter in signature.parameters.items()
        if name not in given and parameter.default is not parameter.empty
    }


def meta_twin(model: nn.Module) -> nn.Module:
    """Copy a model without its data: the same modules, with tensors on the meta device."""
    memo: dict[int, Any] = {}
    for tensor in chain(model.parameters(), model.buffers()):
        empty = torch.empty_like(tensor, device="meta", requires_grad=False)
        if isinstance(tensor, nn.Parameter):
            empty = nn.Parameter(empty, tensor.requires_grad)
        memo[id(tensor)] = empty
    return copy.deepcopy(model, memo)


def run_recorded(
    model: nn.Module, names: Iterable[str], example_inputs: ExampleInputs
) -> dict[str, Passed]:
    """Run one forward pass on a copy of the model and record the named modules.

    The pass runs on the meta device, where only shapes are computed. A model whose forward needs
    the values (routing, for example) is run on a real copy instead, if it has values.

    Parameters
    ----------
    model : nn.Module
        Left as it is, running statistics included.
    names : iterable of str
        Modules to record, by their dotted names; the empty name is the whole model.
    example_inputs : Tensor, sequence or mapping
        See `as_call`.

    Raises
    ------
    ValueError
        If the inputs do not go through the model.
    """
    names = list(names)
    args, kwargs = as_call(example_inputs)
    try:
        twin = meta_twin(model)
        for module in twin.modules():
            if hasattr(getattr(module, "config", None), "_attn_implementation"):
                module.register_forward_pre_hook(_whole_mask, with_kwargs=True)
        return _run_recorded(twin, names, _to_meta(args), _to_meta(kwargs))
    except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError) as first:
        error: Exception = first
    if not any(tensor.is_meta for tensor in model.parameters()):
        try:
            return _run_recorded(copy.deepcopy(model), names, args, kwargs)
        except (RuntimeError, TypeError, ValueError, IndexError) as second:
            error = second
    reason = str(error).strip().split("\n")[0]
    raise ValueError(f"example_inputs do not go through the model: {reason}") from error


def _run_recorded(
    model: nn.Module, names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Passed]:
    passed: dict[str, Passed] = {}
    counter = FlopCounterMode(display=False)

    def recorder(name: str) -> Any:
        def record(_module: nn.Module, _args: Any, output: Any) -> None:
            passed[name] = Passed(output, counter.get_total_flops())

        return record

    for name in names:
        model.get_submodule(name).register_forward_hook(recorder(name))
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation"):
            # The others look at the values of the attention mask; the work is the same.
            config._attn_implementation = "eager"
    with counter, torch.no_grad():
        model(*args, **kwargs)
    return passed


def _whole_mask(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Spell out an attention mask (B, T) of transformers as (B, 1, T, T), which it takes as is."""
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        whole = mask[:, None, None, :].expand(-1, 1, mask.shape[1], -1)
        return args, {**kwargs, "attention_mask": whole}
    return args, kwargs


def _to_meta(value: Any) -> Any:
    return tree_map(lambda leaf: leaf.to("meta") if isinstance(leaf, Tensor) else leaf, value)
