"""A client of a model in a U-shape, in one process with its session, and the same by hand."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from flwr_moe.client_apps.split.link import CutLink
from flwr_moe.split.codecs import CodecKey, cut_codecs
from flwr_moe.split.cut import Split, split_in_three
from flwr_moe.split.protocol import agreement
from flwr_moe.split.session import SplitSession
from tests.split.test_cut import IMAGES, class_loss, small_cnn

RATE = 0.01
Call = tuple[dict[str, Tensor], dict[str, str]]


class Wire:
    """An exchange without a network, which remembers what went over it."""

    def __init__(self, session: SplitSession) -> None:
        self.session = session
        self.sent: list[Call] = []
        self.came: list[Call] = []

    def call(self, handler: str, tensors: dict[str, Tensor], metadata: dict[str, str]) -> Call:
        self.sent.append((tensors, metadata))
        self.came.append(self.session.handle(tensors, metadata))
        return self.came[-1]


class Device:
    """One client with bottom and head, without an optimiser of its own."""

    def __init__(
        self,
        model: nn.Module,
        session: SplitSession,
        split: Split,
        number: int = 0,
        round_: int = 1,
        top_cut: str = "",
        **codec: Any,
    ) -> None:
        self.split = split
        codecs, top = cut_codecs(**codec), cut_codecs(bits=codec.get("bits"))
        agreed = agreement(model.state_dict(), split.at, codecs, top_cut or split.top_cut, top)
        self.wire = Wire(session)
        key = CodecKey(3, round_, 0, number, "activation")
        self.link = CutLink(self.wire, codecs, key, agreed, 10, top_codecs=top)

    def forward(self, *args: Any, **kwargs: Any) -> None:
        self.activation, *self.context = self.split.client(*args, **kwargs)
        up = self.context[: self.split.num_up]
        self.top = self.link.forward(self.activation.detach(), up).requires_grad_()

    def backward(self, loss_of: Any = class_loss) -> Tensor:
        loss = loss_of(self.split.head(self.top, *self.context))
        loss.backward()
        assert self.top.grad is not None
        self.activation.backward(self.link.backward(self.top.grad, self.activation))
        return loss.detach()

    def step(self, x: Tensor, loss_of: Any = class_loss) -> Tensor:
        self.forward(x)
        return self.backward(loss_of)


def parts_of(
    model: nn.Module, at: str, top: str = "", server: str = "copies", **codec: Any
) -> tuple[SplitSession, Split]:
    """A session of a model's middle, and a client's own copy of the parts."""
    split = split_in_three(copy.deepcopy(model), at, top)
    codecs, top_codecs = cut_codecs(**codec), cut_codecs(bits=codec.get("bits"))
    agreed = agreement(model.state_dict(), at, codecs, split.top_cut, top_codecs)
    session = SplitSession(
        split.server, codecs, agreed, top_codecs=top_codecs, seed=3, server=server
    )
    return session, split_in_three(copy.deepcopy(model), at, top)


def cnn() -> nn.Module:
    torch.manual_seed(1)
    return small_cnn().double().train()


def middle_by_hand(model: nn.Module, split: Split, batches: int = 1) -> dict[str, Tensor]:
    """State of a model after steps of Adam on the middle alone."""
    model = copy.deepcopy(model)
    names = set(split.server.state_dict())
    parameters = [p for name, p in model.named_parameters() if name in names]
    optimiser = torch.optim.Adam(parameters, lr=RATE, fused=True)
    for _ in range(batches):
        optimiser.zero_grad()
        class_loss(model(IMAGES)).backward()
        optimiser.step()
    return {name: t for name, t in model.state_dict().items() if name in names}


def same(state: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return state.keys() == expected.keys() and all(
        torch.equal(state[name], tensor) for name, tensor in expected.items()
    )


def close(state: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """Compare up to the rounding of the average of copies."""
    return state.keys() == expected.keys() and all(
        torch.allclose(state[name], tensor, rtol=0, atol=1e-13) for name, tensor in expected.items()
    )
