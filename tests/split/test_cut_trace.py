"""Models of transformers inside other modules: cuts between their blocks, and gradients there."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flwr_moe.client_apps.split.link import CutLink, small_labels
from flwr_moe.split.codecs import CodecKey, cut_codecs
from flwr_moe.split.costs import cut_table
from flwr_moe.split.cut import materialise, possible_cuts, split_model
from flwr_moe.split.protocol import agreement
from flwr_moe.split.prune import choose_kept, shrink
from flwr_moe.split.session import SplitSession
from flwr_moe.split.step import cross_entropy_over_labels
from flwr_moe.tasks.lm import NextByte
from flwr_moe.tasks.text_encoder import TextClassifier, _AsGiven
from tests.split.halves import assert_same_step
from tests.split.test_cut_transformers import BERT, GPT2, LLAMA, build
from tests.split.test_ushape import assert_same_step as assert_same_step_in_three

GENERATOR = torch.Generator().manual_seed(0)
HIDDEN = torch.randn(4, 5, 8, generator=GENERATOR, dtype=torch.float64)
HIDDEN[1, 3:] = HIDDEN[2, 1:] = 0
CLASSES = torch.tensor([2, 0, 1, 2])
BYTES = torch.randint(256, (3, 6), generator=GENERATOR)
NEXT = torch.randint(256, (3, 6), generator=GENERATOR)


def classifier() -> TextClassifier:
    top: Any = build("Bert", "Model", **BERT)
    top.embeddings, top.pooler = _AsGiven(), None
    return TextClassifier(top, 8, 3)


def decoder() -> NextByte:
    torch.manual_seed(0)
    return NextByte(16, 0, 1, 8)


ENCODER_CUTS = [f"top.encoder.layer.{i}" for i in range(3)]
DECODER_CUTS = ["decoder.model.embed_tokens", *(f"decoder.model.layers.{i}" for i in range(2))]


class Direct:
    """An exchange without a network."""

    def __init__(self, session: SplitSession) -> None:
        self.session = session

    def call(
        self, name: str, tensors: Mapping[str, Tensor], facts: Mapping[str, str]
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        return self.session.handle(dict(tensors), dict(facts))


@pytest.mark.parametrize(
    ("make", "x", "y", "cuts", "crossing"),
    [
        # Numbers of eight bytes and a mask, and one label a text.
        (classifier, HIDDEN, CLASSES, ENCODER_CUTS[:2], 4 * 5 * (8 * 8 + 1) + 4),
        # One label a byte.
        (decoder, BYTES, NEXT, DECODER_CUTS[:2], 3 * 6 * (16 * 8 + 1)),
    ],
)
def test_gradients_through_the_session_are_those_of_the_whole_model(
    make: Any, x: Tensor, y: Tensor, cuts: list[str], crossing: int
) -> None:
    whole: nn.Module = make().double().train()
    expected = cross_entropy_over_labels(whole(x), y)
    expected.backward()
    for at in cuts:
        mine: nn.Module = make().double().train()
        split, codecs = split_model(mine, at), cut_codecs()
        agreed = agreement(mine.state_dict(), at, codecs)
        session = SplitSession(
            split.server, codecs, agreed, server="shared", loss_fn=cross_entropy_over_labels
        )
        session.begin_round(1, 1, [0], 0.001)
        key = CodecKey(3, 1, 0, 0, "activation")
        link = CutLink(Direct(session), codecs, key, agreed, 9)  # type: ignore[arg-type]
        activation, *context = split.client(x)
        gradient, loss = link.send(activation.detach(), context, small_labels(y))
        activation.backward(gradient)
        assert loss == expected.item()
        assert link.moved["activation", "cut"] == crossing
        for (name, a), b in zip(whole.named_parameters(), mine.parameters(), strict=True):
            assert a.grad is not None and b.grad is not None, (at, name)
            assert torch.equal(a.grad, b.grad), (at, name)


def test_a_classifier_is_cut_after_every_block_and_in_three() -> None:
    model = classifier()
    assert possible_cuts(model.double(), HIDDEN) == ENCODER_CUTS
    with torch.device("meta"):
        assert possible_cuts(classifier(), HIDDEN.float()) == ENCODER_CUTS

    def loss(logits: Tensor) -> Tensor:
        return cross_entropy_over_labels(logits, CLASSES)

    assert_same_step(model, [HIDDEN], loss, [ENCODER_CUTS[2]])
    assert assert_same_step_in_three(model, HIDDEN, loss, *ENCODER_CUTS[:2]) == ENCODER_CUTS[1]
    with pytest.raises(ValueError, match=r"possible, nearest first: top\.encoder\.layer\.0, top"):
        split_model(model, "encoder.layer.0")


def test_a_decoder_is_cut_and_costed() -> None:
    model = decoder()
    rows = cut_table(model, BYTES)
    assert [row.at for row in rows] == DECODER_CUTS
    assert rows[0].client_parameters == 256 * 16
    assert rows[1].activation_shape == (6, 16)
    # Per token: queries, keys, values and output, three layers of the MLP; attention.
    assert rows[1].client_flops == 2 * 6 * (4 * 16 * 16 + 3 * 16 * 32) + 2 * 2 * 6 * 6 * 16


@pytest.mark.parametrize(
    ("family", "head", "config", "name"),
    [("GPT2", "LMHeadModel", GPT2, "h"), ("Llama", "ForCausalLM", LLAMA, "layers")],
)
def test_masks_and_positions_cross_for_a_wrapped_decoder(
    family: str, head: str, config: dict[str, Any], name: str
) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = build(family, head, **config)

        def forward(self, ids: Tensor, mask: Tensor, places: Tensor) -> Tensor:
            out = self.inner(ids, attention_mask=mask == 1, position_ids=(places > 0).long())
            logits: Tensor = out["logits"]
            return logits

    model = Wrapped()
    ids = torch.randint(30, (2, 4), generator=GENERATOR)
    mask, places = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]), torch.tensor([[0, 0, 1, 1]] * 2)
    root = "inner.transformer" if family == "GPT2" else "inner.model"
    split = split_model(model.eval(), f"{root}.{name}.1")
    hidden, *context = split.client(ids, mask, places)
    assert torch.equal(split.server(hidden, *context), model(ids, mask, places))
    assert len(context) == 2


def test_a_half_of_a_model_without_values_gets_its_own() -> None:
    model = decoder().eval()
    with torch.device("meta"):
        split = split_model(decoder().eval(), DECODER_CUTS[1])
    state = model.state_dict()
    for half in (split.client, split.server):
        materialise(half, {key: state[key] for key in half.state_dict()})
        assert not any(t.is_meta for t in [*half.parameters(), *half.buffers()])
    assert torch.equal(split.server(*split.client(BYTES)), model(BYTES))


def test_heads_and_hidden_units_of_the_client_half_are_pruned() -> None:
    client = split_model(classifier(), ENCODER_CUTS[0]).client.eval()
    kept = choose_kept(client, 0.5, prune_output=True)
    path = "top.encoder.layer.0"
    counts = {name: len(units) for name, units in kept.indices.items()}
    assert counts == {f"{path}.attention.self": 1, f"{path}.intermediate.dense": 6}
    small = shrink(client, kept)
    state = small.state_dict()
    assert state[f"{path}.attention.self.query.weight"].shape == (4, 8)
    assert state[f"{path}.output.dense.weight"].shape == (8, 6)
    # What is pruned is as if it were zero.
    zeroed = copy.deepcopy(client)
    dropped = [u for u in range(12) if u not in kept.indices[f"{path}.intermediate.dense"]]
    (head,) = {0, 1} - set(kept.indices[f"{path}.attention.self"])
    with torch.no_grad():
        zeroed.get_parameter(f"{path}.output.dense.weight")[:, dropped] = 0
        zeroed.get_parameter(f"{path}.attention.output.dense.weight")[
            :, 4 * head : 4 * head + 4
        ] = 0
    x = HIDDEN.float()
    torch.testing.assert_close(small(x)[0], zeroed(x)[0])


def test_what_cannot_be_cut_inside_stays_in_one_piece() -> None:
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.inner = nn.Linear(8, 8), build("Bert", "Model", **BERT)

        def forward(self, x: Tensor) -> Tensor:
            out = self.inner(inputs_embeds=self.first(x), output_hidden_states=True)
            hidden: Tensor = out.hidden_states[1]
            return hidden

    assert possible_cuts(Looks().double(), HIDDEN) == ["first"]
