"""How good a global model is on held-out data of all clusters."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord
from numpy.typing import NDArray
from torch import Tensor

from flwr_moe.app.personal_judge import judge_clients
from flwr_moe.app.settings import Settings
from flwr_moe.app.tracker import Judge, Verdict
from flwr_moe.client_apps.ems_fl.training import gate_inputs_by_batch
from flwr_moe.experts import (
    ExpertLayout,
    Router,
    mixed_log_probs,
    most_probable_log_probs,
    probabilities_from_input,
)
from flwr_moe.experts.mixture import ClusterAnswers
from flwr_moe.strategies import EMSFL
from flwr_moe.strategies.ems_fl.plan import Experts, assigned_affinity, own_experts
from flwr_moe.tasks import Task
from flwr_moe.training import Samples, accuracy_and_loss, predict
from flwr_moe.training.samples import gate_view


def judges_own(settings: Settings, task: Task) -> bool:
    """Whether a global model is judged on each client's own held-out data apart."""
    return task.own_tests if settings.judge_on == "auto" else settings.judge_on == "own"


def judge_global(settings: Settings, task: Task) -> Judge:
    """Judge a global model on the held-out data that the settings name."""
    return judge_clients(task) if judges_own(settings, task) else judge_model(task)


def judge_model(task: Task) -> Judge:
    """Judge the full model with its own gate, over the samples of all clusters together."""
    tests, model = together(task.test_data()), task.build_model()

    def judge(arrays: ArrayRecord) -> Verdict:
        def verdict() -> tuple[float, float]:
            model.load_state_dict(arrays.to_torch_state_dict())
            return accuracy_and_loss(predict(model, tests.x), tests.y)

        return verdict

    return judge


def together(tests: list[Samples]) -> Samples:
    """Return the samples of all clusters as one."""
    return Samples(torch.cat([test.x for test in tests]), torch.cat([test.y for test in tests]))


class EMSJudge:
    """Judge EMS-FL's assembled model, and its gate.

    Parameters
    ----------
    task : Task
        Held-out data and model.
    strategy : EMSFL
        Tells who owns what, and the router.
    inference : str
        ``"mixture"``: every cluster's submodel answers and the gate's posterior over clusters
        mixes the answers. ``"gate"``: the experts the gate finds most probable answer, which
        with a router are those of the most probable cluster.

    Notes
    -----
    Until the gate is fitted, the model that everybody started from answers. If it was fitted with k
    of K clusters, because the others did not report, that model answers for them with the weight
    (K - k) / K. Source: ours.
    """

    def __init__(self, task: Task, strategy: EMSFL, inference: str) -> None:
        self.task = task
        self.strategy = strategy
        self.inference = inference
        parts = task.test_data()
        self.tests = together(parts)
        self.site_of_sample = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        self.model = task.build_model()
        self.layout = ExpertLayout.of(self.model)
        self._answers = ClusterAnswers(self.model, self.layout, self.tests.x, predict)
        self._routed: tuple[Router, NDArray[np.float64]] | None = None
        self._started: Tensor | None = None

    def __call__(self, arrays: ArrayRecord) -> Verdict:
        """Judge with the owners and the gate as they are now."""
        owned = [cluster.experts for cluster in self.strategy.routed_clusters]
        return partial(self._verdict, arrays, owned, self.strategy.router)

    def _verdict(
        self, arrays: ArrayRecord, owned: list[Experts], router: Router | None
    ) -> tuple[float, float]:
        state = arrays.to_torch_state_dict()
        self.model.load_state_dict(state)
        by_gate = self.inference == "gate" and router is None
        if by_gate:
            return accuracy_and_loss(predict(self.model, self.tests.x), self.tests.y)
        if not owned:
            # Some experts may have been trained, but nothing tells yet which inputs are theirs.
            if self._started is None:
                self._started = predict(self.model, self.tests.x)
            return accuracy_and_loss(self._started, self.tests.y)
        combine = mixed_log_probs if self.inference == "mixture" else most_probable_log_probs
        logits, posterior_BK = self._answers(state, owned), self.posterior(owned, router)
        unheard = 1 - len(owned) / self.task.num_clusters
        if unheard > 0 and self._started is not None:
            logits = torch.cat([logits, self._started[None]])
            rest_B1 = np.full((len(posterior_BK), 1), unheard)
            posterior_BK = np.concatenate([(1 - unheard) * posterior_BK, rest_B1], 1)
        return accuracy_and_loss(combine(logits, posterior_BK), self.tests.y)

    def posterior(self, owned: list[Experts], router: Router | None) -> NDArray[np.float64]:
        """Probability of each cluster for the test samples, (B, K): the router's or the gate's."""
        x = self.tests.x
        if router is not None:
            # The router is fitted once and for all, or nearly so; its verdict is kept.
            if self._routed is None or self._routed[0] is not router:
                self._routed = (router, router.posterior(gate_view(self.task, x)))
            return self._routed[1]
        inputs = gate_inputs_by_batch(self.model, self.layout, x)[0]
        layer, state = self.layout.moe_layers[0], self.model.state_dict()
        mass_TE = probabilities_from_input(inputs, layer, state).numpy()
        mass_BE = mass_TE.reshape(len(x), -1, mass_TE.shape[-1]).mean(1)
        return np.stack([mass_BE[:, experts[0]].sum(1) for experts in owned], 1)

    def gate_report(self) -> dict[str, Any]:
        """Return captured mass and gate accuracy on held-out data.

        Captured mass is the mean posterior of the cluster a sample comes from; gate accuracy
        is how often that cluster is the most probable. Assigned affinity is the warm-start
        gate's mass on the experts each cluster got, best affinity what the exact assignment
        with all clusters known would have given.
        """
        clusters = self.strategy.routed_clusters
        if not clusters:
            return {"captured-mass": 0.0, "gate-accuracy": 0.0}
        owned, router = [c.experts for c in clusters], self.strategy.router
        posterior_BK = self.posterior(owned, router)
        masses, hits = [], []
        for k, cluster in enumerate(clusters):
            mine_BK = posterior_BK[self.site_of_sample == cluster.site]
            masses.append(mine_BK[:, k].mean())
            hits.append((mine_BK.argmax(1) == k).mean())
        affinities = [c.report.affinity for c in clusters if c.report is not None]
        best = own_experts(
            affinities, [{} for _ in clusters], self.layout, 1, max(map(_most, owned))
        )
        return {
            "captured-mass": float(np.mean(masses)),
            "gate-accuracy": float(np.mean(hits)),
            "assigned-affinity": assigned_affinity(affinities, owned),
            "best-affinity": assigned_affinity(affinities, best),
        }


def _most(experts: dict[int, list[int]]) -> int:
    return max(len(ids) for ids in experts.values())
