"""Who owns which expert, and gates fitted from what clusters report."""

import numpy as np
import pytest

from flwr_moe.arrays import record_of
from flwr_moe.experts import AffinitySum, ExpertLayout, GateStatistics
from flwr_moe.messages.ems_fl import GateReport
from flwr_moe.strategies.ems_fl.gate import NOBODYS_BIAS, fit_gate_rows, fit_router
from flwr_moe.strategies.ems_fl.plan import assigned_affinity, check_bounds, own_experts
from tests.experts.models import build
from tests.strategies.devices import TinyTask


def layout_of(*experts):
    if experts == (5, 4):
        return ExpertLayout.of(build("fused"))
    (num,) = experts
    return ExpertLayout.of(TinyTask(1, 1, num).build_model())


def affinity(*rows):
    """Affinity of a cluster, one row a layer, of ten decisions each."""
    width = max(map(len, rows))
    sums = np.array([[*row, *[0.0] * (width - len(row))] for row in rows]) * 10
    return AffinitySum(sums, np.full(len(rows), 10))


def experts_of(plan, layer=0):
    return [owned[layer] for owned in plan]


# Greedy takes 0.9 for cluster 0 and is left with 0.0 for cluster 1: 0.9 + 0.0 < 0.8 + 0.7.
TWO = [affinity([0.9, 0.8]), affinity([0.7, 0.0])]


def test_exact_by_hand_and_greedy_and_random():
    layout = layout_of(2)
    assert experts_of(own_experts(TWO, [{}, {}], layout, 1, 1)) == [[1], [0]]
    assert experts_of(own_experts(TWO, [{}, {}], layout, 1, 1, "greedy")) == [[0], [1]]
    drawn = {
        tuple(map(tuple, experts_of(own_experts(TWO, [{}, {}], layout, 1, 1, "random", seed))))
        for seed in range(20)
    }
    assert len(drawn) == 2
    assert assigned_affinity(TWO, [{0: [1]}, {0: [0]}]) == pytest.approx((0.8 + 0.7) / 2)


def test_stage_by_stage_keeps_what_is_owned_and_leaves_enough():
    layout = layout_of(6)
    three = [
        affinity([0.4, 0.3, 0.2, 0.05, 0.03, 0.02]),
        affinity([0.5, 0.1, 0.1, 0.1, 0.1, 0.1]),
        affinity([0.0, 0.0, 0.1, 0.5, 0.2, 0.2]),
    ]
    owned = [{}, {}, {}]
    # First the second cluster is seen, then the first, then the third: two experts each.
    for order in (1, 0, 2):
        seen = [a if owned[k] or k == order else None for k, a in enumerate(three)]
        plan = own_experts(seen, owned, layout, 2, 2)
        for k in range(3):
            assert not owned[k] or plan[k] == owned[k]
        owned[order] = plan[order]
    assert 0 in owned[1][0] and {1, 2} == set(owned[0][0])
    assert sorted(e for o in owned for e in o[0]) == list(range(6))
    # Nobody is worse off in sum when all are seen at once.
    once = own_experts(three, [{}, {}, {}], layout, 2, 2)
    assert assigned_affinity(three, once) >= assigned_affinity(three, owned)


def test_no_conflict_no_difference_between_stages_and_all_at_once():
    layout = layout_of(4)
    two = [affinity([0.45, 0.45, 0.05, 0.05]), affinity([0.1, 0.1, 0.4, 0.4])]
    once = own_experts(two, [{}, {}], layout, 1, 3)
    first = own_experts([two[0], None], [{}, {}], layout, 1, 2)
    assert experts_of(own_experts(two, [first[0], {}], layout, 1, 2)) == [[0, 1], [2, 3]]
    assert experts_of(own_experts(two, [{}, {}], layout, 1, 2)) == [[0, 1], [2, 3]]
    assert assigned_affinity(two, once) >= assigned_affinity(two, [{0: [0, 1]}, {0: [2, 3]}])


def test_every_layer_by_itself():
    layout = layout_of(5, 4)
    two = [
        affinity([0.4, 0.4, 0.2, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]),
        affinity([0.0, 0.0, 0.2, 0.4, 0.4], [0.5, 0.5, 0.0, 0.0]),
    ]
    plan = own_experts(two, [{}, {}], layout, 2, 3)
    assert {0, 1} <= set(plan[0][0]) and {3, 4} <= set(plan[1][0])
    assert experts_of(plan, layer=1) == [[2, 3], [0, 1]]


def test_upper_bound_gives_way_only_to_experts_without_a_taker():
    layout = layout_of(6)
    flat = affinity([1 / 6] * 6)
    # Two of three clusters are left, one owns two: four for the other, although two were planned.
    plan = own_experts([flat, flat], [{0: [0, 1]}, {}], layout, 1, 2)
    assert experts_of(plan) == [[0, 1], [2, 3, 4, 5]]
    assert own_experts([], [], layout, 1, 2) == []
    with pytest.raises(ValueError, match="cluster"):
        own_experts([flat] * 4, [{}] * 4, layout, 2, 2)


