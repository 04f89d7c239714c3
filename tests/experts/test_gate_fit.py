"""Fitting the gate: features, statistics that add up, discriminants."""

import numpy as np
import pytest
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from flwr_moe.experts import (
    GateStatistics,
    RandomFeatures,
    fit_discriminants,
    median_gamma,
    split_among_experts,
)

# Standard error of a kernel value from F features is about 1 / sqrt(F).
NUM_FEATURES = 20_000
KERNEL_TOLERANCE = 5 / np.sqrt(NUM_FEATURES)
ROUNDING = 1e-10
# Half precision rounds to 2^-11 of a number, or to 2^-25 of the largest for the smallest.
HALF_RELATIVE, HALF_ABSOLUTE = 2**-11 + 1e-6, 2**-25 + 1e-9
SINGLE_RELATIVE = 2**-24


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def blobs(rng, num_groups=4, num_features=3, num_samples=200):
    """Correlated features around different means."""
    group = rng.integers(0, num_groups, num_samples)
    mixing = rng.normal(size=(num_features, num_features))
    centres = 3 * rng.normal(size=(num_groups, num_features))
    return centres[group] + rng.normal(size=(num_samples, num_features)) @ mixing, group


# --- random features -----------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0.05, 0.5])
def test_random_features_approximate_the_gaussian_kernel(rng, gamma):
    x, y = rng.normal(size=(12, 4)), rng.normal(size=(9, 4))
    features = RandomFeatures(3, 4, NUM_FEATURES, gamma)
    squared = ((x[:, None] - y[None]) ** 2).sum(-1)
    kernel = np.exp(-gamma * squared)
    assert kernel.min() < 0.6 < kernel.max()
    assert features(x) @ features(y).T == pytest.approx(kernel, abs=KERNEL_TOLERANCE)


def test_random_features_come_from_the_seed_alone(rng):
    x = rng.normal(size=(5, 2, 3))
    one = RandomFeatures(7, 6, 16, 0.1)(x)
    assert one.shape == (5, 16)
    assert (one == RandomFeatures(7, 6, 16, 0.1)(x.reshape(5, 6))).all()
    # Each sample's features do not depend on its company, up to the order of summation.
    assert one[2:3] == pytest.approx(RandomFeatures(7, 6, 16, 0.1)(x[2:3]), abs=ROUNDING)
    assert not np.allclose(one, RandomFeatures(8, 6, 16, 0.1)(x))
    assert np.abs(one).max() <= np.sqrt(2 / 16)


def test_random_features_of_no_samples():
    assert RandomFeatures(0, 6, 16, 0.1)(np.empty((0, 2, 3))).shape == (0, 16)


def test_random_features_errors():
    for sizes, name in (((0, 4), "num_inputs"), ((4, 0), "num_features")):
        with pytest.raises(ValueError, match=f"{name} is 0, expected at least 1"):
            RandomFeatures(0, *sizes, 1.0)
    for gamma in (0.0, -1.0, np.nan):
        with pytest.raises(ValueError, match=f"gamma is {gamma}, expected above 0"):
            RandomFeatures(0, 1, 1, gamma)
    with pytest.raises(ValueError, match="inputs have 3 numbers, expected 4"):
        RandomFeatures(0, 4, 8, 1.0)(np.zeros((2, 3)))


def test_median_gamma_by_hand():
    # Squared distances of 0, 1, 3 on a line: 1, 9, 4.
    assert median_gamma(np.array([[0.0], [1.0], [3.0]])) == pytest.approx(1 / 8)
    # The first two only: 1.
    assert median_gamma(np.array([[0.0], [1.0], [3.0]]), limit=2) == pytest.approx(1 / 2)
    # Images count as vectors: squared distance 4.
    images = np.stack([np.zeros((2, 2)), np.ones((2, 2))])
    assert median_gamma(images) == pytest.approx(1 / 8)
    assert median_gamma(np.zeros((5, 3))) == 1.0 and median_gamma(np.zeros((1, 3))) == 1.0


# --- statistics ----------------------------------------------------------------------


