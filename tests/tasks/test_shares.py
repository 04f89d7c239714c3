"""Shares of samples: complete, disjoint, the same everywhere."""

import zlib

import numpy as np
import pytest

from flwr_moe.tasks.shares import balanced_draw, class_names, hold_out, matching_draw, share_out

LABELS = np.random.default_rng(0).integers(10, size=1200)


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize(
    ("partition", "alpha"),
    [("iid", 1.0), ("dirichlet", 100.0), ("dirichlet", 0.3), ("dirichlet", 0.001)],
)
def test_shares_are_disjoint_complete_and_large_enough(partition, alpha):
    shares = share_out(LABELS, 7, partition, alpha, 1, 32)
    assert len(shares) == 7
    assert sorted(np.concatenate(shares).tolist()) == list(range(1200))
    assert min(map(len, shares)) >= 32


def test_iid_sizes_differ_by_one_at_most():
    sizes = [len(share) for share in share_out(LABELS[:1199], 8, "iid", 1.0, 0)]
    assert sorted(sizes) == [149] + [150] * 7


def test_iid_shares_do_not_follow_the_order_of_the_file():
    classes = [set(np.sort(LABELS)[s]) for s in share_out(np.sort(LABELS), 8, "iid", 1.0, 0)]
    assert classes == [set(range(10))] * 8


def test_alpha_decides_how_mixed_the_classes_are():
    def largest_class(alpha):
        shares = share_out(LABELS, 6, "dirichlet", alpha, 0, 32)
        return np.mean([np.bincount(LABELS[s], minlength=10).max() / len(s) for s in shares])

    # With even classes it is 0.1; with one class a client, 1.
    assert largest_class(100.0) < 0.2 < 0.35 < largest_class(0.05)


def test_the_seed_decides_in_any_process():
    def fingerprint(seed):
        shares = share_out(LABELS, 6, "dirichlet", 0.3, seed, 16)
        return zlib.crc32(np.concatenate(shares).tobytes())

    assert fingerprint(5) == fingerprint(5) != fingerprint(6)
    # Drawn by another process, once: nothing may hang on hash seeds or the clock.
    assert fingerprint(5) == 2654046


def test_all_clients_can_be_at_the_least():
    shares = share_out(LABELS[:96], 3, "dirichlet", 0.01, 0, 32)
    assert [len(share) for share in shares] == [32, 32, 32]


def test_filling_up_takes_from_the_largest_alone():
    raw, filled = (share_out(LABELS, 7, "dirichlet", 0.05, 1, least) for least in (1, 60))
    small = [k for k in range(7) if len(raw[k]) < 60]
    assert small
    for k in range(7):
        if k in small:
            assert len(filled[k]) == 60 and set(raw[k]) <= set(filled[k])
        else:
            assert len(filled[k]) >= 60 and set(filled[k]) <= set(raw[k])
    untouched = [k for k in range(7) if len(raw[k]) < np.mean([len(s) for s in raw])]
    assert all(len(filled[k]) == max(len(raw[k]), 60) for k in untouched)


def test_hold_out_keeps_one_of_few():
    for number, expected in ((2, 1), (7, 1), (8, 2), (133, 33)):
        train, test = hold_out(np.arange(number), 0)
        assert len(test) == expected
        assert sorted([*train, *test]) == list(range(number))


def test_ten_groups_never_agree_and_the_seed_decides():
    names = class_names(10, 10, seed=3)
    # A Latin square: every class bears every name once, every group uses every name once.
    assert (np.sort(names, axis=0) == np.arange(10)[:, None]).all()
    assert (np.sort(names, axis=1) == np.arange(10)).all()
    assert (class_names(3, 10, seed=3) == names[:3]).all()
    assert (class_names(3, 10, seed=4) != names[:3]).any()


def test_balanced_draw_by_hand():
    labels = np.array([0, 0, 0, 0, 1, 1, 1, 1, 2])
    drawn = labels[balanced_draw(labels, 5, 3, rng())]
    # Class 2 has one sample only; the others make up for it.
    assert np.bincount(drawn).tolist() == [2, 2, 1]
    assert balanced_draw(labels, 9, 3, rng()).tolist() == list(range(9))
    assert balanced_draw(labels, 0, 3, rng()).tolist() == []
    draws = {tuple(balanced_draw(labels, 2, 3, rng(seed))) for seed in range(20)}
    assert len(draws) > 5 and all(i < 4 <= j < 8 for i, j in draws)


def test_matching_draw_by_hand():
    labels = np.repeat([0, 1, 2], [40, 10, 50])
    own = np.array([0, 0, 0, 1])
    counts = np.bincount(labels[matching_draw(labels, own, 20, 3, rng())], minlength=3)
    assert counts.tolist() == [15, 5, 0]
    # Class 1 has only 10: three times as many of class 0, not more.
    counts = np.bincount(labels[matching_draw(labels, own, 1000, 3, rng())], minlength=3)
    assert counts.tolist() == [30, 10, 0]
    # A class of a thousandth of the mix is still drawn once.
    rare = np.array([0] * 999 + [2])
    counts = np.bincount(labels[matching_draw(labels, rare, 20, 3, rng())], minlength=3)
    assert counts.tolist() == [19, 0, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, "iid", 1.0), "num-clients is 0, expected 1 to 37"),
        ((2, "sorted", 1.0), "partition is 'sorted', expected one of iid, dirichlet"),
        ((2, "dirichlet", 0.0), "dirichlet-alpha is 0.0, expected a finite number above 0"),
        ((2, "dirichlet", float("nan")), "dirichlet-alpha is nan, expected a finite number"),
        ((38, "iid", 1.0), "num-clients is 38, expected 1 to 37: 1200 samples"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        share_out(LABELS, *arguments, 0, 32)
