"""The gate's posterior over clusters, for gates of several kinds."""

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

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