def test_statistics_by_hand():
    features = np.array([[0.0, 0.0], [2.0, 0.0], [5.0, 1.0]])
    stats = GateStatistics.of(features, [0, 0, 2], 3)
    assert stats.count_G.tolist() == [2, 0, 1]
    assert stats.mean_GF.tolist() == [[1, 0], [0, 0], [5, 1]]
    assert stats.scatter_FF.tolist() == [[2, 0], [0, 0]]


@pytest.mark.parametrize("cuts", [[100], [1, 2, 150], [0, 200], [60, 60]])
def test_statistics_of_parts_add_up_to_those_of_the_whole(rng, cuts):
    x, group = blobs(rng)
    whole = GateStatistics.of(x, group, 4)
    parts = [
        GateStatistics.of(part, part_group, 4)
        for part, part_group in zip(np.split(x, cuts), np.split(group, cuts), strict=True)
    ]
    for order in (parts, parts[::-1]):
        total = order[0]
        for part in order[1:]:
            total = total + part
        assert (total.count_G == whole.count_G).all()
        assert total.mean_GF == pytest.approx(whole.mean_GF, abs=ROUNDING)
        assert total.scatter_FF == pytest.approx(whole.scatter_FF, abs=1e3 * ROUNDING)


def test_statistics_of_devices_with_different_groups_add_up(rng):
    x, group = blobs(rng)
    parts = [GateStatistics.of(x[mine], group[mine], 4) for mine in (group < 2, group >= 2)]
    total, whole = parts[0] + parts[1], GateStatistics.of(x, group, 4)
    assert total.mean_GF == pytest.approx(whole.mean_GF, abs=ROUNDING)
    assert total.scatter_FF == pytest.approx(whole.scatter_FF, abs=1e3 * ROUNDING)


def test_statistics_errors(rng):
    for group in ([0, 4], [-1, 0]):
        with pytest.raises(ValueError, match=r"groups run from .* expected 0 to 3"):
            GateStatistics.of(np.zeros((2, 3)), group, 4)
    a = GateStatistics.of(np.zeros((1, 3)), [0], 2)
    b = GateStatistics.of(np.zeros((1, 4)), [0], 2)
    with pytest.raises(ValueError, match=r"shape \(2, 4\), expected \(2, 3\)"):
        a + b


def test_pack_and_unpack(rng):
    x, group = blobs(rng)
    stats = GateStatistics.of(x, group, 5)
    packed = stats.pack()
    assert packed["scatter"].dtype == np.float16 and packed["scatter"].shape == (6,)
    back = GateStatistics.unpack(packed)
    assert (back.count_G == stats.count_G).all()
    assert back.mean_GF == pytest.approx(stats.mean_GF, rel=SINGLE_RELATIVE, abs=0)
    largest = np.abs(stats.scatter_FF).max()
    assert back.scatter_FF == pytest.approx(
        stats.scatter_FF, rel=HALF_RELATIVE, abs=HALF_ABSOLUTE * largest
    )
    assert (back.scatter_FF == back.scatter_FF.T).all()


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_pack_keeps_scatters_of_any_size(rng, scale):
    x, group = blobs(rng)
    stats = GateStatistics.of(x * np.sqrt(scale), group, 4)
    back = GateStatistics.unpack(stats.pack())
    assert back.scatter_FF.diagonal() == pytest.approx(
        stats.scatter_FF.diagonal(), rel=10 * HALF_RELATIVE
    )


