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
from flwr_moe.experts.mixture import ClusterAnswers
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


def test_answers_of_every_token_are_mixed_like_those_of_samples():
    # Two clusters, one sample of two tokens, two classes.
    tokens_KBTC = ANSWERS_KBC.unsqueeze(1).log()
    mixed = mixed_log_probs(tokens_KBTC, [[0.75, 0.25]]).exp()
    assert mixed.shape == (1, 2, 2)
    expected = [[0.75 * 0.9 + 0.25 * 0.2, 0.275], [0.75 * 0.6 + 0.25 * 0.5, 0.425]]
    assert np.allclose(mixed[0].numpy(), expected, rtol=0, atol=1e-7)
    best = most_probable_log_probs(tokens_KBTC, [[0.25, 0.75]]).exp()
    assert np.allclose(best[0].numpy(), [[0.2, 0.8], [0.5, 0.5]], rtol=0, atol=DOUBLE)


@both_kinds
def test_only_clusters_that_changed_answer_anew(kind):
    model = build(kind)
    layout = ExpertLayout.of(model)
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(2)).double()
    experts_of = [{0: [0, 2], 1: [1]}, {0: [4], 1: [0, 3]}]
    asked = []

    def predict(submodel, inputs):
        asked.append(1)
        return submodel(inputs)

    answers = ClusterAnswers(model, layout, x, predict)

    def check(state, owned, new):
        before = len(asked)
        got = answers(state, owned)
        expected = cluster_logits(model, layout, state, owned, x, lambda m, inputs: m(inputs))
        assert torch.equal(got, expected) and len(asked) - before == new

    state = {key: value.clone() for key, value in model.state_dict().items()}
    check(state, experts_of, 2)
    check({key: value.clone() for key, value in state.items()}, experts_of, 0)
    part = layout.take(state, {0: [2]})
    changed = layout.put(state, {key: value + 1 for key, value in part.items()})
    check(changed, experts_of, 1)
    # Experts that nobody asks, then the shared part.
    idle = {key: value * 2 for key, value in layout.take(state, {0: [3]}).items()}
    check(layout.put(changed, idle), experts_of, 0)
    shared = next(key for key in layout.shared(state) if key.endswith("weight"))
    check({**changed, shared: changed[shared] * 1.5}, experts_of, 2)
    # Another owner of the same experts is another answer: the gate's rows are in another order.
    check({**changed, shared: changed[shared] * 1.5}, [{0: [2, 0], 1: [1]}, experts_of[1]], 1)
