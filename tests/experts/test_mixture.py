"""Mixing the clusters' answers, by hand."""

import numpy as np
import torch

from flwr_moe.experts import (
    Discriminants,
    ExpertLayout,
    Router,
    cluster_logits,
    mixed_log_probs,
    most_probable_log_probs,
    restricted_gate,
)
from tests.experts.models import both_kinds, build

DOUBLE = 1e-12
# Two clusters, two samples, two classes: class probabilities.
ANSWERS_KBC = torch.tensor([[[0.9, 0.1], [0.6, 0.4]], [[0.2, 0.8], [0.5, 0.5]]], dtype=torch.double)
POSTERIOR_BK = np.array([[0.75, 0.25], [0.1, 0.9]])


def test_mixed_by_hand():
    # Logits may be shifted by any number per sample and cluster.
    logits_KBC = ANSWERS_KBC.log() + torch.tensor([[[3.0], [-2.0]], [[0.0], [700.0]]])
    mixed = mixed_log_probs(logits_KBC, POSTERIOR_BK).exp().numpy()
    expected = [[0.75 * 0.9 + 0.25 * 0.2, 0.75 * 0.1 + 0.25 * 0.8], [0.51, 0.49]]
    assert np.allclose(mixed, expected, rtol=0, atol=1e-7)
    assert np.allclose(mixed.sum(1), 1, rtol=0, atol=1e-7)


def test_a_certain_posterior_is_that_clusters_answer():
    certain = mixed_log_probs(ANSWERS_KBC.log(), [[1.0, 0.0], [0.0, 1.0]])
    assert torch.isfinite(certain).all()  # also where a weight is zero
    expected = [[0.9, 0.1], [0.5, 0.5]]
    assert np.allclose(certain.exp().numpy(), expected, rtol=0, atol=1e-11)


def test_most_probable_by_hand():
    answer = most_probable_log_probs(ANSWERS_KBC.log(), POSTERIOR_BK).exp().numpy()
    assert np.allclose(answer, [[0.9, 0.1], [0.5, 0.5]], rtol=0, atol=DOUBLE)


@both_kinds
def test_clusters_answers_are_those_of_restricted_gates(kind):
    model = build(kind)
    layout = ExpertLayout.of(model)
    x = torch.randn(7, 4, generator=torch.Generator().manual_seed(2)).double()
    experts_of = [{0: [0, 2], 1: [1]}, {0: [4], 1: [0, 3]}]
    logits_KBC = cluster_logits(
        model, layout, model.state_dict(), experts_of, x, lambda m, inputs: m(inputs)
    )
    assert logits_KBC.shape == (2, 7, 3)
    for logits_BC, experts in zip(logits_KBC, experts_of, strict=True):
        with restricted_gate(model, layout, experts):
            assert torch.allclose(logits_BC, model(x), rtol=0, atol=DOUBLE)


def test_router():
    # Scores x and -x for clusters 1 and 0, and x - log 3 for another group of cluster 0.
    fitted = Discriminants(
        np.array([[1.0, -1.0, 1.0]]), np.array([0.0, 0.0, -np.log(3)]), np.array([1, 0, 0]), 2
    )
    router = Router(lambda x: np.asarray(x, np.float64).reshape(len(x), -1), fitted)
    posterior = router.posterior(torch.tensor([[[0.0]], [[np.log(2)]]]))
    # exp(0), exp(0), 1/3; then 2, 1/2, 2/3.
    expected = [[4 / 7, 3 / 7], [(7 / 6) / (19 / 6), 2 / (19 / 6)]]
    assert np.allclose(posterior, expected, rtol=0, atol=1e-7)
    arrays = router.arrays()
    assert {k: a.shape for k, a in arrays.items()} == {
        "router.weight": (1, 3),
        "router.bias": (3,),
        "router.owner": (3,),
    }
