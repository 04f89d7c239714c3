"""Which tensors of a model belong to which expert: taking them out, putting them back.

A state is a mapping from the names of ``model.state_dict()`` to torch tensors or numpy arrays.
A part is a mapping from stable names, ``layer.{l}.expert.{e}.{part}``, to one expert's tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn

from flwr_moe.experts.moe_layer import MoELayer, TensorSpec, read_block
from flwr_moe.experts.submodel import build_submodel

Experts = Mapping[int, Sequence[int]] | Sequence[int]
"""Experts by layer, or one sequence that holds for every layer."""

State = Mapping[str, Any]

PART_NAME = re.compile(r"layer\.(\d+)\.expert\.(\d+)\.(.+)")


@dataclass(frozen=True)
class ExpertLayout:
    """Which tensors, or slices along dim 0, of a state belong to (layer, expert).

    Made by `ExpertLayout.of`; holds names, shapes and sizes only, so it can be pickled and used
    where the model is not. Everything that is no expert's is *shared*, the gates included.

    Attributes
    ----------
    moe_layers : tuple of MoELayer
        In the order of ``model.named_modules()``.
    shared_specs : dict of str to TensorSpec
        All shared tensors by their names in the state.
    """

    moe_layers: tuple[MoELayer, ...]
    shared_specs: dict[str, TensorSpec]

    @classmethod
    def of(cls, model: nn.Module, *, num_experts: int | None = None) -> ExpertLayout:
        """Find the experts of `model`: children named ``experts`` with a gate beside them.

        Experts are either an ``nn.ModuleList`` (or an ``nn.ModuleDict`` of numbered names) or a
        module with fused tensors whose dim 0 is the number of experts (3-D weights, 2-D biases).
        The gate is the sibling called ``gate`` or ``router``; its weight has one row per expert.
        `flwr_moe.experts.families` says which models of transformers are known, and how to add
        another kind. The model may be on the meta device.

        Parameters
        ----------
        model : nn.Module
            Any model with at least one such block.
        num_experts : int, optional
            What every layer is expected to hold; by default what the gates and lists say.

        Raises
        ------
        ValueError
            If the model has no experts, a block of transformers is of no known family, a gate is
            missing or does not fit, or the experts of one list differ in their tensors.
        """
        layers = tuple(
            read_block(name, block, num_experts)
            for name, block in model.named_modules()
            if isinstance(block._modules.get("experts"), nn.Module)
        )
        if not layers:
            raise ValueError(
                f"{type(model).__name__} has no experts: no child module named 'experts' found "
                "(expected an nn.ModuleList, or fused tensors, next to a 'gate' or 'router'); "
                "flwr_moe.lora.add_lora_experts gives a dense model LoRA experts"
            )
        of_experts = {key for layer in layers for key in layer.state_keys()}
        state = model.state_dict()
        shared = {k: TensorSpec.of(t) for k, t in state.items() if k not in of_experts}
        return cls(layers, shared)

    @property
    def layers(self) -> tuple[int, ...]:
        """Number of experts of each layer."""
        return tuple(layer.num_experts for layer in self.moe_layers)

    @property
    def num_layers(self) -> int:
        """Number of layers with experts."""
        return len(self.moe_layers)

    @property
    def gate_rows(self) -> tuple[tuple[str, ...], ...]:
        """Per layer, the shared tensors that hold one row per expert (gate weight and bias)."""
        return tuple(layer.gate_rows for layer in self.moe_layers)

    @cached_property
    def gate_keys(self) -> frozenset[str]:
        """All of `gate_rows`."""
        return frozenset(key for keys in self.gate_rows for key in keys)

    @property
    def all_experts(self) -> dict[int, list[int]]:
        """Every expert, by layer."""
        return {i: list(range(count)) for i, count in enumerate(self.layers)}

    def part_specs(self, experts: Experts) -> dict[str, TensorSpec]:
        """Return what is known of the tensors of `experts`, by their stable names."""
        return {
            part_name(i, e, name): spec
            for i, ids in enumerate(self.select(experts))
            for e in ids
            for name, spec in self.moe_layers[i].parts.items()
        }

    @cached_property
    def _expert_keys(self) -> frozenset[str]:
        return frozenset(key for layer in self.moe_layers for key in layer.state_keys())

    def select(self, experts: Experts, *, empty_ok: bool = True) -> list[list[int]]:
        """Check `experts` and write them out as one list per layer, in the order given.

        Raises
        ------
        ValueError
            If a layer or an expert does not exist or comes twice, or if a layer is left without
            experts and `empty_ok` is false.
        """
        if isinstance(experts, Mapping):
            unknown = [layer for layer in experts if layer not in range(self.num_layers)]
            if unknown:
                raise ValueError(
                    f"layer {unknown[0]} does not exist, expected 0 to {self.num_layers - 1}"
                )
            chosen = [[int(e) for e in experts.get(i, ())] for i in range(self.num_layers)]
        else:
            chosen = [[int(e) for e in experts] for _ in range(self.num_layers)]
        for i, (ids, count) in enumerate(zip(chosen, self.layers, strict=True)):
            outside = [e for e in ids if not 0 <= e < count]
            if outside:
                raise ValueError(f"layer {i} has no expert {outside[0]}, expected 0 to {count - 1}")
            if len(set(ids)) < len(ids):
                raise ValueError(f"layer {i}: experts {ids} name an expert twice")
            if not ids and not empty_ok:
                raise ValueError(f"layer {i} is left without experts, expected at least one")
        return chosen

    def take(self, state: State, experts: Experts) -> dict[str, Any]:
        """Copy the tensors of `experts` out of `state` under their stable names.

        Inverse of `put`. The tensors are copies, free of the (possibly huge) fused tensor.

        Raises
        ------
        ValueError
            If `experts` are unknown, or a tensor of `state` is missing or has another shape.
        """
        part: dict[str, Any] = {}
        for i, (layer, ids) in enumerate(zip(self.moe_layers, self.select(experts), strict=True)):
            part |= _copies(state, i, layer, {e: e for e in ids}, layer.num_experts)
        return part

    def put(self, state: State, part: State) -> dict[str, Any]:
        """Return a new state: `state` with the experts' tensors of `part` in their places.

        `state` is not changed; tensors that `part` does not touch are the same objects in both.
        Values take over the type and dtype of what they replace.

        Raises
        ------
        ValueError
            If a name of `part` is unknown or a shape is wrong; the line names the key, the shape
            and what was expected.
        """
        new = dict(state)
        for name, value in part.items():
            i, e, spec, key = self._find(name)
            if tuple(value.shape) != spec.shape:
                raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {spec.shape}")
            if key not in state:
                raise ValueError(f"state has no tensor {key!r}, expected one for {name}")
            if self.moe_layers[i].fused:
                if new[key] is state[key]:
                    new[key] = _copy(state[key])
                new[key][e] = _like(value, new[key])
            else:
                new[key] = _like(value, state[key])
        return new

    def shared(self, state: State) -> dict[str, Any]:
        """Everything in `state` that is no expert's, gates included; the same tensor objects."""
        return {key: value for key, value in state.items() if key not in self._expert_keys}

    def expert_bytes(self, experts: Experts | None = None) -> int:
        """Bytes of the tensors of `experts`; of all experts of all layers by default."""
        specs = self.part_specs(self.all_experts if experts is None else experts)
        return sum(spec.nbytes for spec in specs.values())

    def shared_bytes(self) -> int:
        """Bytes of all shared tensors, full gates included."""
        return sum(spec.nbytes for spec in self.shared_specs.values())

    def to_submodel_state(self, shared: State, part: State, experts: Experts) -> dict[str, Any]:
        """Put shared tensors and experts together as the state dict of ``submodel(experts)``.

        Parameters
        ----------
        shared : mapping
            As `shared` gives it: gates still have a row for every expert.
        part : mapping
            Stable names, holding at least `experts`.
        experts : Experts
            Expert ``experts[j]`` becomes expert j of the submodel.

        Raises
        ------
        ValueError
            If a tensor is missing or has the wrong shape, or a layer is left without experts.
        """
        chosen = self.select(experts, empty_ok=False)
        sub = dict(shared)
        for i, (layer, ids) in enumerate(zip(self.moe_layers, chosen, strict=True)):
            for key in layer.gate_rows:
                rows = _get(shared, key, self.shared_specs[key].shape)
                sub[key] = rows[ids]
            for name, spec in layer.parts.items():
                tensors = [_get(part, part_name(i, e, name), spec.shape) for e in ids]
                if layer.fused:
                    sub[layer.state_key(0, name)] = _stack(tensors)
                else:
                    sub |= {layer.state_key(j, name): t for j, t in enumerate(tensors)}
        return sub

    def from_submodel_state(self, sub_state: State, experts: Experts) -> dict[str, Any]:
        """Copy the experts out of a submodel's state, back under the full model's stable names.

        Raises
        ------
        ValueError
            If a tensor is missing or does not have the shape that `experts` imply.
        """
        chosen = self.select(experts, empty_ok=False)
        part: dict[str, Any] = {}
        for i, (layer, ids) in enumerate(zip(self.moe_layers, chosen, strict=True)):
            part |= _copies(sub_state, i, layer, {e: j for j, e in enumerate(ids)}, len(ids))
        return part

    def take_submodel(self, state: State, experts: Experts) -> dict[str, Any]:
        """State dict of ``submodel(experts)``, cut out of the full model's `state`."""
        return self.to_submodel_state(self.shared(state), self.take(state, experts), experts)

    def submodel(self, model: nn.Module, experts: Experts) -> nn.Module:
        """Build a model that holds only `experts`; see `submodel.build_submodel`."""
        return build_submodel(model, self.moe_layers, self.select(experts, empty_ok=False))

    def _find(self, name: str) -> tuple[int, int, TensorSpec, str]:
        match = PART_NAME.fullmatch(name)
        if match:
            i, e, part = int(match[1]), int(match[2]), match[3]
            if i < self.num_layers and e < self.layers[i] and part in self.moe_layers[i].parts:
                layer = self.moe_layers[i]
                return i, e, layer.parts[part], layer.state_key(e, part)
        known = sorted({part for layer in self.moe_layers for part in layer.parts})
        raise ValueError(
            f"unknown expert tensor {name!r}, expected layer.L.expert.E.PART with "
            f"{self.num_layers} layers of {list(self.layers)} experts and PART in {known}"
        )