@pytest.mark.parametrize(
    ("clusters", "lower", "upper", "text"),
    [
        (0, 1, 0, "nobody to own experts"),
        (3, 0, 0, "min_experts is 0"),
        (6, 1, 0, "layer 0 has 5 experts for 6 clusters of 1 to 1"),
        (5, 1, 0, "layer 1 has 4 experts for 5 clusters of 1 to 1"),
        (2, 1, 2, "layer 0 has 5 experts for 2 clusters of 1 to 2"),
        (2, 3, 4, "layer 0 has 5 experts for 2 clusters of 3 to 4"),
    ],
)
def test_bounds_nobody_can_meet(clusters, lower, upper, text):
    with pytest.raises(ValueError, match=text):
        check_bounds(layout_of(5, 4), clusters, lower, upper)


def test_bounds():
    assert check_bounds(layout_of(5, 4), 2, 1, 0) == 3
    assert check_bounds(layout_of(5, 4), 2, 2, 4) == 4
    assert check_bounds(layout_of(5, 4), 1, 1, 0) == 5


# --- gates ---------------------------------------------------------------------------


def reports_of(centres, per_cluster=2, size=200):
    """Clusters around ``centres``, each of two groups half a unit to both sides."""
    rng = np.random.default_rng(0)
    reports, samples = [], []
    for centre in centres:
        group = rng.integers(0, per_cluster, size)
        x = np.array(centre) + rng.normal(0, 0.2, (size, 2)) + (group[:, None] - 0.5)
        reports.append(GateReport(affinity([0.5, 0.5]), GateStatistics.of(x, group, per_cluster)))
        samples.append(x)
    return reports, samples


def softmax(z):
    z = np.exp(z - z.max(1, keepdims=True))
    return z / z.sum(1, keepdims=True)


def test_fitted_rows_put_clusters_on_their_own_experts():
    reports, samples = reports_of([(3, 0), (-3, 0), (0, 3)])
    owned = [{0: [5, 1]}, {0: [0, 2]}, {0: [3, 4]}]
    weight_EF, bias_E = fit_gate_rows(reports, owned, 6, 0.01, 0)
    assert weight_EF.shape == (6, 2) and weight_EF.dtype == bias_E.dtype == np.float32
    for k, x in enumerate(samples):
        mass_BE = softmax(x @ weight_EF.T + bias_E)
        assert mass_BE[:, owned[k][0]].sum(1).mean() > 0.99
        # Both experts of a cluster get a share of it: its two groups lie apart.
        assert mass_BE[:, owned[k][0]].mean(0).min() > 0.2


def test_rows_of_nobody():
    reports, samples = reports_of([(3, 0), (-3, 0)])
    weight_EF, bias_E = fit_gate_rows(reports, [{0: [4]}, {0: [2]}], 6, 0.01, 0)
    for nobody in (0, 1, 3, 5):
        assert bias_E[nobody] == NOBODYS_BIAS and not weight_EF[nobody].any()
    assert np.isfinite(bias_E.astype(np.float16)).all()
    mass_BE = softmax(samples[0] @ weight_EF.T + bias_E)
    assert mass_BE[:, [0, 1, 3, 5]].sum() == 0 and mass_BE[:, 4].mean() > 0.99


def test_router_by_cluster():
    reports, samples = reports_of([(3, 0), (-3, 0), (0, 3)])
    fitted = fit_router(reports, 0.01)
    for k, x in enumerate(samples):
        assert (fitted.posterior(x).argmax(1) == k).mean() > 0.99


def test_without_statistics():
    silent = GateReport(affinity([0.5, 0.5]), None)
    assert fit_router([silent], 0.01) is None
    with pytest.raises(ValueError, match="no gate statistics"):
        fit_gate_rows([silent], [{0: [0]}], 1, 0.01, 0)


# --- reports -------------------------------------------------------------------------


def test_reports_add_up():
    layout = layout_of(2)
    told = [
        {"affinity": np.array([[6.0, 4.0]], np.float32), "decisions": np.array([10])},
        {"affinity": np.array([[1.0, 4.0]], np.float32), "decisions": np.array([5])},
    ]
    one, other = (GateReport.from_record(record_of(arrays), layout) for arrays in told)
    both = one + other
    assert both.affinity.sum_LE.tolist() == [[7.0, 8.0]]
    assert both.affinity.mean[0] == pytest.approx([7 / 15, 8 / 15])
    assert both.statistics is None


@pytest.mark.parametrize(
    ("arrays", "text"),
    [
        ({}, "lacks an affinity"),
        ({"affinity": np.ones((1, 2))}, "lacks an affinity"),
        ({"affinity": np.ones((1, 3)), "decisions": np.array([1])}, r"of shape \(1, 2\)"),
        ({"affinity": np.ones((1, 2)), "decisions": np.array([0])}, "of no data"),
        ({"affinity": np.ones((1, 2)), "decisions": np.array(3)}, "of no data"),
        (
            {"affinity": np.ones((1, 2)), "decisions": np.array([1]), "mean": np.ones((2, 3))},
            "lack 'count'",
        ),
    ],
)
def test_bad_reports(arrays, text):
    with pytest.raises(ValueError, match=text):
        GateReport.from_record(record_of(arrays), layout_of(2))
