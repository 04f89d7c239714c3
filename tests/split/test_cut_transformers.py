"""Cutting encoders and decoders of transformers."""

import copy
import functools
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from flwr_moe.split.costs import cut_table
from flwr_moe.split.cut import materialise, possible_cuts, split_model
from tests.experts.test_families import CONFIGS, TEXT_TO_TEXT
from tests.split.halves import allocated_bytes, assert_same_step, tensor_of

PADDING = 1
LENGTHS = (6, 4, 2)
MASK = torch.tensor([[int(i < length) for i in range(6)] for length in LENGTHS])
IDS = torch.randint(5, 30, (3, 6), generator=torch.Generator().manual_seed(0))
IDS = IDS * MASK + PADDING * (1 - MASK)
BATCH = {"input_ids": IDS, "attention_mask": MASK}
CLASSES = torch.tensor([0, 2, 1])

TOKENS = {"vocab_size": 30, "num_labels": 3, "pad_token_id": PADDING, "tie_word_embeddings": False}
TOKENS |= {"bos_token_id": 2, "eos_token_id": 3}
SIZES = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 12, "max_position_embeddings": 16, **TOKENS}
BERT = SIZES | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
GPT2 = {"n_embd": 8, "n_layer": 3, "n_head": 2, "n_positions": 16, **TOKENS}
GPT2 |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
LLAMA = SIZES | {"num_key_value_heads": 1, "head_dim": 4}
DISTIL = {"dim": 8, "n_layers": 3, "n_heads": 2, "hidden_dim": 12, "max_position_embeddings": 16}
DISTIL |= {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0, **TOKENS}


def build(family: str, head: str, **config: Any) -> nn.Module:
    torch.manual_seed(0)
    made = getattr(transformers, f"{family}Config")(**config)
    model: nn.Module = getattr(transformers, family + head)(made)
    return model


def class_loss(logits: Tensor) -> Tensor:
    return functional.cross_entropy(logits, CLASSES)


def token_loss(logits: Tensor) -> Tensor:
    targets = IDS.masked_fill(MASK == 0, -100)[:, 1:]
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten())


def square_loss(hidden: Tensor) -> Tensor:
    return hidden.pow(2).mean()


CLASSIFIER = "ForSequenceClassification"
LOOKS_FOR_PADDING = (("GPT2", CLASSIFIER), ("Llama", CLASSIFIER))
CASES = [
    ("Bert", CLASSIFIER, BERT, class_loss, "bert.embeddings", "bert.encoder.layer."),
    ("Bert", "Model", BERT, square_loss, "embeddings", "encoder.layer."),
    ("Roberta", CLASSIFIER, BERT, class_loss, "roberta.embeddings", "roberta.encoder.layer."),
    (
        "DistilBert",
        CLASSIFIER,
        DISTIL,
        class_loss,
        "distilbert.embeddings",
        "distilbert.transformer.layer.",
    ),
    ("GPT2", "LMHeadModel", GPT2, token_loss, "transformer.drop", "transformer.h."),
    ("GPT2", CLASSIFIER, GPT2, class_loss, "transformer.drop", "transformer.h."),
    ("Llama", "ForCausalLM", LLAMA, token_loss, "model.embed_tokens", "model.layers."),
    ("Llama", CLASSIFIER, LLAMA, class_loss, "model.embed_tokens", "model.layers."),
    ("Qwen2", "ForCausalLM", LLAMA, token_loss, "model.embed_tokens", "model.layers."),
]


@pytest.mark.parametrize(("family", "head", "config", "loss", "embeddings", "block"), CASES)
def test_gradients_are_those_of_the_whole_model(
    family: str, head: str, config: dict[str, Any], loss: Any, embeddings: str, block: str
) -> None:
    model = build(family, head, **config)
    if hasattr(model, "pooler"):
        model.pooler = None
    cuts = [embeddings, *(f"{block}{i}" for i in range(3))]
    if family == "Bert" and head == "Model":
        cuts.pop()  # nothing comes after the last block
    assert possible_cuts(model, BATCH) == cuts
    assert_same_step(model, BATCH, loss, cuts)


def test_padding_matters_to_these_tests() -> None:
    for family, head, config in (("Bert", CLASSIFIER, BERT), ("GPT2", CLASSIFIER, GPT2)):
        model = build(family, head, **config).eval()
        split = split_model(model, next(iter(possible_cuts(model, BATCH))))
        hidden, *context = split.client(**BATCH)
        plain = tensor_of(model(**BATCH))
        assert torch.equal(split.server(hidden, *context), plain)
        context[-1] = torch.ones_like(MASK)
        if family == "GPT2":
            context[0] = context[0] - 1
        assert not torch.allclose(split.server(hidden, *context), plain)


@pytest.mark.parametrize(("family", "config"), [("GPT2", GPT2), ("Llama", LLAMA)])
def test_positions_cross_to_a_decoder(family: str, config: dict[str, Any]) -> None:
    head = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    model = build(family, head, **config)
    positions = torch.arange(6).flip(0).expand(3, 6)
    cut = possible_cuts(model, BATCH)[1]
    batch = {**BATCH, "position_ids": positions}
    assert_same_step(model, batch, token_loss, [cut])
    assert len(split_model(model, cut).client(**batch)) == 3
    # Positions without a mask bring a mask of ones along.
    alone = split_model(model, cut).client(IDS, position_ids=positions)
    assert alone[1].eq(1).all()


def test_only_the_activation_crosses_without_a_mask() -> None:
    model = build("Bert", CLASSIFIER, **BERT)
    assert_same_step(model, {"input_ids": IDS}, class_loss, ["bert.encoder.layer.0"])
    assert len(split_model(model, "bert.encoder.layer.0").client(IDS)) == 1


