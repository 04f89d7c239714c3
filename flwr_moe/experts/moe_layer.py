"""Finding the experts of one block and the gate beside them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from flwr_moe.experts.families import family_of

GATE_NAMES = ("gate", "router")


@dataclass(frozen=True)
class TensorSpec:
    """Shape and size in bytes of one tensor."""

    shape: tuple[int, ...]
    nbytes: int

    @classmethod
    def of(cls, tensor: Tensor) -> TensorSpec:
        """Describe `tensor`, which may be on the meta device."""
        return cls(tuple(tensor.shape), tensor.numel() * tensor.element_size())


@dataclass(frozen=True)
class MoELayer:
    """Where one layer's experts and gate are found in a model.

    Attributes
    ----------
    block, experts, gate : str
        Module names: of the block, its experts and its gate, whose weight has a row per expert
        (``block`` is ``""`` when the model itself is the block).
    num_experts : int
        Experts of this layer.
    fused : bool
        True when every expert is a slice along dim 0, false when it is a module of its own.
    parts : dict of str to TensorSpec
        Tensors of one expert, by the part of their stable names.
    gate_rows : tuple of str
        Names of the state's tensors that hold one row, along dim 0, per expert.
    router : str
        Module that decides by the gate; often the gate itself.
    family : str
        Kind of block, see `flwr_moe.experts.families`.
    child : str
        What stands before the number in the name of an expert that is a module (``expert_0``).
    """

    block: str
    experts: str
    gate: str
    num_experts: int
    fused: bool
    parts: dict[str, TensorSpec]
    gate_rows: tuple[str, ...]
    router: str
    family: str
    child: str

    def state_key(self, expert: int, part: str) -> str:
        """Name in the state of the tensor that holds `part` of `expert`."""
        return f"{self.experts if self.fused else self.module_key(expert)}.{part}"

    def module_key(self, expert: int) -> str:
        """Name of the module that is `expert`, for experts that are not fused."""
        return f"{self.experts}.{self.child}{expert}"

    def state_keys(self) -> Iterator[str]:
        """Names of all state tensors that hold experts of this layer."""
        for expert in range(1 if self.fused else self.num_experts):
            for part in self.parts:
                yield self.state_key(expert, part)


def read_block(name: str, block: nn.Module, num_experts: int | None = None) -> MoELayer:
    """Describe the block called `name`, which has a child ``experts``.

    Raises
    ------
    ValueError
        If the gate is missing or does not fit, or the experts do not look alike.
    """
    prefix = f"{name}." if name else ""
    where = f"block {name!r}" if name else "the model"
    family = family_of(block)
    names = (family.router,) if family.router else GATE_NAMES
    router_name = next((g for g in names if isinstance(block._modules.get(g), nn.Module)), None)
    if router_name is None:
        wanted = " or ".join(map(repr, names))
        raise ValueError(f"{where} has experts, but no child {wanted} beside them")
    gate_name = family.gate or router_name
    weight = block.get_submodule(gate_name).state_dict().get("weight")
    if weight is None or not weight.ndim:
        raise ValueError(
            f"{prefix}{gate_name} has no weight, expected one row per expert; a block of another "
            "kind is described by flwr_moe.experts.families.register_family"
        )

    experts = block.get_submodule("experts")
    fused = not isinstance(experts, nn.ModuleList | nn.ModuleDict)
    child, modules = ("", []) if fused else _numbered(f"{prefix}experts", experts)
    count = weight.shape[0] if fused else len(modules)
    for said, source in ((num_experts, "num_experts says"), (weight.shape[0], "its gate has")):
        if said is not None and count != said:
            raise ValueError(f"{prefix}experts holds {count} experts, but {source} {said}")
    if fused:
        parts = {
            part: TensorSpec.of(tensor[0])
            for part, tensor in experts.state_dict().items()
            if tensor.ndim and tensor.shape[0] == count
        }
    else:
        each = [{k: TensorSpec.of(t) for k, t in e.state_dict().items()} for e in modules]
        parts = each[0] if each else {}
        odd = next((i for i, other in enumerate(each) if other != parts), None)
        if odd is not None:
            raise ValueError(
                f"{prefix}experts.{odd} has tensors {_shapes(each[odd])}, "
                f"expected those of {prefix}experts.0: {_shapes(parts)}"
            )
    if not parts:
        raise ValueError(f"{prefix}experts has no tensor with one entry per expert ({count})")

    # A block may keep per-expert state of its own, such as a routing bias.
    router = block.get_submodule(router_name)
    rows = {f"{router_name}.{key}": tensor for key, tensor in router.state_dict().items()}
    kept = block.state_dict()
    rows |= {key: kept[key] for key in block._buffers if key in kept}
    gate_rows = tuple(prefix + k for k, t in rows.items() if t.ndim and t.shape[0] == count)
    return MoELayer(
        name,
        f"{prefix}experts",
        prefix + gate_name,
        count,
        fused,
        parts,
        gate_rows,
        prefix + router_name,
        family.name,
        child,
    )


def _numbered(name: str, experts: nn.Module) -> tuple[str, list[nn.Module]]:
    """Children called 0, 1, … or expert_0, expert_1, …; others, such as a dropout, are none."""
    found: dict[str, dict[int, nn.Module]] = {}
    for key, module in experts.named_children():
        match = re.fullmatch(r"(.*?)(\d+)", key)
        if match:
            found.setdefault(match[1], {})[int(match[2])] = module
    child, modules = next(iter(found.items()), ("", {}))
    if len(found) > 1 or sorted(modules) != list(range(len(modules))):
        keys = [key for key, _ in experts.named_children()]
        raise ValueError(f"{name} holds {keys}, expected experts numbered from 0")
    return child, [modules[e] for e in range(len(modules))]


def _shapes(parts: dict[str, TensorSpec]) -> dict[str, tuple[int, ...]]:
    return {name: spec.shape for name, spec in parts.items()}
