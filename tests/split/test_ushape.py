"""Cutting models in three: where, what the parts hold, and their gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from flwr_moe.split.cut import split_in_three
from flwr_moe.tasks.models import MoEClassifier
from flwr_moe.tasks.vgg import VGG
from tests.split.halves import Loss, tensor_of
from tests.split.test_cut import (
    CLASSES,
    IDS,
    IMAGES,
    Encoder,
    Residual,
    class_loss,
    small_cnn,
    token_loss,
)

LARGE_IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double()


def assert_same_step(
    model: nn.Module, inputs: Tensor | dict[str, Tensor], loss_of: Loss, at: str, top_cut: str
) -> str:
    """Compare a step in three parts with one of the whole model, bitwise; where it was cut."""
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else ((inputs,), {})
    whole, mine = model.double().train(), copy.deepcopy(model).double().train()
    expected = loss_of(tensor_of(whole(*args, **kwargs)))
    expected.backward()
    split = split_in_three(mine, at, top_cut, inputs)
    keys = [set(part.state_dict()) for part in (split.client, split.server, split.head)]
    assert all(keys)
    assert sum(len(part) for part in keys) == len(set().union(*keys)) == len(model.state_dict())
    assert split.client_state_dict().keys() == keys[0] | keys[2]

    activation, *context = split.client(*args, **kwargs)
    arrived = activation.detach().requires_grad_()
    top = split.server(arrived, *context[: split.num_up])
    top_arrived = top.detach().requires_grad_()
    loss = loss_of(split.head(top_arrived, *context))
    loss.backward()
    top.backward(top_arrived.grad)
    activation.backward(arrived.grad)

    assert torch.equal(loss, expected)
    for (name, a), b in zip(whole.named_parameters(), mine.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        assert a.grad is None or torch.equal(a.grad, b.grad), name
    for (name, a), b in zip(whole.named_buffers(), mine.buffers(), strict=True):
        assert torch.equal(a, b), name
    return split.top_cut


@pytest.mark.parametrize(("at", "top"), [("0", ""), ("0", "3"), ("1", "4")])
def test_gradients_of_a_cnn_are_those_of_the_whole_model(at: str, top: str) -> None:
    assert assert_same_step(small_cnn(), IMAGES, class_loss, at, top) == (top or "7")


def test_gradients_of_a_residual_network_and_of_vgg() -> None:
    assert assert_same_step(Residual(), IMAGES, class_loss, "stem", "") == "blocks.1"
    vgg = VGG("vgg-small", width=0.25)
    loss = lambda logits: functional.cross_entropy(logits, CLASSES)  # noqa: E731
    assert assert_same_step(vgg, LARGE_IMAGES, loss, "features.0", "") == "flatten"
    head = split_in_three(vgg, "features.0").head
    assert set(head.state_dict()) == {"classifier.weight", "classifier.bias"}


def test_a_mask_reaches_the_middle_and_what_is_unused_is_the_servers() -> None:
    assert assert_same_step(Encoder(), IDS, token_loss, "embed", "blocks.1") == "blocks.1"
    split = split_in_three(Encoder(), "embed", "blocks.2")
    assert split.num_up == 1
    assert "unused.weight" in split.server.state_dict()


class LateMask(nn.Module):
    """Only the head looks at the mask, and it adds a constant that no part owns."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.middle = nn.Linear(8, 8)
        self.head = nn.Linear(8, 20)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.middle(self.embed(ids))
        return self.head(h * (ids != 0)[..., None]) + torch.ones(1)


def test_what_only_the_head_needs_does_not_travel() -> None:
    assert assert_same_step(LateMask(), IDS, token_loss, "embed", "") == "middle"
    split = split_in_three(LateMask(), "embed")
    assert split.num_up == 0
    assert [t.dtype for t in split.client(IDS)[1:]] == [torch.bool]


def transformers_cases() -> list[Any]:
    from tests.split import test_cut_transformers as cases

    wanted = {("Bert", cases.CLASSIFIER), ("GPT2", "LMHeadModel"), ("GPT2", cases.CLASSIFIER)}
    wanted |= {("Llama", "ForCausalLM"), ("DistilBert", cases.CLASSIFIER)}
    return [case for case in cases.CASES if case[:2] in wanted]


@pytest.mark.parametrize("case", transformers_cases(), ids=lambda case: case[0] + case[1])
def test_gradients_of_transformers_are_those_of_the_whole_model(case: Any) -> None:
    from tests.split.test_cut_transformers import BATCH, build

    family, head, config, loss, embeddings, block = case
    for at, top in ((embeddings, f"{block}0"), (f"{block}0", "")):
        model = build(family, head, **config)
        assert assert_same_step(model, BATCH, loss, at, top) == (top or f"{block}2")


@pytest.mark.parametrize(
    ("at", "top", "message"),
    [
        ("9", "", "no cut after '9'; possible, nearest first"),
        ("3", "9", "no top cut after '9': there is no such place; possible, in order: 4, 5, 6, 7"),
        ("3", "0", "no top cut after '0': it does not come later than '3' with parameters"),
        ("0", "0", "no top cut after '0': it does not come later than '0' with parameters"),
        ("0", "8", "no top cut after '8': there are no parameters after it"),
    ],
)
def test_wrong_cuts_are_named(at: str, top: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_in_three(small_cnn(), at, top)


def test_a_model_with_one_cut_has_no_middle() -> None:
    with pytest.raises(ValueError, match=r"no top cut: .* a second time after 'mix'"):
        split_in_three(MoEClassifier(4, 3, 8, 8, 4, 1), "mix")


def test_the_mixture_of_digits_is_a_middle() -> None:
    torch.manual_seed(0)
    model = MoEClassifier(12, 5, 8, 8, num_experts=3, top_k=2)
    x = torch.randn(4, 12, generator=torch.Generator().manual_seed(0)).double()
    assert assert_same_step(model, x, class_loss, "stem", "") == "mix"
