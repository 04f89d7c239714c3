"""The server half as a session: gradients, averages, and what it turns down."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from flwr_moe.exchange import Refused
from flwr_moe.experts import SparseMoE
from flwr_moe.split.codecs import CodecKey, Encoded, Role, cut_codecs, shape_text
from flwr_moe.split.protocol import ACTIVATION, GRADIENT, agreement
from flwr_moe.split.prune_groups import Cut, PruneGroup
from flwr_moe.split.session import SplitSession

WHOLE = {"first.weight": torch.zeros(4, 2), "second.weight": torch.zeros(3, 4)}
LABELS = torch.tensor([0, 2, 1, 1, 0], dtype=torch.uint8)
RATE = 0.1


def server_half() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.ReLU(), nn.Linear(4, 3)).double()


def activation_of(client: int, batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * client + batch)
    return torch.randn(5, 4, generator=generator, dtype=torch.float64)


class Client:
    """Sends batches of one client to a session, as a device would."""

    def __init__(self, session: SplitSession, number: int, examples: int = 10, **codec: Any):
        self.session, self.number, self.examples = session, number, examples
        self.codecs = cut_codecs(**codec)

    def send(
        self,
        batch: int,
        /,
        activation: Tensor | None = None,
        labels: Tensor = LABELS,
        round_: int = 1,
        **other: str | None,
    ) -> tuple[Tensor, float, dict[str, str]]:
        x = activation_of(self.number, batch) if activation is None else activation
        key = self.key(batch, "activation", round_)
        encoded = self.codecs["activation"].encode(x, key).under(ACTIVATION)
        told: dict[str, str | None] = {
            **agreement(WHOLE, "first", self.codecs),
            "partition": str(self.number),
            "round": str(round_),
            "batch": str(batch),
            "examples": str(self.examples),
            "shape": shape_text(x.shape),
            **encoded.metadata,
            **other,
        }
        answer, facts = self.session.handle(
            {**encoded.tensors, "labels": labels}, {k: v for k, v in told.items() if v is not None}
        )
        encoded = Encoded(answer, facts).within(GRADIENT)
        gradient = self.codecs["gradient"].decode(encoded, self.key(batch, "gradient", round_))
        return gradient, float(facts["loss"]), facts

    def key(self, batch: int, role: Role, round_: int) -> CodecKey:
        return CodecKey(3, round_, batch, self.number, role)


def session_of(half: nn.Module | None = None, **settings: Any) -> SplitSession:
    codecs = cut_codecs(**settings.pop("codec", {}))
    return SplitSession(
        half or server_half(), codecs, agreement(WHOLE, "first", codecs), seed=3, **settings
    )


def train(half: nn.Module, client: int, batches: int, clip: float = 0.0) -> list[Tensor]:
    """Train a half by hand on a client's activations; the gradients of those."""
    optimiser = torch.optim.Adam(half.parameters(), lr=RATE)
    gradients = []
    for batch in range(batches):
        x = activation_of(client, batch).requires_grad_()
        optimiser.zero_grad()
        functional.cross_entropy(half(x), LABELS.long()).backward()
        assert x.grad is not None
        gradients.append(x.grad)
        if clip:
            norm = torch.cat([p.grad.flatten() for p in half.parameters()]).norm()
            for p in half.parameters():
                p.grad *= min(1.0, clip / (float(norm) + 1e-6))  # as torch has it
        optimiser.step()
    return gradients