@pytest.mark.parametrize("name", sorted({*CONFIGS} - {*TEXT_TO_TEXT, "llama4"}))
def test_a_mixture_of_experts_in_single_precision(name: str) -> None:
    kind, config = CONFIGS[name]
    torch.manual_seed(0)
    model = kind(copy.deepcopy(config)).eval()
    whole = tensor_of(model(**BATCH))
    for at in ("model.embed_tokens", "model.layers.0", "model.layers.1"):
        split = split_model(model, at)
        hidden, *context = split.client(**BATCH)
        assert torch.equal(split.server(hidden, *context), whole)
        assert not torch.equal(split.server(hidden.roll(1, 0), *context), whole)


@pytest.mark.parametrize(
    ("family", "head", "config", "at"),
    [
        ("Bert", CLASSIFIER, BERT, "bert.encoder.layer.0"),
        ("Llama", "ForCausalLM", LLAMA, "model.layers.0"),
    ],
)
def test_a_half_is_built_without_the_other(
    family: str, head: str, config: dict[str, Any], at: str
) -> None:
    full = build(family, head, **config).eval()
    states = split_model(full, at)
    for name in ("client", "server"):
        with torch.device("meta"):
            split = split_model(build(family, head, **config), at)
        half, other = split.client, split.server
        if name == "server":
            half, other = other, half
        materialise(half, getattr(states, name).state_dict())
        assert allocated_bytes(other) == 0
        assert allocated_bytes(half) == allocated_bytes(getattr(states, name))
        half.eval()
        hidden = states.client(**BATCH)
        got = half(**BATCH)[0] if name == "client" else half(*hidden)
        # Rotary frequencies and position numbers are in no state dict, and have to be right.
        assert torch.equal(got, hidden[0] if name == "client" else tensor_of(full(**BATCH)))


def test_modes_reach_the_layers_of_a_half() -> None:
    model = build("Bert", CLASSIFIER, **BERT | {"hidden_dropout_prob": 0.5})
    split = split_model(model, "bert.encoder.layer.0")
    run = functools.partial(split.client, **BATCH)
    split.client.eval()
    assert torch.equal(run()[0], run()[0])
    split.client.train()
    assert not torch.equal(run()[0], run()[0])
    assert model.training


def test_costs_of_an_encoder() -> None:
    model = build("Bert", CLASSIFIER, **BERT)
    rows = {row.at: row for row in cut_table(model, BATCH)}
    # Tokens, positions, two token types, and a norm; then per block four 8x8 maps and two of 8x12.
    embeddings = 8 * (30 + 16 + 2 + 2)
    block = 4 * (64 + 8) + (96 + 12) + (96 + 8) + 4 * 8
    first, second = rows["bert.embeddings"], rows["bert.encoder.layer.0"]
    assert (first.client_parameters, first.client_flops) == (embeddings, 0)
    assert second.client_parameters == embeddings + block
    # Six tokens: the maps, and two products of attention over 6 tokens and 8 features.
    assert second.client_flops == 2 * (6 * (4 * 64 + 2 * 96) + 2 * 6 * 6 * 8)
    assert (second.activation_shape, second.activation_bytes) == ((6, 8), 4 * 48)
    # Three blocks, then pooler and classifier on one token.
    assert first.server_flops == 3 * second.client_flops + 2 * (64 + 24)
    assert model.config._attn_implementation == "sdpa"


# Sequence classification with a decoder looks for the padding, so it does need values.
@pytest.mark.parametrize(
    ("family", "head", "config"),
    [case[:3] for case in CASES if (case[0], case[1]) not in LOOKS_FOR_PADDING],
)
def test_costs_need_no_values(family: str, head: str, config: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = build(family, head, **config)
    rows = cut_table(model, BATCH)
    assert rows == cut_table(build(family, head, **config), BATCH)
    assert rows[1].client_flops > 0


def test_errors() -> None:
    tied = build("GPT2", "LMHeadModel", **GPT2 | {"tie_word_embeddings": True})
    message = "'transformer.wte.weight' before the cut is 'lm_head.weight' after it; untie them"
    with pytest.raises(ValueError, match=message):
        split_model(tied, "transformer.h.0")
    assert possible_cuts(tied, BATCH) == []

    bert = build("Bert", CLASSIFIER, **BERT)
    with pytest.raises(ValueError, match=r"no cut after 'layer.1'; .* first: bert.encoder.layer.1"):
        split_model(bert, "layer.1")
    model = transformers.BertModel(transformers.BertConfig(**BERT), add_pooling_layer=False)
    with pytest.raises(ValueError, match="no parameters after it, the server half would be empty"):
        split_model(model, "encoder.layer.2")

    sizes = {"d_model": 8, "num_layers": 1, "num_heads": 2, "d_ff": 8, "d_kv": 4}
    with pytest.raises(ValueError, match="model type 't5' of transformers cannot be cut, expected"):
        split_model(build("T5", "EncoderModel", **sizes, vocab_size=30), "encoder")
    answers = split_model(
        build("Bert", "ForQuestionAnswering", **BERT | {"num_labels": 2}), "bert.embeddings"
    )
    with pytest.raises(ValueError, match="gives start_logits, end_logits, expected logits"):
        answers.server(*answers.client(**BATCH))
    unpadded = build("GPT2", CLASSIFIER, **GPT2 | {"pad_token_id": None})
    with pytest.raises(ValueError, match="batch of 3 sequences, expected 1: pad_token_id"):
        split_model(unpadded, "transformer.h.0").client(**BATCH)
