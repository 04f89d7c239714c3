"""Cutting a model in two, pruning its client half, and codecs for the cut."""

from flwr_moe.split.codecs import (
    Chain,
    Codec,
    CodecKey,
    Encoded,
    Passthrough,
    Quantise,
    RandomDropout,
    cut_codecs,
    wire_bytes,
)
from flwr_moe.split.prune import Kept, expand, put_back, shrink, take
from flwr_moe.split.prune_choice import choose_kept, find_groups
from flwr_moe.split.prune_schedule import PruneSchedule, magnitude_mask

__all__ = [
    "Chain",
    "Codec",
    "CodecKey",
    "Encoded",
    "Kept",
    "Passthrough",
    "PruneSchedule",
    "Quantise",
    "RandomDropout",
    "choose_kept",
    "cut_codecs",
    "expand",
    "find_groups",
    "magnitude_mask",
    "put_back",
    "shrink",
    "take",
    "wire_bytes",
]
