"""The gate's posterior over clusters, for gates of several kinds."""

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord

from flwr_moe.app.judge import EMSJudge
from flwr_moe.experts import ExpertLayout
from flwr_moe.strategies import EMSFL
from tests.strategies.families import Tokens

OWNED = [{0: [0, 3], 1: [0, 1]}, {0: [1, 2, 4, 5], 1: [2, 3, 4, 5]}]


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss", "llama4"])
def test_a_plain_gates_posterior_is_its_mass_on_own_experts(name):
    task = Tokens(name, 2, 2)
    model = task.warm_model().eval()
    layout = ExpertLayout.of(model)
    judge = EMSJudge(task, EMSFL(layout, gate="plain"), "mixture")
    judge.model.load_state_dict(model.state_dict())
    posterior_BK = judge.posterior(OWNED, None)

    seen = []
    gate = model.get_submodule(layout.moe_layers[0].gate)
    gate.register_forward_hook(lambda module, args, output: seen.append(output))
    x = torch.cat([part.x for part in task.test_data()])
    with torch.no_grad():
        model(x)
    logits_TE = seen[0][1 if name == "llama4" else 0].double()
    probs_TE = logits_TE.sigmoid() if name == "llama4" else logits_TE.exp()
    probs_BE = (probs_TE / probs_TE.sum(1, keepdim=True)).reshape(len(x), -1, 6).mean(1)
    expected = torch.stack([probs_BE[:, experts[0]].sum(1) for experts in OWNED], 1)
    assert posterior_BK.shape == (len(x), 2)
    np.testing.assert_allclose(posterior_BK, expected.numpy(), rtol=0, atol=1e-5)
    assert np.ptp(posterior_BK[:, 0]) > 0.01


def test_the_first_model_answers_for_clusters_that_were_not_heard_of():
    task = Tokens("mixtral", 2, 2)
    start, later = task.warm_model().eval(), task.warm_model().eval()
    with torch.no_grad():
        for parameter in later.parameters():
            parameter.mul_(1.5)
    layout = ExpertLayout.of(start)
    judge = EMSJudge(task, EMSFL(layout, gate="plain"), "mixture")
    before = judge(ArrayRecord(start.state_dict()))()  # nobody has been heard of yet
    assert judge(ArrayRecord(later.state_dict()))() == before
    owned = OWNED[:1]
    _, loss = judge._verdict(ArrayRecord(later.state_dict()), owned, None)

    x, y = (torch.cat(parts) for parts in zip(*((t.x, t.y) for t in task.test_data()), strict=True))
    with torch.no_grad():
        first = start(x).double().softmax(-1)
        second = layout.submodel(later, owned[0]).eval()(x).double().softmax(-1)
    mass_B = torch.from_numpy(judge.posterior(owned, None)[:, 0])
    mixed = 0.5 * mass_B[:, None, None] * second + 0.5 * first
    expected = -(mixed / mixed.sum(-1, keepdim=True)).log().gather(-1, y[..., None]).mean()
    assert loss == pytest.approx(float(expected), abs=1e-5)
    # Heard of both, nothing is left of it.
    _, loss = judge._verdict(ArrayRecord(later.state_dict()), OWNED, None)
    alone = EMSJudge(task, EMSFL(layout, gate="plain"), "mixture")
    assert loss == alone._verdict(ArrayRecord(later.state_dict()), OWNED, None)[1]