def test_pack_of_no_scatter():
    stats = GateStatistics.of(np.ones((3, 2)), [0, 0, 0], 1)
    back = GateStatistics.unpack(stats.pack())
    assert (back.scatter_FF == 0).all() and (back.mean_GF == 1).all()


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("scatter", None, "lack 'scatter'"),
        ("scale", None, "lack 'scale'"),
        ("scatter", np.zeros(5), "do not belong together"),
        ("count", np.ones(4), "do not belong together"),
        ("mean", np.zeros((5, 4)), "do not belong together"),
        ("mean", np.zeros(3), "do not belong together"),
        ("mean", np.array(1.0), "do not belong together"),
        ("scale", np.ones(2), "do not belong together"),
        ("mean", np.full((5, 3), np.nan), "not finite"),
        ("scatter", np.full(6, np.inf), "not finite"),
        ("count", np.full(5, -1.0), "fewer than zero"),
        ("scale", np.array([-1.0]), "negative variance"),
        ("scatter", np.array([1.0, 0, 0, -0.5, 0, 1.0]), "negative variance"),
        ("mean", np.array([["a"] * 3] * 5), "could not convert"),
    ],
)
def test_broken_packs_are_refused(rng, key, value, reason):
    packed = GateStatistics.of(*blobs(rng), 5).pack()
    if value is None:
        del packed[key]
    else:
        packed[key] = value
    with pytest.raises(ValueError, match=reason):
        GateStatistics.unpack(packed)


# --- discriminants -------------------------------------------------------------------


def scores(discriminants, x):
    return x @ discriminants.weight_FC + discriminants.bias_C


def test_same_as_linear_discriminant_analysis(rng):
    x, group = blobs(rng)
    ours = scores(fit_discriminants([GateStatistics.of(x, group, 4)], ridge=0.0), x)
    theirs = LinearDiscriminantAnalysis(solver="lsqr").fit(x, group).decision_function(x)
    difference = ours - theirs
    assert theirs.std() > 1.0
    assert difference - difference[:, :1] == pytest.approx(np.zeros_like(ours), abs=1e-8)


def test_without_priors_groups_count_alike(rng):
    x, group = blobs(rng)
    stats = [GateStatistics.of(x, group, 4)]
    equal = LinearDiscriminantAnalysis(solver="lsqr").fit(x, group)
    with_priors = fit_discriminants(stats, ridge=0.0)
    without = fit_discriminants(stats, ridge=0.0, priors=False)
    gap = with_priors.bias_C - without.bias_C
    assert gap == pytest.approx(np.log(equal.priors_))
    assert (with_priors.weight_FC == without.weight_FC).all()


def test_posterior_by_hand():
    # One feature, unit variance, means 0 and 2: scores 0 and 2x - 2, level at x = 1.
    clusters = [
        GateStatistics(np.array([10.0]), np.array([[0.0]]), np.array([[10.0]])),
        GateStatistics(np.array([30.0]), np.array([[2.0]]), np.array([[30.0]])),
    ]
    fitted = fit_discriminants(clusters, ridge=0.0)
    assert fitted.weight_FC == pytest.approx(np.array([[0.0, 2.0]]))
    assert fitted.bias_C == pytest.approx(np.array([0.0, -2.0]))
    assert fitted.owner_C.tolist() == [0, 1] and fitted.num_owners == 2
    odds = np.exp(2.0)
    expected = [
        [0.5, 0.5],
        [1 / (1 + odds), odds / (1 + odds)],
        [odds / (1 + odds), 1 / (1 + odds)],
    ]
    assert fitted.posterior([[1.0], [2.0], [0.0]]) == pytest.approx(np.array(expected))


def test_posterior_sums_a_clusters_groups(rng):
    x, group = blobs(rng, num_groups=6)
    # Cluster 0 has groups 0 and 1, cluster 1 the others; one group is empty in either.
    clusters = [GateStatistics.of(x[mine], group[mine], 6) for mine in (group < 2, group >= 2)]
    fitted = fit_discriminants(clusters)
    assert fitted.owner_C.tolist() == [0, 0, 1, 1, 1, 1]
    posterior = fitted.posterior(x)
    assert posterior.shape == (200, 2) and (posterior >= 0).all()
    assert posterior.sum(1) == pytest.approx(np.ones(200))
    each = np.exp(scores(fitted, x))
    by_hand = each[:, :2].sum(1) / each.sum(1)
    assert posterior[:, 0] == pytest.approx(by_hand)
    # Far from everything nothing overflows.
    assert fitted.posterior(1e6 * x).sum(1) == pytest.approx(np.ones(200))


