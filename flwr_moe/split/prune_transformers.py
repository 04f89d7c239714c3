"""Prunable units of transformer blocks, found by the names of their layers.

Knows the layer names of BERT, GPT-2, Llama and torch's own encoder layer, and so of the many
models built like them. No transformers import: what counts are names and shapes.
"""

from __future__ import annotations

from torch import nn

from flwr_moe.split.prune_groups import Cut, PruneGroup, keys_of

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
        makers = [_join(block, name) for name in short_names]
        reader = _join(block, short_reader)
        makes = {_sizes(module, maker) for maker in makers}
        made, read = makes.pop(), _sizes(module, reader)
        if makes or made is None or read is None or made[1] != read[0]:
            continue
        cuts = [_out_cuts(module, maker) for maker in makers]
        scored = tuple(cut[0] for cut in cuts)
        every = (*(c for cut in cuts for c in cut), _in_cut(module, reader))
        groups.append(PruneGroup(makers[0], "hidden", made[1], scored, every))
    return groups


def _attention(module: nn.Module, block: str) -> list[PruneGroup]:
    groups = []
    for short_names, short_reader, short_owner in ATTENTION_NAMES:
        makers = [_join(block, name) for name in short_names]
        reader, owner = _join(block, short_reader), _join(block, short_owner)
        sizes = [_sizes(module, name) for name in (*makers, reader)]
        head = _head_size(module, owner)
        if None in sizes or head is None:
            continue
        (_, query), (_, key), (_, value), (read, _) = (size for size in sizes if size is not None)
        units = key // head
        if not units or key % head or key != value or query % key or query != read:
            continue
        widths = (query // units, head, head)
        cuts = [_out_cuts(module, n, width=w) for n, w in zip(makers, widths, strict=True)]
        scored = tuple(cut[0] for cut in cuts)
        every = (*(c for cut in cuts for c in cut), _in_cut(module, reader, width=widths[0]))
        attributes = _attributes(module, owner)
        groups.append(PruneGroup(owner, "heads", units, scored, every, None, attributes))
    return groups


def _fused(module: nn.Module, block: str) -> list[PruneGroup]:
    """Heads of GPT-2: one layer makes all queries, then all keys, then all values."""
    maker, reader = _join(block, "c_attn"), _join(block, "c_proj")
    made, read, head = _sizes(module, maker), _sizes(module, reader), _head_size(module, block)
    if made is None or read is None or head is None or read[0] % head or made[1] != 3 * read[0]:
        return []
    cuts = _out_cuts(module, maker, width=head, repeats=3)
    every = (*cuts, _in_cut(module, reader, width=head))
    attributes = _attributes(module, block)
    units = read[0] // head
    return [PruneGroup(block, "heads", units, (cuts[0],), every, None, attributes)]


def _join(block: str, name: str) -> str:
    return ".".join(part for part in (block, name) if part)


def _find(module: nn.Module, name: str) -> nn.Module | None:
    try:
        return module.get_submodule(name)
    except AttributeError:
        return None


def _transposed(layer: nn.Module) -> bool:
    return type(layer).__name__ == "Conv1D"


def _sizes(module: nn.Module, name: str) -> tuple[int, int] | None:
    """Return inputs and outputs of a linear layer, None for anything else."""
    layer = _find(module, name)
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    if layer is not None and _transposed(layer):
        weight = layer.get_parameter("weight")
        return weight.shape[0], weight.shape[1]
    return None


def _out_cuts(module: nn.Module, name: str, width: int = 1, repeats: int = 1) -> list[Cut]:
    """Cuts of a layer's outputs, its weight first."""
    weight_dim = 1 if _transposed(module.get_submodule(name)) else 0
    dims = (weight_dim, 0)
    return [
        Cut(key, d, width, repeats) for key, d in zip(keys_of(module, name), dims, strict=False)
    ]


def _in_cut(module: nn.Module, name: str, width: int = 1) -> Cut:
    return Cut(f"{name}.weight", 0 if _transposed(module.get_submodule(name)) else 1, width)


def _head_size(module: nn.Module, name: str) -> int | None:
    owner = _find(module, name)
    for attribute in ("attention_head_size", "head_dim"):
        size = getattr(owner, attribute, None)
        if isinstance(size, int) and size > 0:
            return size
    return None


def _attributes(module: nn.Module, name: str) -> dict[str, tuple[str, ...]]:
    owner = module.get_submodule(name)
    return {name: tuple(a for a in COUNTS if isinstance(getattr(owner, a, None), int))}
