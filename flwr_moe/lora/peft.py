"""Layouts of PEFT's own models: named adapters as experts, and LoRA on fused experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from flwr_moe._lazy import require
from flwr_moe.experts.layout import ExpertLayout, Experts, State
from flwr_moe.experts.moe_layer import MoELayer, TensorSpec


@dataclass(frozen=True)
class PeftLayer(MoELayer):
    """Experts whose tensors' names in the state follow no common prefix.

    Attributes
    ----------
    keys : dict of str to tuple of str
        Names in the state by part: one for each expert, or a single one if they are fused.
    """

    keys: dict[str, tuple[str, ...]]

    def state_key(self, expert: int, part: str) -> str:
        """Name in the state of the tensor that holds `part` of `expert`."""
        return self.keys[part][0 if self.fused else expert]


@dataclass(frozen=True)
class PeftLayout(ExpertLayout):
    """Layout of a PEFT model, whose experts are cut out of its state only.

    PEFT's models have no gate that this layout knows, so `gate_rows` is empty for every layer,
    and a submodel cannot be cut; PEFT's own ``delete_adapter`` makes a model smaller.
    """

    def submodel(self, model: nn.Module, experts: Experts) -> nn.Module:
        """Refuse: a PEFT model cannot be cut by its layout.

        Raises
        ------
        ValueError
            Always.
        """
        raise ValueError(
            "a PEFT model has no gate to cut, expected a model of add_lora_experts "
            "(PEFT's delete_adapter removes the adapters of other experts)"
        )


@dataclass(frozen=True)
class FusedPeftLayout(PeftLayout):
    """Layout of LoRA on fused experts: PEFT keeps the adapters of all experts in two matrices.

    ``lora_A`` is (E * r, in) with an expert's rows side by side; ``lora_B`` is (out, r * E) with
    the experts running fastest, so that expert e owns every E-th column from e on. `take`, `put`
    and the other methods read and write states as PEFT has them.
    """

    def take(self, state: State, experts: Experts) -> dict[str, Any]:
        """Copy the adapters of `experts` out of `state`; see `ExpertLayout.take`."""
        return super().take(self._stacked(state), experts)

    def put(self, state: State, part: State) -> dict[str, Any]:
        """Return `state` with the adapters of `part` in place; see `ExpertLayout.put`."""
        stacked = self._stacked(state)
        new = super().put(stacked, part)
        for key, tensor in new.items():
            new[key] = state[key] if tensor is stacked[key] else self._flat(key, tensor)
        return new

    def to_submodel_state(self, shared: State, part: State, experts: Experts) -> dict[str, Any]:
        """Refuse: there is no submodel, see `submodel`."""
        raise ValueError("a PEFT model has no submodel, expected a model of add_lora_experts")

    def from_submodel_state(self, sub_state: State, experts: Experts) -> dict[str, Any]:
        """Refuse: there is no submodel, see `submodel`."""
        raise ValueError("a PEFT model has no submodel, expected a model of add_lora_experts")

    def _stacked(self, state: State) -> dict[str, Any]:
        """View the state's adapters as (E, r, in) and (E, out, r)."""
        new = dict(state)
        for layer in self.moe_layers:
            for part, spec in layer.parts.items():
                key = layer.state_key(0, part)
                if key not in new:
                    continue
                rows, columns, count = *spec.shape, layer.num_experts
                is_a = part.endswith("lora_A")
                flat = (count * rows, columns) if is_a else (rows, columns * count)
                if tuple(new[key].shape) != flat:
                    raise ValueError(f"{key} has shape {tuple(new[key].shape)}, expected {flat}")
                if is_a:
                    new[key] = new[key].reshape(count, rows, columns)
                else:
                    new[key] = _moved(new[key].reshape(rows, columns, count), 2, 0)
        return new

    def _flat(self, key: str, tensor: Any) -> Any:
        if ".lora_A." in key:
            return tensor.reshape(-1, tensor.shape[-1])
        return _moved(tensor, 0, 2).reshape(tensor.shape[1], -1)