def same(state: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return all(torch.allclose(state[k], t, rtol=1e-12, atol=1e-14) for k, t in expected.items())


def test_gradient_and_loss_are_autograds() -> None:
    session, half = session_of(), server_half()
    session.begin_round(1, 2, [0], RATE)
    x = activation_of(0, 0).requires_grad_()
    loss = functional.cross_entropy(half(x), LABELS.long())
    loss.backward()
    gradient, told, facts = Client(session, 0).send(0)
    assert torch.equal(gradient, x.grad)
    assert told == loss.item()
    # Forward, gradient of the weight and of the input: three products of 5 x 4 x 3.
    assert int(facts["server-flops"]) == 3 * 2 * 5 * 4 * 3


@pytest.mark.parametrize("order", [[0, 0, 1, 1, 1], [1, 0, 1, 0, 1]])
def test_copies_are_averaged_by_examples_and_batches_done(order: list[int]) -> None:
    session = session_of(clip=0.05)
    session.begin_round(1, 3, [0, 1, 2], RATE)
    clients = [Client(session, 0, examples=10), Client(session, 1, examples=30)]
    sent = [0, 0]
    gradients: list[list[Tensor]] = [[], []]
    for number in order:
        gradients[number].append(clients[number].send(sent[number])[0])
        sent[number] += 1
    assert session.end_round() == {0: 2, 1: 3}  # client 0 went away before its third batch
    halves = [server_half(), server_half()]
    for number in (0, 1):
        by_hand = train(halves[number], number, sent[number], clip=0.05)
        for got, expected in zip(gradients[number], by_hand, strict=True):
            assert torch.allclose(got, expected, rtol=1e-10)
    weights = [10 * 2 / 3, 30]
    expected = {
        key: (halves[0].state_dict()[key] * weights[0] + tensor * weights[1]) / sum(weights)
        for key, tensor in halves[1].state_dict().items()
    }
    assert same(session.state_dict(), expected)


def test_a_shared_half_is_trained_batch_by_batch_and_its_optimiser_goes_on() -> None:
    session, half = session_of(server="shared"), server_half()
    optimiser = torch.optim.Adam(half.parameters(), lr=RATE)
    for round_, client, batch in [(1, 0, 0), (1, 1, 0), (1, 0, 1), (2, 1, 0)]:
        if batch == client == 0 or round_ == 2:
            session.begin_round(round_, 2, [0, 1], RATE)
        Client(session, client).send(batch, round_=round_)
        optimiser.zero_grad()
        x = activation_of(client, batch)
        functional.cross_entropy(half(x), LABELS.long()).backward()
        optimiser.step()
    session.end_round()
    assert same(session.state_dict(), half.state_dict())


def test_a_round_begins_with_the_average_of_the_one_before() -> None:
    session, half = session_of(), server_half()
    for round_ in (1, 2):
        session.begin_round(round_, 1, [0], RATE)
        Client(session, 0).send(0, round_=round_)
        train(half, 0, 1)
        session.end_round()
    assert same(session.state_dict(), half.state_dict())


def test_units_pruned_at_the_cut_are_zeros_and_get_no_gradient() -> None:
    group = PruneGroup("first", "hidden", 4, (), (Cut("first.weight", 0),), -1)
    session, half = session_of(output=group), server_half()
    session.begin_round(1, 1, [0], RATE)
    small = activation_of(0, 0)[:, [0, 3]]
    whole = torch.zeros(5, 4, dtype=torch.float64)
    whole[:, [0, 3]] = small
    whole.requires_grad_()
    functional.cross_entropy(half(whole), LABELS.long()).backward()
    gradient, _, _ = Client(session, 0).send(0, small, kept="0,3")
    assert whole.grad is not None
    assert torch.equal(gradient, whole.grad[:, [0, 3]])


def test_expert_layers_add_their_balance_loss() -> None:
    torch.manual_seed(0)
    half = nn.Sequential(SparseMoE(4, 6, 3, 1), nn.Linear(4, 3)).double()
    whole = copy.deepcopy(half)
    session = session_of(half)
    session.begin_round(1, 1, [0], RATE)
    x = activation_of(0, 0).requires_grad_()
    loss = functional.cross_entropy(whole(x), LABELS.long()) + 0.01 * whole[0].load_balance_loss
    loss.backward()
    assert torch.equal(Client(session, 0).send(0)[0], x.grad)


def test_random_layers_draw_from_the_batch_alone() -> None:
    def gradients(disturb: bool) -> list[Tensor]:
        half = nn.Sequential(nn.Dropout(0.5), *server_half())
        session = session_of(half)
        session.begin_round(1, 2, [0], RATE)
        if disturb:
            torch.rand(7)
        before = torch.get_rng_state()
        result = [Client(session, 0).send(batch)[0] for batch in (0, 1)]
        assert torch.equal(torch.get_rng_state(), before)
        return result

    first, second = gradients(False), gradients(True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0] == 0, first[1] == 0)


