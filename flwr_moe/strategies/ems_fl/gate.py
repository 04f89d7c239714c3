"""How EMS-FL fits its gate from what clusters report, when, and what becomes of it.

Dimension suffixes: E experts, G groups, F features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from logging import WARNING
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flwr_moe.experts import (
    Discriminants,
    ExpertLayout,
    GateStatistics,
    RandomFeatures,
    Router,
    fit_discriminants,
    split_among_experts,
)
from flwr_moe.experts.families import family_named, softmax
from flwr_moe.messages.ems_fl import Experts, GateReport
from flwr_moe.network.flower_adapter import log
from flwr_moe.strategies.ems_fl.cluster import Cluster

NOBODYS_BIAS = -30_000.0
"""Gate bias of an expert without an owner: no probability, and finite in half precision too."""

LEAST_EXPLAINED = 0.9
"""Share of a constant that the features have to explain, for a gate without bias to be fitted."""


@dataclass
class GateFitter:
    """Fits the gate once all clusters are known, or have had long enough.

    Parameters
    ----------
    layout : ExpertLayout
        Layout of the model.
    gate : str
        ``"plain"``, ``"linear"`` or ``"random-features"``.
    features : RandomFeatures or None
        Those of the router; None for the other gates.
    ridge : float
        Regularisation relative to the mean variance.
    patience_s : float
        When to fit at the latest, without the clusters not heard of by then.
    seed : int
        Of k-means.

    Attributes
    ----------
    router : Router or None
        The fitted router.
    fitted_on : list of Cluster
        The clusters that the present fit knows, in its order.

    Raises
    ------
    ValueError
        If a linear gate is to be fitted where the model does not decide by a softmax.
    """

    layout: ExpertLayout
    gate: str
    features: RandomFeatures | None
    ridge: float
    patience_s: float
    seed: int
    router: Router | None = field(default=None, init=False)
    fitted_on: list[Cluster] = field(default_factory=list, init=False)
    _tried_on: list[Cluster] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        first = family_named(self.layout.moe_layers[0].family)
        if self.gate == "linear" and first.probabilities is not softmax:
            raise ValueError(
                f"gate is 'linear' and {first.name} rates every expert by itself, expected plain "
                "or random-features: discriminants rate experts against each other"
            )

    @property
    def num_features(self) -> int | None:
        """Features that devices tell statistics of; None if none are asked for."""
        if self.gate == "plain":
            return None
        if self.features is not None:
            return self.features.num_features
        return self.layout.shared_specs[f"{self.layout.moe_layers[0].gate}.weight"].shape[-1]

    def fit(
        self, clusters: Sequence[Cluster], state: Mapping[str, NDArray[Any]], now_s: float
    ) -> dict[str, NDArray[Any]] | None:
        """Fit the gate if it is time to.

        Parameters
        ----------
        clusters : sequence of Cluster
            All clusters.
        state : mapping
            The model.
        now_s : float
            Seconds since the start.

        Returns
        -------
        dict or None
            Tensors of the model that the fit replaces; None if nothing was fitted.
        """
        known = [c for c in clusters if c.experts]
        silent = [c for c in clusters if not c.experts and not c.left_out]
        if self.gate == "plain" or not known or known == self._tried_on:
            return None
        if silent and now_s < self.patience_s:
            return None
        self._tried_on = known
        try:
            replaced = self._fit(known, state)
        except ValueError as error:
            # What has been learnt is worth more than a gate that finds it.
            log(WARNING, "the gate stays as it is: %s", error)
            return None
        self.fitted_on = known
        return replaced

    def _fit(
        self, known: list[Cluster], state: Mapping[str, NDArray[Any]]
    ) -> dict[str, NDArray[Any]]:
        reports = [c.report for c in known if c.report is not None]
        if self.features is not None:
            discriminants = fit_router(reports, self.ridge)
            self.router = Router(self.features, discriminants) if discriminants else None
            return {}
        owned, num_experts = [c.experts for c in known], self.layout.layers[0]
        weight_EF, bias_E = fit_gate_rows(reports, owned, num_experts, self.ridge, self.seed)
        gate = self.layout.moe_layers[0].gate
        rows: dict[str, NDArray[Any]] = {f"{gate}.weight": weight_EF, f"{gate}.bias": bias_E}
        if f"{gate}.bias" not in state:
            owners = [e for experts in owned for e in experts[0]]
            statistics = [r.statistics for r in reports if r.statistics is not None]
            one_F = constant_of_features(statistics, self.ridge)
            # A shift of all experts changes nothing; the less there is to fold, the better.
            bias_E[owners] -= bias_E[owners].mean()
            rows = {f"{gate}.weight": weight_EF + bias_E[:, None] * one_F}
        return {key: fit.astype(state[key].dtype) for key, fit in rows.items()}


def fit_router(reports: Sequence[GateReport], ridge: float) -> Discriminants | None:
    """Fit discriminants that tell the clusters apart; None without statistics."""
    statistics = [r.statistics for r in reports if r.statistics is not None]
    if len(statistics) < len(reports):
        return None
    return fit_discriminants(statistics, ridge)


def fit_gate_rows(
    reports: Sequence[GateReport],
    owned: Sequence[Experts],
    num_experts: int,
    ridge: float,
    seed: int,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Rows of the first layer's gate: one linear discriminant per expert.

    Each cluster's groups are shared out among its experts, ``w_e = S^-1 mu_e`` and
    ``b_e = -mu_e^T S^-1 mu_e / 2`` (DESIGN, gate fitting; ours). An expert that nobody owns yet
    gets no probability: its row is zero and its bias ``NOBODYS_BIAS``.

    Returns
    -------
    weight_EF, bias_E : ndarray
        For all ``num_experts`` experts of the layer.

    Raises
    ------
    ValueError
        If a cluster sent no statistics, or they do not tell its experts apart.
    """
    parts, numbers = [], []
    for report, experts in zip(reports, owned, strict=True):
        if report.statistics is None:
            raise ValueError("a cluster sent no gate statistics, which a linear gate is fitted to")
        parts += split_among_experts(report.statistics, len(experts[0]), seed)
        numbers += experts[0]
    fitted = fit_discriminants(parts, ridge, priors=False)
    weight_EF = np.zeros((num_experts, fitted.weight_FC.shape[0]), np.float32)
    bias_E = np.full(num_experts, NOBODYS_BIAS, np.float32)
    weight_EF[numbers] = fitted.weight_FC.T
    bias_E[numbers] = fitted.bias_C
    return weight_EF, bias_E


