"""Which units of a module can be removed together, and which tensors they cut.

A unit is a channel, a hidden unit or an attention head. Plain layers are found by following the
data through the module's graph; transformer blocks by the names of their layers.
"""

from __future__ import annotations

import operator
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

Kind = Literal["channels", "hidden", "heads"]

CHANNELWISE: tuple[type[nn.Module], ...] = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Identity,
    nn.Dropout, nn.Dropout2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
)  # fmt: skip
CHANNELWISE_FUNCTIONS: frozenset[object] = frozenset(
    {
        functional.relu, functional.relu6, functional.leaky_relu, functional.elu, functional.gelu,
        functional.silu, functional.mish, functional.sigmoid, functional.tanh,
        functional.hardswish, functional.dropout, functional.dropout2d, functional.max_pool2d,
        functional.avg_pool2d, functional.adaptive_avg_pool2d, torch.max_pool2d, torch.relu,
        torch.sigmoid, torch.tanh, "relu", "relu_", "sigmoid", "tanh", "contiguous",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Cut:
    """How units lie along one dimension of one tensor of the state.

    The dimension reads (repeats, units, width): one unit's entries are `width` neighbours, found
    `repeats` times (three in fused query, key and value).
    """

    key: str
    dim: int
    width: int = 1
    repeats: int = 1

    def positions(self, units: Iterable[int], num_units: int) -> Tensor:
        """Return the sorted positions of `units` along the dimension, (n,) int64."""
        unit = torch.as_tensor(list(units), dtype=torch.int64)
        place = (
            torch.arange(self.repeats)[:, None, None] * num_units + unit[None, :, None]
        ) * self.width
        return (place + torch.arange(self.width)).reshape(-1)


@dataclass(frozen=True)
class PruneGroup:
    """Units that can go, each together with its entries in all `cuts`.

    Attributes
    ----------
    name : str
        Dotted name of the layer (or attention module) that makes the units.
    kind : {"channels", "hidden", "heads"}
        What a unit is.
    num_units : int
        Units of the whole module.
    scored : tuple of Cut
        Weights that make the units; their L2 norm is a unit's magnitude.
    cuts : tuple of Cut
        All tensors that get smaller, `scored` included.
    output_dim : int, optional
        If the units are (part of) the module's output: the dimension they lie along.
    attributes : dict of str to tuple of str
        Per module, plain numbers of it that shrink in proportion, such as ``num_heads``.
    """

    name: str
    kind: Kind
    num_units: int
    scored: tuple[Cut, ...]
    cuts: tuple[Cut, ...]
    output_dim: int | None = None
    attributes: dict[str, tuple[str, ...]] = field(default_factory=dict)


def keys_of(module: nn.Module, name: str) -> list[str]:
    """Names in the state of weight and bias of the layer `name`, as far as it has them."""
    layer = module.get_submodule(name)
    return [
        f"{name}.{part}" for part in ("weight", "bias") if layer._parameters.get(part) is not None
    ]


def find_groups(module: nn.Module, *, prune_output: bool = False) -> tuple[PruneGroup, ...]:
    """Find all units of `module` that can be removed without touching anything else.

    Channels of convolutions and hidden units of plain networks (through batch normalisation,
    activations, pooling and flattening), hidden units and attention heads of transformer blocks.
    What is read in any other way, added to something else or has tied weights is not offered.

    Parameters
    ----------
    module : nn.Module
        The client half: any module, an ``fx.GraphModule`` or a wrapper.
    prune_output : bool
        Also offer the units that are the module's output, which makes the activation at the cut
        smaller; the reader then needs `expand`.
    """
    state = module.state_dict()
    owners: dict[int, list[str]] = defaultdict(list)
    for name, parameter in module.named_parameters(remove_duplicate=False):
        owners[id(parameter)].append(name)
    tied = {name for names in owners.values() if len(names) > 1 for name in names}
    groups: list[PruneGroup] = []
    taken: set[tuple[str, int]] = set()
    for group in find_block_groups(module) + find_flow_groups(module):
        places = {(cut.key, cut.dim) for cut in group.cuts}
        known = all(cut.key in state and cut.key not in tied for cut in group.cuts)
        hidden = group.output_dim is None or prune_output
        if known and hidden and not places & taken:
            groups.append(group)
            taken |= places
    return tuple(groups)


def find_flow_groups(module: nn.Module) -> list[PruneGroup]:
    """Find channels and hidden units by following the graph of `module`.

    Offered are outputs of ``Conv2d`` and ``Linear`` layers used once, that reach ``Conv2d`` or
    ``Linear`` layers (or the output) through activations, pooling, dropout, batch normalisation
    and flattening only. A module that cannot be traced offers none.
    """
    try:
        graph = module.graph if isinstance(module, fx.GraphModule) else fx.Tracer().trace(module)
    except Exception:  # whatever a foreign forward raises on proxies: it cannot be followed
        return []
    used = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    read_directly = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    groups = []
    for node in graph.nodes:
        layer, kind = _layer(module, node), cast(Kind, "channels")
        if isinstance(layer, nn.Conv2d) and layer.groups == 1:
            num_units, dim = layer.out_channels, 1
        elif isinstance(layer, nn.Linear):
            num_units, dim, kind = layer.out_features, -1, "hidden"
        else:
            continue
        name, flow = str(node.target), _Flow(module, used, num_units)
        if used[name] > 1 or not flow.follow(node, dim):
            continue
        if not flow.consumed and flow.output_dim is None:
            continue
        made = [Cut(key, 0) for key in keys_of(module, name)]
        cuts = (*made, *flow.cuts)
        if not any(cut.key in read_directly for cut in cuts):
            groups.append(PruneGroup(name, kind, num_units, (made[0],), cuts, flow.output_dim))
    return groups


@dataclass
class _Flow:
    """Where the units of one producer are followed to."""

    module: nn.Module
    used: Counter[str]
    num_units: int
    cuts: list[Cut] = field(default_factory=list)
    output_dim: int | None = None
    consumed: bool = False

    def follow(self, node: fx.Node, dim: int) -> bool:
        """Follow units from `node`, lying along `dim`; False at anything unknown."""
        return all(self._step(node, user, dim) for user in node.users)

    def _step(self, node: fx.Node, user: fx.Node, dim: int) -> bool:
        if user.op == "output":
            self.output_dim = dim
            returned = user.args[0] if isinstance(user.args[0], tuple) else (user.args[0],)
            return dim != FLAT and [i for i, r in enumerate(returned) if r is node] == [0]
        if user.op == "call_module":
            return self._enter(user, dim)
        if user.target in CHANNELWISE_FUNCTIONS:
            pools = "pool" in getattr(user.target, "__name__", "")
            return (dim != FLAT or not pools) and self.follow(user, dim)
        if user.target in (torch.flatten, "flatten"):
            start = [*user.args[1:], *user.kwargs.values()]
            whole = dim == 1 and start == [1] and "end_dim" not in user.kwargs
            return whole and self.follow(user, FLAT)
        if user.target == "size":
            return user.args[1:] == (0,)
        if user.target is getattr:
            return user.args[1:] == ("shape",) and all(map(_is_batch_size, user.users))
        if user.target in ("view", "reshape") and dim == 1:
            whole = user.args[2:] == (-1,) and _is_batch_size(user.args[1])
            return whole and self.follow(user, FLAT)
        return False

    def _enter(self, user: fx.Node, dim: int) -> bool:
        """Go through a layer, or end at one that reads the units."""
        layer, name = _layer(self.module, user), str(user.target)
        if isinstance(layer, CHANNELWISE):
            # Pooling is per channel only where the channels are a dimension of their own.
            return (dim != FLAT or "Pool" not in type(layer).__name__) and self.follow(user, dim)
        if self.used[name] > 1:
            return False
        if isinstance(layer, nn.BatchNorm2d) and dim == 1:
            statistics = [
                k for k in ("running_mean", "running_var") if layer._buffers[k] is not None
            ]
            keys = keys_of(self.module, name) + [f"{name}.{k}" for k in statistics]
            self.cuts += [Cut(key, 0) for key in keys]
            return self.follow(user, dim)
        if isinstance(layer, nn.Flatten):
            ends = (layer.start_dim, layer.end_dim)
            return dim == 1 and ends == (1, -1) and self.follow(user, FLAT)
        if isinstance(layer, nn.Conv2d) and dim == 1 and layer.groups == 1:
            width = 1
        elif isinstance(layer, nn.Linear) and dim in (-1, FLAT):
            width, rest = divmod(layer.in_features, self.num_units)
            if rest or (width > 1 and dim != FLAT):
                return False
        else:
            return False
        self.cuts.append(Cut(f"{name}.weight", 1, width=width))
        self.consumed = True
        return True


FLAT = 0
"""Dimension that stands for channels flattened with their pixels: units first, pixels within."""


def _layer(module: nn.Module, node: fx.Node) -> nn.Module | None:
    return module.get_submodule(str(node.target)) if node.op == "call_module" else None


def _is_batch_size(value: object) -> bool:
    """Whether `value` is ``x.size(0)`` or ``x.shape[0]``."""
    if not isinstance(value, fx.Node) or value.args[1:] != (0,):
        return False
    source = value.args[0]
    of_shape = isinstance(source, fx.Node) and source.target is getattr
    return value.target == "size" or (value.target is operator.getitem and of_shape)


MLP_NAMES: tuple[tuple[tuple[str, ...], str], ...] = (
    (("intermediate.dense",), "output.dense"),
    (("c_fc",), "c_proj"),
    (("gate_proj", "up_proj"), "down_proj"),
    (("linear1",), "linear2"),
    (("lin1",), "lin2"),
)
"""Layers that make the hidden units, and the layer that reads them."""

ATTENTION_NAMES: tuple[tuple[tuple[str, str, str], str, str], ...] = (
    (("self.query", "self.key", "self.value"), "output.dense", "self"),
    (("q_proj", "k_proj", "v_proj"), "o_proj", ""),
)
"""Layers that make queries, keys and values, the layer that reads the heads, and the module that
knows the size of a head."""

COUNTS = ("num_heads", "num_attention_heads", "num_key_value_heads", "all_head_size", "split_size")
"""Attributes of attention modules that go down with the number of heads."""


def find_block_groups(module: nn.Module) -> list[PruneGroup]:
    """Find hidden units of MLP blocks and attention heads in `module`.

    Heads that share keys and values (grouped queries) are one unit.
    """
    groups = []
    for block, _ in module.named_modules():
        groups += _mlps(module, block) + _attention(module, block) + _fused(module, block)
    return groups


def _mlps(module: nn.Module, block: str) -> list[PruneGroup]:
    groups = []
    for short_names, short_reader in MLP_NAMES:
        makers, reader = [_join(block, name) for name in short_names], _join(block, short_reader)
        makes, read = {_sizes(module, maker) for maker in makers}, _sizes(module, reader)
        made = makes.pop()
        if not makes and made is not None and read is not None and made[1] == read[0]:
            widths = dict.fromkeys(makers, 1)
            groups.append(_group(module, makers[0], "hidden", made[1], widths, reader))
    return groups


def _attention(module: nn.Module, block: str) -> list[PruneGroup]:
    groups = []
    for short_names, short_reader, short_owner in ATTENTION_NAMES:
        makers, reader = [_join(block, name) for name in short_names], _join(block, short_reader)
        owner = _join(block, short_owner)
        sizes = [_sizes(module, name) for name in (*makers, reader)]
        head = _head_size(module, owner)
        if None in sizes or head is None:
            continue
        (_, query), (_, key), (_, value), (read, _) = (size for size in sizes if size is not None)
        units = key // head
        if not units or key % head or key != value or query % key or query != read:
            continue
        widths = dict(zip(makers, (query // units, head, head), strict=True))
        groups.append(_group(module, owner, "heads", units, widths, reader))
    return groups


def _fused(module: nn.Module, block: str) -> list[PruneGroup]:
    """Heads of GPT-2: one layer makes all queries, then all keys, then all values."""
    maker, reader = _join(block, "c_attn"), _join(block, "c_proj")
    made, read, head = _sizes(module, maker), _sizes(module, reader), _head_size(module, block)
    if made is None or read is None or head is None or read[0] % head or made[1] != 3 * read[0]:
        return []
    return [_group(module, block, "heads", read[0] // head, {maker: head}, reader, repeats=3)]


def _group(
    module: nn.Module,
    name: str,
    kind: Kind,
    units: int,
    widths: Mapping[str, int],
    reader: str,
    repeats: int = 1,
) -> PruneGroup:
    """Units of a block: outputs of some linear layers, and as wide as of the first, read by one."""
    scored, cuts = [], []
    for maker, width in widths.items():
        dims = (1 if _transposed(module, maker) else 0, 0)
        places = zip(keys_of(module, maker), dims, strict=False)
        made = [Cut(key, dim, width, repeats) for key, dim in places]
        scored.append(made[0])
        cuts += made
    width = next(iter(widths.values()))
    cuts.append(Cut(f"{reader}.weight", 0 if _transposed(module, reader) else 1, width))
    attributes = {}
    if kind == "heads":
        owner = module.get_submodule(name)
        attributes = {name: tuple(a for a in COUNTS if isinstance(getattr(owner, a, None), int))}
    return PruneGroup(name, kind, units, tuple(scored), tuple(cuts), None, attributes)


def _join(block: str, name: str) -> str:
    return ".".join(part for part in (block, name) if part)


def _find(module: nn.Module, name: str) -> nn.Module | None:
    try:
        return module.get_submodule(name)
    except AttributeError:
        return None


def _transposed(module: nn.Module, name: str) -> bool:
    """Whether a layer's weight has its inputs first, as GPT-2's have."""
    return type(module.get_submodule(name)).__name__ == "Conv1D"


def _sizes(module: nn.Module, name: str) -> tuple[int, int] | None:
    """Return inputs and outputs of a linear layer, None for anything else."""
    layer = _find(module, name)
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    if layer is not None and _transposed(module, name):
        weight = layer.get_parameter("weight")
        return weight.shape[0], weight.shape[1]
    return None


def _head_size(module: nn.Module, name: str) -> int | None:
    owner = _find(module, name)
    for attribute in ("attention_head_size", "head_dim"):
        size = getattr(owner, attribute, None)
        if isinstance(size, int) and size > 0:
            return size
    return None
