"""The middle of a model as a session: gradients, what travels, and clients that vanish."""

from __future__ import annotations

import copy
import gc
import hashlib
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from flwr_moe.exchange import Refused
from flwr_moe.split.codecs import CodecKey, Role, cut_codecs
from flwr_moe.tasks.vgg import VGG
from tests.split.halves import tensor_of
from tests.split.test_cut import CLASSES, IMAGES, class_loss
from tests.split.test_ushape import LARGE_IMAGES
from tests.split.ushape_device import RATE, Device, Wire, close, cnn, middle_by_hand, parts_of, same


def models() -> list[Any]:
    from tests.split import test_cut_transformers as cases

    vgg_loss = lambda logits: functional.cross_entropy(logits, CLASSES)  # noqa: E731
    found = [
        (lambda: VGG("vgg-small", width=0.25), {"x": LARGE_IMAGES}, vgg_loss, "features.0"),
    ]
    for family, head, config, loss, _, block in cases.CASES:
        if (family, head) in (("Bert", cases.CLASSIFIER), ("GPT2", "LMHeadModel")):
            build = lambda f=family, h=head, c=config: cases.build(f, h, **c)  # noqa: E731
            found.append((build, cases.BATCH, loss, f"{block}0"))
    return found


@pytest.mark.parametrize("server", ["copies", "shared"])
@pytest.mark.parametrize("case", models(), ids=["VGG", "BERT", "GPT-2"])
def test_gradients_of_all_three_parts_are_autograds(case: Any, server: str) -> None:
    build, inputs, loss_of, at = case
    torch.manual_seed(0)
    model = build().double().train()
    session, split = parts_of(model, at, server=server)
    session.begin_round(1, 1, [0], RATE)
    device = Device(model, session, split)
    device.forward(**inputs)
    trunk = session._round.clients[0].trunk  # type: ignore[union-attr]
    gradients: dict[str, Tensor | None] = {}
    take_step = trunk.optimiser.step
    trunk.optimiser.step = lambda: (  # type: ignore[assignment,method-assign,union-attr]
        gradients.update({n: p.grad for n, p in trunk.half.named_parameters()}),
        take_step(),
    )
    loss = device.backward(loss_of)
    for end in (split.client, split.head):
        gradients.update({name: p.grad for name, p in end.named_parameters()})
    expected = loss_of(tensor_of(model(**inputs)))
    expected.backward()
    assert torch.equal(loss, expected)
    for name, parameter in model.named_parameters():
        got = gradients[name]
        assert parameter.grad is not None and got is not None, name
        assert torch.equal(got, parameter.grad), name


@pytest.mark.parametrize("server", ["copies", "shared"])
def test_the_middle_is_trained_and_its_buffers_move_with_it(server: str) -> None:
    model = cnn()
    session, split = parts_of(model, "2", server=server)
    session.begin_round(1, 2, [0], RATE)
    device = Device(model, session, split)
    before = session.state_dict()
    device.forward(IMAGES)
    assert same(session.state_dict(), before)
    device.backward()
    for end in (split.client, split.head):  # by hand, the ends stay as they were
        end.load_state_dict({n: model.state_dict()[n] for n in end.state_dict()})
    device.step(IMAGES)
    assert session.end_round() == {0: 2}
    assert close(session.state_dict(), middle_by_hand(model, split, 2))
    assert device.link.done == 2
    # Middle: a convolution from 4 to 6 channels, 2 by 2 places, forward and twice backward.
    assert device.link.server_flops == 3 * 2 * 4 * 4 * (4 * 9 * 6)


def test_labels_show_in_nothing_but_the_gradient_at_the_top_cut() -> None:
    def calls(labels: Tensor) -> Wire:
        model = cnn()
        session, split = parts_of(model, "2")
        session.begin_round(1, 1, [0], RATE)
        device = Device(model, session, split)
        device.step(IMAGES, lambda logits: functional.cross_entropy(logits, labels))
        return device.wire

    first, other = calls(CLASSES), calls(CLASSES.flip(0))
    (forward, one), (backward, two) = first.sent
    assert set(forward) == {"activation.values"}
    assert set(backward) == {"gradient.values"}
    facts = {"cut", "top-cut", "codecs", "top-codecs", "model", "examples", "stage", "shape"}
    assert set(one) == set(two) == facts | {"partition", "round", "batch"}
    assert [metadata for _, metadata in other.sent] == [one, two]
    assert same(other.sent[0][0], forward)
    assert not same(other.sent[1][0], backward)
    assert first.came[0][1] == other.came[0][1]
    assert "loss" not in first.came[1][1]