def peft_layout(model: nn.Module, adapter_names: Sequence[str]) -> PeftLayout:
    """Layout of a PEFT model whose experts are several LoRA adapters of their own names.

    Every adapted layer is a layer of experts; expert e is the adapter ``adapter_names[e]``, with
    parts ``lora_A`` and ``lora_B`` (and ``lora_B_bias`` where adapters have one). Copies of
    ``modules_to_save``, one an adapter, are layers of experts, too. Nothing else travels: the
    base is no part of `shared_specs`, and without a gate there are no gate rows.

    Parameters
    ----------
    model : peft.PeftModel
        With all these adapters.
    adapter_names : sequence of str
        Names of the adapters, in the order of the experts.

    Raises
    ------
    ValueError
        If an adapter does not exist, is named twice, or the adapters differ in layers or rank.
    """
    peft = require("peft")
    names = list(adapter_names)
    known = list(getattr(model, "peft_config", {}))
    unknown = [name for name in names if name not in known]
    if unknown or not names or len(set(names)) < len(names):
        raise ValueError(f"adapter_names is {names}, expected different ones of {known}")
    state = model.state_dict()
    layers = []
    for block, module in model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            parts = {"lora_A": "lora_A.{}.weight", "lora_B": "lora_B.{}.weight"}
            if f"{block}.lora_B.{names[0]}.bias" in state:
                parts["lora_B_bias"] = "lora_B.{}.bias"
        elif isinstance(module, peft.utils.ModulesToSaveWrapper):
            homes = [f"{block}.modules_to_save.{name}." for name in names]
            inner = {key.removeprefix(h): 0 for h in homes for key in state if key.startswith(h)}
            parts = {part: f"modules_to_save.{{}}.{part}" for part in inner}
        else:
            continue
        keys = {
            part: tuple(f"{block}.{pattern.format(name)}" for name in names)
            for part, pattern in parts.items()
        }
        layers.append(_layer(block, len(names), False, keys, _specs(state, keys)))
    return PeftLayout(tuple(layers), {})


def fused_peft_layout(model: nn.Module, adapter_name: str = "default") -> FusedPeftLayout:
    """Layout of LoRA on the fused experts of an MoE model (PEFT's ``target_parameters``).

    One layer for each module of experts; its parts are named by the parameter, for example
    ``gate_up_proj.lora_A``. States are those of ``model.state_dict()``. Other adapters of the
    same name (attention layers, say) are shared; base and gates stay where they are, so there
    are no gate rows.

    Parameters
    ----------
    model : peft.PeftModel
        With LoRA on parameters (E, …).
    adapter_name : str
        Name of the adapter.

    Raises
    ------
    ValueError
        If the adapter has no LoRA on fused experts.
    """
    peft = require("peft")
    wrapper_type = peft.tuners.lora.layer.ParamWrapper
    state = model.state_dict()
    found: dict[int, tuple[str, int, dict[str, tuple[str, ...]], dict[str, TensorSpec]]] = {}
    for block, module in model.named_modules():
        if not isinstance(module, wrapper_type) or adapter_name not in module.lora_A:
            continue
        count, rank = module.num_experts, module.r[adapter_name]
        if count < 2:
            continue
        # Several parameters of one module are wrapped one around the other.
        home = found.setdefault(id(module.get_base_layer()), (block, count, {}, {}))
        for part, shape in (
            ("lora_A", (rank, module.in_features)),
            ("lora_B", (module.out_features, rank)),
        ):
            key = f"{block}.{part}.{adapter_name}.weight"
            name = f"{module.parameter_name}.{part}"
            home[2][name] = (key,)
            home[3][name] = TensorSpec(shape, TensorSpec.of(state[key]).nbytes // count)
    if not found:
        raise ValueError(
            f"adapter {adapter_name!r} has no LoRA on fused experts, expected a LoraConfig with "
            "target_parameters such as 'mlp.experts.gate_up_proj'"
        )
    layers = tuple(
        _layer(block, count, True, keys, specs) for block, count, keys, specs in found.values()
    )
    own = {layer.state_key(0, part) for layer in layers for part in layer.parts}
    shared = {
        key: TensorSpec.of(tensor)
        for key, tensor in state.items()
        if key not in own and f".{adapter_name}." in key
    }
    return FusedPeftLayout(layers, shared)


def _layer(
    block: str,
    num_experts: int,
    fused: bool,
    keys: dict[str, tuple[str, ...]],
    specs: dict[str, TensorSpec],
) -> PeftLayer:
    """Describe experts without a gate, and so without rows, router and family."""
    return PeftLayer(block, block, "", num_experts, fused, specs, (), "", "", "", keys)


def _specs(state: Mapping[str, Any], keys: Mapping[str, Sequence[str]]) -> dict[str, TensorSpec]:
    specs = {}
    for part, of_experts in keys.items():
        found = [TensorSpec.of(state[key]) if key in state else None for key in of_experts]
        odd = next((i for i, spec in enumerate(found) if spec is None or spec != found[0]), None)
        if odd is not None or found[0] is None:
            key, spec = of_experts[odd or 0], found[odd or 0]
            has = f"has shape {spec.shape}" if spec else "is missing"
            raise ValueError(f"{key} {has}, expected one as {of_experts[0]}")
        specs[part] = found[0]
    return specs


def _moved(tensor: Any, source: int, target: int) -> Any:
    if isinstance(tensor, torch.Tensor):
        return tensor.movedim(source, target)
    return np.moveaxis(tensor, source, target)
