"""EMS-FL: the question about a device's data, the training of its experts, and both answers.

A message brings the device's experts, what it lacks of the shared part, and a config record.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import ArrayRecord

from flwr_moe.arrays import arrays_of, record_of
from flwr_moe.experts import AffinitySum, ExpertLayout, GateStatistics, RandomFeatures
from flwr_moe.messages.base import Fields, Figures, key

TRAIN_EXPERTS, GATE_STATISTICS = "train.experts", "query.gate_statistics"
"""Types of the two messages."""
EXPERTS, SHARED, GATE = "experts", "shared", "gate"
"""Records of expert tensors by stable names (both ways), of shared ones, and of a gate report."""
TRAINED_SHARED = "trained-shared"
"""The shared layers in a reply; not the message's key, which brings other tensors."""
GATES = ("plain", "linear", "random-features")

Experts = dict[int, list[int]]
"""Experts by layer."""


@dataclass(frozen=True, kw_only=True)
class ExpertOrder(Fields):
    """What every message of EMS-FL says beside how to train.

    Attributes
    ----------
    experts : dict
        The device's experts by layer.
    gate : str
        The kind of gate, see :class:`~flwr_moe.strategies.EMSFL`.
    server_round : int
        Version of the model that the message brings.
    train_shared : bool
        Whether the shared layers are trained too, gates aside.
    extra : dict
        How to train.
    """

    experts: Experts
    gate: str = key(default=GATES[0], one_of=GATES)
    server_round: int = key(default=0, least=0)
    train_shared: bool = False
    extra: dict[str, Any] = key(factory=dict)

    def __post_init__(self) -> None:
        if not self.experts:
            raise ValueError("the message names no experts, expected 'experts.0' and so on")


@dataclass(frozen=True, kw_only=True)
class GateQuestion(ExpertOrder):
    """What the question about a device's data says more.

    Attributes
    ----------
    feature_seed, num_features, gamma : int, int, float, optional
        The random features that statistics are asked of.
    """

    feature_seed: int | None = key(default=None, least=0)
    num_features: int | None = key(default=None, least=1)
    gamma: float | None = key(default=None, above=0)

    @classmethod
    def of(cls, order: ExpertOrder, features: RandomFeatures | None) -> GateQuestion:
        """Make an order the question about data, and about some random features of them."""
        asked: dict[str, Any] = {}
        if features is not None:
            asked = {"feature_seed": features.seed, "num_features": features.num_features}
            asked["gamma"] = features.gamma
        return cls(**vars(order), **asked)

    def features(self, num_inputs: int) -> RandomFeatures:
        """Draw the features that both the server and all devices draw.

        Raises
        ------
        ValueError
            If the message does not say which.
        """
        if self.feature_seed is None or self.num_features is None or self.gamma is None:
            raise ValueError("'feature-seed', 'num-features' or 'gamma' is not in the message")
        return RandomFeatures(self.feature_seed, num_inputs, self.num_features, self.gamma)


@dataclass(frozen=True)
class GateFigures(Figures):
    """The metrics of a gate report.

    Attributes
    ----------
    num_examples : int
        Examples that were looked at.
    steps, steps_before : int
        Its cost in training steps: after the message came, and what could be done ahead of it.
    """

    num_examples: int = key(least=0)
    steps: int = key(least=0)
    steps_before: int = key(least=0)


@dataclass(frozen=True)
class GateReport:
    """What one device, or all of a cluster added up, tells about its data.

    Attributes
    ----------
    affinity : AffinitySum
        Gate probabilities of the warm-start gate.
    statistics : GateStatistics or None
        Feature statistics; None for the plain gate.
    """

    affinity: AffinitySum
    statistics: GateStatistics | None

    def to_record(self) -> ArrayRecord:
        """Write the report."""
        arrays: dict[str, Any] = {
            "affinity": self.affinity.sum_LE.astype(np.float32),
            "decisions": np.asarray(self.affinity.count),
        }
        if self.statistics is not None:
            arrays |= self.statistics.pack()
        return record_of(arrays)

    @classmethod
    def from_record(cls, record: ArrayRecord, layout: ExpertLayout) -> GateReport:
        """Read the report.

        Raises
        ------
        ValueError
            If an array is missing or has the wrong shape.
        """
        arrays = arrays_of(record)
        shape = (layout.num_layers, max(layout.layers))
        affinity, decisions = arrays.get("affinity"), arrays.get("decisions")
        if affinity is None or decisions is None or affinity.shape != shape:
            raise ValueError(f"gate report lacks an affinity of shape {shape}")
        if decisions.shape != shape[:1] or (decisions < 1).any():
            raise ValueError("gate report of no data")
        statistics = GateStatistics.unpack(arrays) if "mean" in arrays else None
        return cls(AffinitySum(affinity.astype(np.float64), decisions.astype(np.int64)), statistics)

    def __add__(self, other: GateReport) -> GateReport:
        """Report of both devices' data together."""
        statistics = self.statistics
        if statistics is not None and other.statistics is not None:
            statistics = statistics + other.statistics
        return GateReport(self.affinity + other.affinity, statistics)
