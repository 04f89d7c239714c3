"""Cutting a model in two, pruning its client half, and codecs for the cut."""

from typing import TYPE_CHECKING

from flwr_moe._lazy import lazy_exports

if TYPE_CHECKING:
    from flwr_moe.split.codecs import (
        Chain,
        Codec,
        CodecKey,
        Encoded,
        Passthrough,
        Quantise,
        RandomDropout,
        cut_codecs,
    )
    from flwr_moe.split.costs import CutCost, cut_table
    from flwr_moe.split.cut import Split, materialise, possible_cuts, split_in_three, split_model
    from flwr_moe.split.prune import Kept, PruneSchedule, choose_kept, expand, put_back, shrink
    from flwr_moe.split.prune_groups import find_groups

__getattr__, __dir__ = lazy_exports(__name__, __file__)