def test_labels_that_come_all_the_same_are_refused() -> None:
    model = cnn()
    session, split = parts_of(model, "2")
    session.begin_round(1, 1, [0], RATE)
    device = Device(model, session, split)
    device.forward(IMAGES)
    tensors, metadata = device.wire.sent[0]
    with pytest.raises(Refused, match="'labels' is not expected: labels stay with the clients"):
        session.handle({**tensors, "labels": CLASSES}, metadata)
    device.backward()


def test_two_cuts_have_masks_and_noises_of_their_own() -> None:
    keys = [CodecKey(3, 1, 0, 0, "activation", place) for place in ("cut", "top")]
    assert keys[0] == CodecKey(3, 1, 0, 0, "activation")
    assert keys[0].seed_of("dropout") != keys[1].seed_of("dropout")
    as_ever = hashlib.sha256(b"layers/7/2/3/4").digest()[:7]
    assert CodecKey(7, 2, 3, 4, "gradient").seed_of("layers") == int.from_bytes(as_ever, "little")
    masks = [cut_codecs(dropout=0.5)["activation"].codecs[0].mask((2, 64), key) for key in keys]  # type: ignore[attr-defined]
    assert not torch.equal(*masks)


def test_codecs_work_at_both_cuts() -> None:
    model = cnn().float()
    session, split = parts_of(model, "2", bits=8, dropout=0.5)
    session.begin_round(1, 1, [0], RATE)
    device = Device(model, session, split, bits=8, dropout=0.5)
    device.step(IMAGES.float())
    # A byte a value and a scale a sample; half of the values at the cut, all at the top cut.
    at_cut, at_top = 4 * (4 * 64 // 2 + 4), 4 * (24 + 4)
    roles: tuple[Role, Role] = ("activation", "gradient")
    assert [device.link.moved[role, "cut"] for role in roles] == [at_cut, at_cut]
    assert [device.link.moved[role, "top"] for role in roles] == [at_top, at_top]
    assert session.end_round() == {0: 1}


@pytest.mark.parametrize("server", ["copies", "shared"])
def test_a_client_that_vanishes_between_its_requests_costs_that_batch_alone(server: str) -> None:
    model = cnn()
    session, split = parts_of(model, "2", server=server)
    session.begin_round(1, 2, [0, 1], RATE)
    device, gone = Device(model, session, split), Device(model, session, split, number=1)
    gone.forward(3 * IMAGES)
    held = weakref.ref(session._round.clients[1].pending.output)  # type: ignore[union-attr]
    device.step(IMAGES)
    assert held() is not None
    assert session.end_round() == {0: 1, 1: 0}
    assert close(session.state_dict(), middle_by_hand(model, split))
    gc.collect()
    assert held() is None
    with pytest.raises(Refused, match="round is 1, none is open") as refused:
        gone.backward()
    assert refused.value.status == 409
    session.begin_round(2, 1, [1], RATE)
    Device(model, session, split, number=1, round_=2).step(IMAGES)
    assert session.end_round() == {1: 1}


def test_what_is_held_is_let_go_when_the_gradient_has_come() -> None:
    model = cnn()
    session, split = parts_of(model, "2")
    session.begin_round(1, 2, [0], RATE)
    device = Device(model, session, split)
    device.forward(IMAGES)
    held = weakref.ref(session._round.clients[0].pending.output)  # type: ignore[union-attr]
    device.backward()
    gc.collect()
    assert held() is None


def test_a_shared_middle_takes_gradients_of_older_parameters() -> None:
    model = cnn()
    session, split = parts_of(model, "2", server="shared")
    session.begin_round(1, 1, [0, 1], RATE)
    one, two = (Device(model, session, copy.deepcopy(split), number=n) for n in (0, 1))
    one.forward(IMAGES)
    two.forward(-IMAGES)
    two.backward()
    one.backward()
    session.end_round()

    whole = copy.deepcopy(model)
    names = set(split.server.state_dict())
    parameters = {n: p for n, p in whole.named_parameters() if n in names}
    gradients = []
    for x in (-IMAGES, IMAGES):
        whole.zero_grad()
        class_loss(whole(x)).backward()
        gradients.append({n: p.grad.clone() for n, p in parameters.items() if p.grad is not None})
    optimiser = torch.optim.Adam(parameters.values(), lr=RATE)
    for gradient in gradients:  # both of the parameters that the round began with
        for name, parameter in parameters.items():
            parameter.grad = gradient[name]
        optimiser.step()
    state = session.state_dict()
    for name, parameter in parameters.items():
        assert torch.allclose(state[name], parameter, rtol=0, atol=1e-12), name
    assert state["5.num_batches_tracked"] == 2
    # Each pass moved the statistics by a tenth of what it saw from where they were.
    alone = []
    for x in (-IMAGES, IMAGES):
        model_alone = copy.deepcopy(model)
        model_alone(x)
        alone.append(model_alone[5].running_mean - model[5].running_mean)
    moved = state["5.running_mean"] - model[5].running_mean
    assert torch.allclose(moved, alone[0] + alone[1], rtol=0, atol=1e-12)


def test_repeated_and_late_requests_are_refused_and_the_session_goes_on() -> None:
    model = cnn()
    session, split = parts_of(model, "2")
    session.begin_round(1, 2, [0], RATE)
    device = Device(model, session, split)
    device.forward(IMAGES)
    forward = device.wire.sent[0]
    shape = {"shape": "4,24", "stage": "backward"}
    unripe = {**forward[1], **shape}
    for tensors, metadata, status, message in (
        (*forward, 409, "batch 0 of round 1 is not expected again"),
        ({}, unripe, 422, "gradient: wire tensor 'values' is missing"),
        ({"gradient.values": torch.ones(4, 23)}, unripe, 422, r"gradient is torch.float32 \(4, 23"),
        (
            {"gradient.values": torch.full((4, 24), torch.nan).double()},
            unripe,
            422,
            "gradient has values that are not finite",
        ),
        ({}, {**unripe, "stage": "both"}, 422, "stage is 'both', expected 'forward' or"),
        ({}, {**unripe, "batch": "1"}, 409, "batch is 1, expected 0 of 2"),
    ):
        with pytest.raises(Refused, match=message) as refused:
            session.handle(tensors, metadata)
        assert refused.value.status == status
    device.backward()
    for tensors, metadata in device.wire.sent:
        with pytest.raises(Refused, match="batch is 0, expected 1 of 2"):
            session.handle(tensors, metadata)
    with pytest.raises(Refused, match="gradient of batch 1 of round 1 is not expected"):
        session.handle(device.wire.sent[1][0], {**unripe, "batch": "1"})
    for end in (split.client, split.head):
        end.load_state_dict({n: model.state_dict()[n] for n in end.state_dict()})
    device.step(IMAGES)
    session.end_round()
    assert close(session.state_dict(), middle_by_hand(model, split, 2))


def test_another_top_cut_is_refused_by_name() -> None:
    model = cnn()
    session, split = parts_of(model, "2")
    session.begin_round(1, 1, [0], RATE)
    with pytest.raises(Refused, match="top-cut is '5', expected '7'"):
        Device(model, session, split, top_cut="5").step(IMAGES)
    Device(model, session, split).step(IMAGES)


def test_random_layers_of_the_middle_draw_from_the_batch_alone() -> None:
    def top(disturb: bool) -> Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 8), nn.Linear(8, 5)
        ).double()
        session, split = parts_of(model, "0", "2")
        session.begin_round(1, 1, [0], RATE)
        device = Device(model, session, split)
        torch.rand(7 if disturb else 1)
        device.forward(torch.ones(4, 3).double())
        return device.top.detach()

    assert torch.equal(top(False), top(True))