def test_ridge_is_relative_to_the_mean_variance():
    stats = [GateStatistics(np.array([4.0]), np.array([[1.0, 1.0]]), np.diag([4.0, 12.0]))]
    # Variances 1 and 3, mean 2: with ridge 0.5 they become 2 and 4.
    weight = fit_discriminants(stats, ridge=0.5).weight_FC
    assert weight == pytest.approx(np.array([[0.5], [0.25]]))


def test_scaling_the_features_does_not_move_the_posterior(rng):
    x, group = blobs(rng)
    posteriors = [
        fit_discriminants(
            [GateStatistics.of(s * x[mine], group[mine], 4) for mine in (group < 2, group >= 2)]
        ).posterior(s * x)
        for s in (1.0, 1e-3)
    ]
    assert posteriors[0] == pytest.approx(posteriors[1], abs=1e-6)


def test_fit_errors():
    empty = GateStatistics(np.zeros(2), np.zeros((2, 3)), np.zeros((3, 3)))
    full = GateStatistics.of(np.eye(3), [0, 0, 1], 2)
    with pytest.raises(ValueError, match="no cluster sent"):
        fit_discriminants([])
    with pytest.raises(ValueError, match="cluster 1 sent gate statistics of no samples"):
        fit_discriminants([full, empty])
    odd = GateStatistics(np.ones(1), np.zeros((1, 2)), np.array([[1.0, 5.0], [5.0, 1.0]]))
    with pytest.raises(ValueError, match=r"not positive definite with ridge 0\.01"):
        fit_discriminants([odd])


# --- sharing a cluster among its experts ----------------------------------------------


def test_split_by_hand():
    # Groups at 0 (twice the samples) and 3 go together, the one at 100 alone.
    cluster = GateStatistics(
        np.array([20.0, 0.0, 10.0, 10.0]),
        np.array([[0.0], [7.0], [3.0], [100.0]]),
        np.array([[80.0]]),
    )
    near, far = sorted(split_among_experts(cluster, 2), key=lambda part: part.mean_GF[0, 0])
    assert near.count_G.tolist() == [30.0] and far.count_G.tolist() == [10.0]
    assert near.mean_GF.tolist() == [[1.0]] and far.mean_GF.tolist() == [[100.0]]
    # Between the two groups: 20 * 1 + 10 * 4; within: 80 shared out 30 to 10.
    assert near.scatter_FF == pytest.approx(np.array([[60.0 + 60.0]]))
    assert far.scatter_FF == pytest.approx(np.array([[20.0]]))


@pytest.mark.parametrize("num_experts", [1, 2, 4])
def test_split_keeps_samples_mean_and_total_scatter(rng, num_experts):
    x, group = blobs(rng)
    cluster = GateStatistics.of(x, group, 4)
    parts = split_among_experts(cluster, num_experts, seed=1)
    assert len(parts) == num_experts
    counts = np.array([part.count_G[0] for part in parts])
    means = np.array([part.mean_GF[0] for part in parts])
    assert counts.sum() == 200
    assert counts @ means / 200 == pytest.approx(x.mean(0))
    # Scatter within the experts and between their centroids is that of all samples.
    shift = means - x.mean(0)
    total = sum(part.scatter_FF for part in parts) + (shift.T * counts) @ shift
    centred = x - x.mean(0)
    assert total == pytest.approx(centred.T @ centred)
    if num_experts == 4:
        assert sum(part.scatter_FF for part in parts) == pytest.approx(cluster.scatter_FF)
    again = split_among_experts(cluster, num_experts, seed=1)
    assert all((a.mean_GF == b.mean_GF).all() for a, b in zip(parts, again, strict=True))


def test_split_errors():
    cluster = GateStatistics(np.array([5.0, 0.0, 5.0]), np.zeros((3, 2)), np.eye(2))
    for num_experts in (0, 3):
        with pytest.raises(ValueError, match=f"{num_experts} experts to share 2 groups"):
            split_among_experts(cluster, num_experts)
    with pytest.raises(ValueError, match="2 experts to share 1 distinct group means"):
        split_among_experts(cluster, 2)
