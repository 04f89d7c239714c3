"""When EMS-FL fits its gate, and what becomes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from logging import WARNING
from typing import Any

from numpy.typing import NDArray

from flwr_moe.experts import ExpertLayout, RandomFeatures, Router
from flwr_moe.network.flower_adapter import log
from flwr_moe.strategies.ems_cluster import MOST_FAILURES, Cluster
from flwr_moe.strategies.ems_plan import fit_gate_rows, fit_router


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
    """

    def __init__(
        self,
        layout: ExpertLayout,
        gate: str,
        features: RandomFeatures | None,
        ridge: float,
        patience_s: float,
        seed: int,
    ) -> None:
        self.layout = layout
        self.gate = gate
        self.features = features
        self.ridge = ridge
        self.patience_s = patience_s
        self.seed = seed
        self.router: Router | None = None
        self.fitted_on: list[Cluster] = []
        self._tried_on: list[Cluster] = []

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
        silent = [c for c in clusters if not c.experts and c.failures < MOST_FAILURES]
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
        rows = {f"{gate}.weight": weight_EF, f"{gate}.bias": bias_E}
        return {key: fit.astype(state[key].dtype) for key, fit in rows.items() if key in state}
