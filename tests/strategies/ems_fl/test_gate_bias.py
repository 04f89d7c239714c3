"""A fitted gate that has no bias to hold its discriminants' constants."""

import re

import numpy as np
import pytest
import torch

from flwr_moe.experts import ExpertLayout, GateStatistics
from flwr_moe.experts.affinity import AffinitySum
from flwr_moe.experts.families import Family, normalised_sigmoid, renumber
from flwr_moe.messages.ems_fl import GateReport
from flwr_moe.strategies.ems_fl.cluster import Cluster
from flwr_moe.strategies.ems_fl.gate import GateFitter, constant_of_features, fit_gate_rows
from tests.experts.models import WIDTH, ListBlock, build

RIDGE = 1e-3
CENTRES = (0.0, 3.0, 5.0)
"""The three clusters lie on a line, so that a gate without constants cannot tell the middle one."""


def samples(offset: float, size: int = 400) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    data = []
    for centre in CENTRES:
        x_BD = rng.normal(size=(size, WIDTH)) * 0.3
        x_BD[:, 0] += centre
        x_BD[:, 1] += offset
        data.append(x_BD)
    return data


def clusters_of(data: list[np.ndarray]) -> list[Cluster]:
    found = []
    for k, x_BD in enumerate(data):
        group = (np.arange(len(x_BD)) % 2).astype(np.int64)
        statistics = GateStatistics.of(x_BD, group, 2)
        report = GateReport(AffinitySum(np.ones((2, 5)), np.ones(2, np.int64)), statistics)
        found.append(Cluster(k, [], report, {0: [k], 1: [k]}))
    return found


def fitter(**options: object) -> GateFitter:
    layout = ExpertLayout.of(build("list"))
    return GateFitter(layout, "linear", None, RIDGE, 0.0, 0, **options)  # type: ignore[arg-type]


def state() -> dict[str, np.ndarray]:
    return {k: v.float().numpy() for k, v in build("list").state_dict().items()}


def test_constants_go_into_the_weights():
    data = samples(4.0)
    clusters = clusters_of(data)
    replaced = fitter().fit(clusters, state(), 0.0)
    assert set(replaced) == {"blocks.0.gate.weight"}
    weight_ED = replaced["blocks.0.gate.weight"]
    assert weight_ED.shape == (5, WIDTH) and weight_ED.dtype == np.float32
    reports, owned = [c.report for c in clusters], [c.experts for c in clusters]
    plain_ED, bias_E = fit_gate_rows(reports, owned, 5, RIDGE, 0)
    for k, x_BD in enumerate(data):
        best = (x_BD @ weight_ED.T).argmax(1)
        assert (best == k).mean() > 0.97
        assert (best == (x_BD @ plain_ED.T + bias_E).argmax(1)).mean() > 0.97
    # Without the constants the farthest cluster's expert, or nobody's, takes all of the others'.
    assert ((data[1] @ plain_ED.T).argmax(1) == 1).mean() < 0.1


def test_the_constant_is_the_least_squares_solution():
    data = samples(4.0)
    statistics = [c.report.statistics for c in clusters_of(data)]
    x_BD = np.concatenate(data)
    expected = np.linalg.lstsq(x_BD, np.ones(len(x_BD)), rcond=None)[0]
    assert np.allclose(constant_of_features(statistics, 0.0), expected, rtol=1e-6, atol=1e-9)


def test_features_around_zero_hold_no_constant():
    clusters = clusters_of([x - x.mean(0) for x in samples(0.0)])
    text = r"the gate has no bias and its input explains 0\.\d\d of a constant, expected at least"
    with pytest.raises(ValueError, match=text):
        constant_of_features([c.report.statistics for c in clusters], RIDGE)
    fitted = fitter()
    # Experts keep what they have learnt; the gate stays.
    assert fitted.fit(clusters, state(), 0.0) is None
    assert fitted.fitted_on == []


def test_gates_that_rate_every_expert_by_itself_cannot_be_fitted(monkeypatch):
    from flwr_moe.experts import families

    monkeypatch.setattr(families, "_families", dict(families._families))
    family = Family(
        "sigmoid-list",
        ("ListBlock",),
        router="gate",
        probabilities=normalised_sigmoid,
        widen=renumber,
    )
    families.register_family(family)
    torch.manual_seed(0)
    layout = ExpertLayout.of(ListBlock(WIDTH, 4, 5))
    text = re.escape("gate is 'linear' and sigmoid-list rates every expert by itself")
    with pytest.raises(ValueError, match=text):
        GateFitter(layout, "linear", None, RIDGE, 0.0, 0)
    assert GateFitter(layout, "plain", None, RIDGE, 0.0, 0).router is None