def part_name(layer: int, expert: int, part: str) -> str:
    """Stable name under which an expert's tensor travels."""
    return f"layer.{layer}.expert.{expert}.{part}"


def _copies(
    state: State, i: int, layer: MoELayer, place_of: Mapping[int, int], held: int
) -> dict[str, Any]:
    """Copy layer ``i``'s experts out of a state that holds ``held``, each at its place there."""
    part = {}
    for e, place in place_of.items():
        for name, spec in layer.parts.items():
            expected = (held, *spec.shape) if layer.fused else spec.shape
            tensor = _get(state, layer.state_key(place, name), expected)
            part[part_name(i, e, name)] = _copy(tensor[place] if layer.fused else tensor)
    return part


def _get(state: State, key: str, shape: tuple[int, ...]) -> Any:
    if key not in state:
        raise ValueError(f"tensor {key!r} is missing, expected one of shape {shape}")
    if tuple(state[key].shape) != shape:
        raise ValueError(f"{key} has shape {tuple(state[key].shape)}, expected {shape}")
    return state[key]


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else np.array(value)


def _like(value: Any, target: Any) -> Any:
    """Copy `value` as the kind of array, dtype and device that `target` is."""
    value = value.detach().cpu() if isinstance(value, torch.Tensor) else np.array(value)
    if isinstance(target, torch.Tensor):
        return torch.as_tensor(value).to(target, copy=True)
    return np.array(value, dtype=target.dtype)


def _stack(values: list[Any]) -> Any:
    return torch.stack(values) if isinstance(values[0], torch.Tensor) else np.stack(values)
