"""A user's own training function in EMS-FL, with every family of transformers' MoE models."""

import threading

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from torch.nn import functional

from flwr_moe.arrays import record_of, tensors_of
from flwr_moe.client_apps.ems_fl.mod import expert_mod, restricted_models
from flwr_moe.experts import ExpertLayout, restricted_gate
from flwr_moe.messages.ems_fl import TRAIN_EXPERTS
from tests.experts.models import build
from tests.experts.test_families import every
from tests.local_grid import LocalGrid
from tests.strategies.families import Tokens

OWN = {0: [4, 1], 1: [0, 5]}
ROUNDING = 1e-5


def one_step(model, data):
    """Plain gradient descent on everything."""
    loss = functional.cross_entropy(model(data.x).flatten(0, 1), data.y.flatten())
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.5 * parameter.grad


def users_app(task, layout, run):
    app = ClientApp(mods=[expert_mod(layout)])

    @app.train("experts")
    def train(message: Message, context: Context) -> Message:
        state = tensors_of(message.content["arrays"])
        model = task.build_model().eval()
        model.load_state_dict(state)
        model = run(model, task.train_data(0)) or model
        return Message(RecordDict({"arrays": record_of(model.state_dict())}), reply_to=message)

    return app


def ask(app, layout, state, experts=OWN, **config):
    grid = LocalGrid(app, 1)
    order = {f"experts.{i}": ids for i, ids in experts.items()}
    content = RecordDict(
        {
            "experts": record_of(layout.take(state, experts)),
            "shared": record_of(layout.shared(state)),
            "config": ConfigRecord({**order, **config}),
        }
    )
    (reply,) = grid.send_and_receive([Message(content, grid.node_id(0), TRAIN_EXPERTS)])
    return reply


@every
def test_a_users_full_model_learns_what_the_submodel_learns(name):
    task = Tokens(name, 1, 1)
    model = task.warm_model().eval()
    layout = ExpertLayout.of(model)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    small = layout.submodel(model, OWN)
    one_step(small, task.train_data(0))
    expected = layout.from_submodel_state(small.state_dict(), OWN)
    reply = ask(users_app(task, layout, one_step), layout, state, **{"train-shared": True})
    got = tensors_of(reply.content["experts"])
    assert got.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(got[key], tensor, rtol=0, atol=ROUNDING)
    before = layout.take(state, OWN)
    assert max((got[key] - before[key]).abs().max() for key in got) > 1e-3
    shared = tensors_of(reply.content["trained-shared"])
    assert shared.keys() == layout.shared(state).keys() - set(sum(layout.gate_rows, ()))
    for key, tensor in shared.items():
        torch.testing.assert_close(tensor, small.state_dict()[key], rtol=0, atol=ROUNDING)
    # Afterwards models of this layout run as they are.
    with torch.no_grad():
        assert not torch.allclose(model(task.train_data(0).x), small(task.train_data(0).x))


def parts_only(model, data):
    hidden = model.inner.model(input_ids=data.x).last_hidden_state
    logits = model.inner.lm_head(hidden)
    functional.cross_entropy(logits.flatten(0, 1), data.y.flatten()).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.5 * parameter.grad


def test_gates_that_could_not_be_restricted_are_an_error():
    task = Tokens("mixtral", 1, 1)
    model = task.warm_model()
    layout, state = ExpertLayout.of(model), model.state_dict()
    reply = ask(users_app(task, layout, parts_only), layout, state)
    assert "no model with the layout's experts was called" in reply.error.reason
    # Nothing was trained: nothing was trained wrongly.
    reply = ask(users_app(task, layout, lambda model, data: None), layout, state)
    sent = layout.take(state, OWN)
    got = tensors_of(reply.content["experts"])
    assert all(torch.equal(got[key], sent[key]) for key in sent)


def test_models_of_other_threads_run_as_they_are():
    mine = build("list")
    x = torch.randn(7, 4, dtype=torch.float64)
    layout = ExpertLayout.of(mine)
    full = mine(x)
    with restricted_gate(mine, layout, [1]):
        expected = mine(x)
    assert not torch.allclose(full, expected)
    found = []
    with restricted_models(layout, {0: [1], 1: [1]}) as seen:
        torch.nn.Linear(2, 2)(torch.ones(2))
        thread = threading.Thread(target=lambda: found.append(mine(x)))
        thread.start()
        thread.join()
        assert not seen
        assert torch.equal(mine(x), expected) and torch.equal(mine(x), expected)
        assert len(seen) == 1
    assert torch.equal(found[0], full) and torch.equal(mine(x), full)


def test_a_closed_bias_and_a_restriction_agree():
    model = build("fused").float()
    layout, x = ExpertLayout.of(model), torch.randn(9, 4)
    seen = []
    app = ClientApp(mods=[expert_mod(layout)])

    @app.train("experts")
    def train(message: Message, context: Context) -> Message:
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        seen.append(model(x))
        return Message(RecordDict({"arrays": ArrayRecord(model.state_dict())}), reply_to=message)

    state = {key: value.clone() for key, value in model.state_dict().items()}
    experts = {0: [4, 1], 1: [0, 2]}
    small = layout.submodel(model, experts)
    assert ask(app, layout, state, experts).has_content()
    torch.testing.assert_close(seen[0], small(x), rtol=0, atol=ROUNDING)
