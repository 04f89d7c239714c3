"""One client's experts with their gate rows: taking a state apart, and mixing with peers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from flwr_moe.experts.layout import ExpertLayout, part_name
from flwr_moe.experts.mixing_plan import Ingredient

ExpertSet = dict[tuple[int, int], dict[str, Tensor]]
"""Tensors by (layer, expert): the expert's parts, and its gate rows as ``gate.0``, ``gate.1`` …"""

Fetch = Callable[[int, int, int], "dict[str, Tensor] | None"]
"""``(peer, layer, expert)`` to that expert's tensors, None if it cannot be had."""


def split_state(
    layout: ExpertLayout, state: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], ExpertSet]:
    """Take a full state apart.

    Parameters
    ----------
    layout : ExpertLayout
        Of the model.
    state : mapping
        Its full state dict.

    Returns
    -------
    rest : dict
        Everything that is no expert's, gates included.
    experts : ExpertSet
        Every expert with a copy of its gate rows.
    """
    rest = layout.shared(state)
    experts: ExpertSet = {}
    for layer, (count, keys) in enumerate(zip(layout.layers, layout.gate_rows, strict=True)):
        for e in range(count):
            taken = layout.take(state, {layer: [e]})
            expert = {name: taken[part_name(layer, e, name)] for name in _parts(layout, layer)}
            for i, key in enumerate(keys):
                expert[f"gate.{i}"] = state[key][e].clone()
            experts[layer, e] = expert
    return rest, experts


def mix_experts(
    plan: Sequence[Ingredient], own: ExpertSet, me: int, fetch: Fetch, mix_gates: bool
) -> tuple[ExpertSet, int]:
    """Replace experts by weighted sums of themselves and peers' experts.

    Parameters
    ----------
    plan : sequence of Ingredient
        What goes into which expert; experts that no share names stay as they are.
    own : ExpertSet
        The client's experts; not changed.
    me : int
        The client's partition id: shares of this peer are taken from ``own``.
    fetch : callable
        Gives a peer's expert. Called once for each, one expert at a time.
    mix_gates : bool
        Whether gate rows are mixed too, or stay the client's own.

    Returns
    -------
    mixed : ExpertSet
        Sums in double precision, cast back. Where a peer's expert is missing, or does not fit,
        the weights of the others are scaled up to one.
    lost : int
        Peers' experts that were missing or did not fit.

    Notes
    -----
    Source: FedMoE-DA, Eq. 11; the renormalisation is ours.
    """
    mixed: ExpertSet = {}
    # By what is fetched, so that an expert that goes into several is fetched once and let go.
    order = sorted(plan, key=lambda s: (s.peer, s.layer, s.peer_expert, s.expert))
    sums: dict[tuple[int, int], dict[str, Tensor]] = {}
    totals: dict[tuple[int, int], float] = {}
    last: tuple[int, int, int] | None = None
    came: dict[str, Tensor] | None = None
    lost = 0
    for share in order:
        where = share.layer, share.expert
        source = share.peer, share.layer, share.peer_expert
        if source != last:
            last = source
            if share.peer == me:
                came = own[share.layer, share.peer_expert]
            else:
                came = fetch(*source)
                if came is None or not _fits(came, own[where]):
                    came, lost = None, lost + 1
        if came is None:
            continue
        into = sums.setdefault(where, {})
        totals[where] = totals.get(where, 0.0) + share.weight
        for name, tensor in came.items():
            term = share.weight * tensor.double()
            into[name] = into[name] + term if name in into else term
    for where, expert in own.items():
        if where not in sums or not totals[where] > 0:
            mixed[where] = dict(expert)
            continue
        scale = 1.0 / totals[where]
        mixed[where] = {
            name: (sums[where][name] * scale).to(tensor.dtype)
            if mix_gates or not name.startswith("gate.")
            else tensor
            for name, tensor in expert.items()
        }
    return mixed, lost


def _fits(came: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> bool:
    return came.keys() == own.keys() and all(
        came[name].shape == own[name].shape and bool(torch.isfinite(came[name]).all())
        for name in own
    )


def _parts(layout: ExpertLayout, layer: int) -> Sequence[str]:
    return list(layout.moe_layers[layer].parts)