def test_convolutions_are_laid_out_for_speed_and_compute_the_same() -> None:
    torch.manual_seed(0)
    half = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    whole = copy.deepcopy(half)
    session = session_of(half)
    session.begin_round(1, 1, [0], RATE)
    assert half[0].weight.is_contiguous(memory_format=torch.channels_last)
    x = torch.randn(5, 4, 3, 3).requires_grad_()
    functional.cross_entropy(whole(x), LABELS.long()).backward()
    torch.testing.assert_close(Client(session, 0).send(0, x.detach())[0], x.grad)


def wrong(message: str, status: int = 422, **changes: Any) -> Any:
    return pytest.param(changes, message, status, id=message)


@pytest.mark.parametrize(
    ("changes", "message", "status"),
    [
        wrong("cut is 'second', expected 'first'", cut="second"),
        wrong("cut is None, expected 'first'", cut=None),
        wrong("model is 'other', expected", model="other"),
        wrong("round is 2, expected 1", 409, round="2"),
        wrong("round is '-1', expected a whole number from 0", round="-1"),
        wrong("partition is 7, which has no part in this round", partition="7"),
        wrong("batch is 5, expected 1 of 3 in this round", 409, batch="5"),
        wrong("examples are 11, expected 10 as before", examples="11"),
        wrong("examples is '0', expected a whole number from 1", examples="0"),
        wrong(r"activation has shape \(5, 4\), \(5, 3\) was announced", shape="5,3"),
        wrong("shape is 'many', expected whole numbers and commas", shape="many"),
        wrong(
            r"samples have shape \(3,\), expected \(4,\) as before",
            activation=torch.ones(5, 3).double(),
        ),
        wrong(
            r"labels are torch.uint8 \(5,\), expected whole numbers for 4",
            activation=torch.ones(4, 4).double(),
        ),
        wrong("the server half cannot use the batch: Target 9", labels=torch.full((5,), 9)),
        wrong("labels are torch.float32", labels=torch.ones(5)),
        wrong("units at the cut are pruned, which is not expected", kept="0,1"),
    ],
)
def test_what_is_wrong_is_refused_and_changes_nothing(
    changes: dict[str, Any], message: str, status: int
) -> None:
    session = session_of()
    session.begin_round(1, 3, [0], RATE)
    client = Client(session, 0)
    client.send(0)
    with pytest.raises(Refused, match=message) as refused:
        client.send(1, **changes)
    assert refused.value.status == status
    client.send(1)
    client.send(2)
    assert session.end_round() == {0: 3}
    half = server_half()
    train(half, 0, 3)
    assert same(session.state_dict(), half.state_dict())


def test_values_that_are_not_finite_are_refused() -> None:
    session = session_of()
    session.begin_round(1, 1, [0], RATE)
    bad = activation_of(0, 0)
    tensors = {ACTIVATION + "values": bad.index_fill(0, torch.tensor([1]), float("nan"))}
    metadata = {
        **agreement(WHOLE, "first", cut_codecs()),
        **{"partition": "0", "round": "1", "batch": "0", "examples": "1", "shape": "5,4"},
    }
    with pytest.raises(Refused, match="activation has values that are not finite"):
        session.handle({**tensors, "labels": LABELS}, metadata)
    Client(session, 0, examples=1).send(0)


def test_another_codec_is_refused_by_name() -> None:
    session = session_of(codec={"bits": 8})
    session.begin_round(1, 1, [0], RATE)
    with pytest.raises(Refused, match=r"codecs is .*Passthrough.*expected .*Quantise\(bits=8"):
        Client(session, 0).send(0)
    Client(session, 0, bits=8).send(0)


def test_nothing_is_taken_outside_a_round() -> None:
    session = session_of()
    with pytest.raises(Refused, match="round is 1, none is open"):
        Client(session, 0).send(0)
    session.begin_round(1, 1, [0], RATE)
    Client(session, 0).send(0)
    with pytest.raises(Refused, match="batch is 1, expected 1 of 1"):
        Client(session, 0).send(1)
    session.end_round()
    with pytest.raises(Refused, match="none is open") as refused:
        Client(session, 0).send(0)
    assert refused.value.status == 409
    assert session.end_round() == {}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"server": "many"}, "server is 'many', expected one of copies, shared"),
        ({"clip": -1.0}, "clip is -1.0, expected 0"),
    ],
)
def test_bad_settings_are_named(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        session_of(**bad)