def constant_of_features(statistics: Sequence[GateStatistics], ridge: float) -> NDArray[np.float64]:
    """Weights (F,) of features whose sum is nearest to one: a gate's bias where it has none.

    ``v = argmin E(v·phi - 1)² = E(phi phi^T)^-1 E(phi)`` over all samples, so that with rows
    ``w_e + b_e v`` a gate comes nearest to ``w_e·phi + b_e`` in least squares.

    Parameters
    ----------
    statistics : sequence of GateStatistics
        Of the features; at least one sample among them.
    ridge : float
        Added to the diagonal, relative to the mean variance within the groups.

    Raises
    ------
    ValueError
        If the sum explains less than :data:`LEAST_EXPLAINED` of the constant, because the
        features' mean is small against their spread.

    Notes
    -----
    Source: ours.
    """
    count = sum(float(s.count_G.sum()) for s in statistics)
    mean_F = np.sum([s.count_G @ s.mean_GF for s in statistics], axis=0) / count
    within_FF = np.sum([s.scatter_FF for s in statistics], axis=0) / count
    moment_FF = within_FF + np.sum(
        [(s.mean_GF * s.count_G[:, None]).T @ s.mean_GF / count for s in statistics], axis=0
    )
    little = max(float(np.trace(within_FF)) / len(mean_F), 1e-12)
    one_F: NDArray[np.float64] = np.linalg.solve(
        moment_FF + ridge * little * np.eye(len(mean_F)), mean_F
    )
    explained = float(one_F @ mean_F)
    if explained < LEAST_EXPLAINED:
        raise ValueError(
            f"the gate has no bias and its input explains {explained:.2f} of a constant, expected "
            f"at least {LEAST_EXPLAINED}"
        )
    return one_F
