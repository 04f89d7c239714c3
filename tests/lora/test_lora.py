"""Mixtures of LoRA experts: routing against plain loops, what travels, what is shared."""

import copy
import pickle
import sys
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from flwr_moe.experts import ExpertLayout, gate_inputs, restricted_gate
from flwr_moe.lora import (
    FINGERPRINT,
    LoRAExpertsLinear,
    add_lora_experts,
    shared_base,
    token_mask,
)
from flwr_moe.lora import layer as lora_layer_module

IDS = torch.randint(0, 40, (3, 5), generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
by_gate = pytest.mark.parametrize("gate", ["token", "sequence"])


def bert(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=40,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=16,
        num_labels=3,
    )
    return BertForSequenceClassification(config).double().eval()


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=12,
        max_position_embeddings=16,
    )
    return LlamaForCausalLM(config).double().eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=40, n_embd=8, n_layer=1, n_head=2, n_positions=16)
    return GPT2LMHeadModel(config).double().eval()


MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "bert": (bert, "query"),
    "llama": (llama, "q_proj"),
    "gpt2": (gpt2, "c_attn"),
}


def lora_config(*targets: str, **options: object) -> LoraConfig:
    options = {"r": 2, "lora_alpha": 6, "target_modules": list(targets) or ["query", "value"]} | (
        options
    )
    return LoraConfig(**options)


def mixture(num_experts: int = 4, top_k: int = 2, gate: str = "token") -> nn.Module:
    model = add_lora_experts(
        bert(),
        lora_config(modules_to_save=["classifier"]),
        num_experts,
        top_k,
        gate=gate,
        generator=torch.Generator().manual_seed(2),
    )
    return train_a_little(model)


def train_a_little(model: nn.Module, seed: int = 3) -> nn.Module:
    """Draw all that is trained anew, so that no expert answers zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5, generator=generator)
    return model.eval()


def logits(model: nn.Module, **inputs: Tensor) -> Tensor:
    return model(input_ids=IDS, **inputs).logits


def layer(gate: str, num_experts: int, top_k: int, dropout: float = 0.0) -> LoRAExpertsLinear:
    base = nn.Linear(6, 5).double().requires_grad_(False)
    made = LoRAExpertsLinear(
        base,
        6,
        5,
        num_experts,
        top_k,
        rank=3,
        scaling=1.5,
        dropout=dropout,
        gate=gate,
        device=torch.device("cpu"),
        dtype=torch.float64,
    )
    made.reset_parameters(torch.Generator().manual_seed(0))
    with torch.no_grad():
        made.experts.lora_B.normal_(generator=torch.Generator().manual_seed(1))
    return made


def by_hand(block: LoRAExpertsLinear, x_BSD: Tensor, mask_BS: Tensor | None) -> Tensor:
    """Loop over samples, tokens and chosen experts."""
    y_BSO = torch.zeros(*x_BSD.shape[:2], 5, dtype=x_BSD.dtype)
    for b, x_SD in enumerate(x_BSD):
        kept = range(len(x_SD)) if mask_BS is None else [s for s in range(5) if mask_BS[b, s]]
        mean_D = sum(x_SD[s] for s in kept) / len(kept)
        for s, x_D in enumerate(x_SD):
            seen_D = mean_D if block.gate_kind == "sequence" else x_D
            probs_E = torch.softmax(block.gate.weight @ seen_D, -1)
            chosen = sorted(range(len(probs_E)), key=lambda e: -probs_E[e].item())[: block.top_k]
            total = sum(probs_E[e] for e in chosen)
            y_O = block.base_layer.weight @ x_D + block.base_layer.bias
            for e in chosen:
                low_r = block.experts.lora_A[e] @ x_D
                y_O = y_O + 1.5 * probs_E[e] / total * (block.experts.lora_B[e] @ low_r)
            y_BSO[b, s] = y_O
    return y_BSO


@by_gate
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("way", ["dense", "sorted"])
def test_outputs_and_gradients_are_those_of_a_plain_loop(
    gate: str, masked: bool, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = 100 if way == "dense" else 0
    monkeypatch.setattr(lora_layer_module, "DENSE_EXPERTS_PER_CHOICE", limit)
    torch.manual_seed(0)
    block = layer(gate, 7, 2)
    x_BSD = torch.randn(3, 5, 6, dtype=torch.float64, requires_grad=True)
    mask_BS = MASK if masked else None
    wanted = (x_BSD, block.gate.weight, block.experts.lora_A, block.experts.lora_B)
    with token_mask(mask_BS):
        y_BSO = block(x_BSD)
    hand_BSO = by_hand(block, x_BSD, mask_BS)
    torch.testing.assert_close(y_BSO, hand_BSO)
    push = torch.randn(3, 5, 5, dtype=torch.float64)
    got = torch.autograd.grad((y_BSO * push).sum(), wanted)
    expected = torch.autograd.grad((hand_BSO * push).sum(), wanted)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_a_balanced_gate_and_its_counters() -> None:
    block = layer("sequence", 4, 1)
    with torch.no_grad():
        block.gate.weight.zero_()
        block.gate.weight[range(4), range(4)] = 1000.0
    # One sample for each of experts 0, 1 and 3, two tokens each.
    x_BSD = torch.zeros(3, 2, 6, dtype=torch.float64)
    x_BSD[0, :, 0] = x_BSD[1, :, 1] = x_BSD[2, :, 3] = 1
    block(x_BSD)
    assert block.tokens_per_expert.tolist() == [1, 1, 0, 1]
    # E * sum of f_e P_e = 4 * 3 * (1/3 * 1/3)
    assert float(block.load_balance_loss) == pytest.approx(4 / 3)


@by_gate
@pytest.mark.parametrize("name", list(MODELS))
def test_a_new_mixture_computes_what_the_base_does(name: str, gate: str) -> None:
    build, target = MODELS[name]
    base = build()
    expected = logits(base)
    model = add_lora_experts(build(), lora_config(target), 4, 2, gate=gate)
    assert torch.equal(logits(model), expected)
    blocks = [m for m in model.modules() if isinstance(m, LoRAExpertsLinear)]
    assert blocks
    for block in blocks:
        a_ErD = block.experts.lora_A
        bound = a_ErD.shape[-1] ** -0.5
        assert bool((a_ErD.abs() <= bound).all()) and float(a_ErD.abs().max()) > 0.8 * bound
        assert not torch.equal(a_ErD[0], a_ErD[1])
        assert not block.experts.lora_B.any()
    assert not torch.equal(logits(train_a_little(model)), expected)


def test_only_adapters_gates_and_saved_modules_are_trained_and_travel() -> None:
    model = mixture()
    tails = ("gate.weight", "experts.lora_A", "experts.lora_B")
    expected = {
        f"bert.encoder.layer.{i}.attention.self.{name}.{tail}"
        for i in range(2)
        for name in ("query", "value")
        for tail in tails
    } | {"classifier.weight", "classifier.bias"}
    assert {name for name, _ in model.named_parameters()} == expected
    assert set(model.state_dict()) == expected | {FINGERPRINT}
    assert model.state_dict()["bert.encoder.layer.0.attention.self.query.experts.lora_A"].shape == (
        4,
        2,
        8,
    )
    wrapped = nn.Sequential(model)
    assert set(wrapped.state_dict()) == {f"0.{key}" for key in model.state_dict()}


@by_gate
def test_a_state_makes_another_mixture_the_same(gate: str) -> None:
    model = mixture(gate=gate)
    other = add_lora_experts(
        bert(), lora_config(modules_to_save=["classifier"]), 4, 2, gate=gate
    ).eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other, attention_mask=MASK), logits(model, attention_mask=MASK))
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert torch.equal(logits(copied), logits(model))
    assert list(copied.state_dict()) == list(model.state_dict())


def test_a_state_of_another_base_is_refused() -> None:
    state = mixture().state_dict()
    other = add_lora_experts(bert(seed=5), lora_config(modules_to_save=["classifier"]), 4, 2)
    with pytest.raises(ValueError, match="adapter from another base model: its fingerprint is"):
        other.load_state_dict(state)
    with pytest.raises(ValueError, match="adapter from another base model"):
        nn.Sequential(copy.deepcopy(other)).load_state_dict({f"0.{k}": v for k, v in state.items()})
    # Averaging a state with itself moves numbers by rounding only.
    state[FINGERPRINT] = sum(state[FINGERPRINT] * w for w in (0.1, 0.2, 0.3, 0.4))
    model = mixture()
    before = model.get_buffer(FINGERPRINT).clone()
    model.load_state_dict(state)
    assert torch.equal(model.get_buffer(FINGERPRINT), before)
    del state[FINGERPRINT]
    with pytest.raises(RuntimeError, match=FINGERPRINT):
        model.load_state_dict(state)


def test_a_head_trained_elsewhere_makes_no_other_base() -> None:
    head = bert()
    nn.init.normal_(head.classifier.weight)
    config = lora_config(modules_to_save=["classifier"])
    model = add_lora_experts(head, config, 4, 2)
    model.load_state_dict(mixture().state_dict())
    assert torch.equal(logits(model.eval()), logits(mixture()))


@by_gate
def test_a_submodel_is_the_restricted_full_model(gate: str) -> None:
    model = mixture(gate=gate)
    layout = ExpertLayout.of(model)
    assert layout.layers == (4, 4, 4, 4)
    experts = {0: [3, 1], 1: [2], 2: [0, 1, 3], 3: [1, 2]}
    small = layout.submodel(model, experts)
    with restricted_gate(model, layout, experts):
        full_logits = logits(model, attention_mask=MASK)
    small_logits = logits(small, attention_mask=MASK)
    torch.testing.assert_close(small_logits, full_logits)
    full_logits.square().sum().backward()
    small_logits.square().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    expected = layout.take_submodel(grads, experts)
    for name, parameter in small.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])
    part = layout.from_submodel_state(small.state_dict(), experts)
    state = layout.put(model.state_dict(), part)
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())


def pointers(model: nn.Module) -> dict[str, int]:
    return {name: b.data_ptr() for name, b in model.named_buffers() if "tokens_per" not in name}


def test_submodels_share_the_base() -> None:
    model = mixture()
    small = ExpertLayout.of(model).submodel(model, [1, 2])
    base = [n for n, b in model.named_buffers() if b.is_floating_point() and n != FINGERPRINT]
    assert len(base) > 30
    assert all(pointers(small)[name] == pointers(model)[name] for name in base)
    own = [p.data_ptr() for p in small.parameters()]
    assert not set(own) & {p.data_ptr() for p in model.parameters()}
    # Elsewhere or in another dtype, a submodel has a base of its own.
    small.float()
    assert model.get_buffer(base[0]).dtype == torch.float64


@by_gate
def test_a_device_builds_the_full_model_on_meta_and_runs_its_own_experts(gate: str) -> None:
    loads = []

    def load() -> nn.Module:
        loads.append(1)
        return bert()

    def build() -> nn.Module:
        return add_lora_experts(
            shared_base(("test_lora", gate), load),
            lora_config(modules_to_save=["classifier"]),
            4,
            2,
            gate=gate,
        )

    model = mixture(gate=gate)
    state = model.state_dict()
    devices = []
    for experts in ([0, 2], [3]):
        with torch.device("meta"):
            full = build()
        assert all(p.is_meta for p in full.parameters())
        layout = ExpertLayout.of(full)
        small = layout.submodel(full, experts)
        part = layout.take(state, experts)
        small.load_state_dict(layout.to_submodel_state(layout.shared(state), part, experts))
        with restricted_gate(model, layout, experts):
            expected = logits(model, attention_mask=MASK)
        torch.testing.assert_close(logits(small.eval(), attention_mask=MASK), expected)
        devices.append(small)
    assert len(loads) == 1
    key = "bert.embeddings.word_embeddings.weight"
    assert pointers(devices[0])[key] == pointers(devices[1])[key]
    # A wrong base is found on this road, too.
    layout = ExpertLayout.of(full)
    wrong = state | {FINGERPRINT: state[FINGERPRINT] + 1}
    with pytest.raises(ValueError, match="another base model"):
        layout.submodel(full, [3]).load_state_dict(layout.take_submodel(wrong, [3]))
    # What one mixture trains whole is not what others share.
    with torch.no_grad():
        build().classifier.weight.fill_(7)
    assert not (build().classifier.weight == 7).any()


def test_a_base_on_meta_is_refused() -> None:
    with torch.device("meta"):
        empty = bert()
    with pytest.raises(
        ValueError, match=r"on the meta device, expected real weights .*shared_base"
    ):
        add_lora_experts(empty, lora_config(), 4, 2)


def test_an_attention_mask_keeps_padding_out_of_the_gate() -> None:
    model = mixture(gate="sequence")
    layout = ExpertLayout.of(model)
    padded = IDS.masked_fill(MASK == 0, 7)
    with torch.no_grad():
        one = model(input_ids=IDS, attention_mask=MASK).logits
        by_position = model(padded, MASK).logits
        alone = model(input_ids=IDS[1:2, :3]).logits
        unmasked = model(input_ids=IDS).logits
    torch.testing.assert_close(by_position, one)
    torch.testing.assert_close(one[1:2], alone)
    assert not torch.allclose(unmasked[1], one[1])
    seen = gate_inputs(model, layout, IDS)
    assert [tuple(x.shape) for x in seen] == [(3, 8)] * 4


def test_base_dropout_and_norms_stay_as_they_were() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))
    nn.init.uniform_(net[1].running_mean)
    expected = net.eval()(torch.ones(3, 4))
    model = add_lora_experts(net, lora_config("0", "3"), 2, 1).train()
    assert torch.equal(model(torch.ones(3, 4)), expected)
    assert set(model.state_dict()) - {FINGERPRINT} == {
        f"{i}.{tail}"
        for i in (0, 3)
        for tail in ("gate.weight", "experts.lora_A", "experts.lora_B")
    }


def test_peft_settings_are_followed() -> None:
    config = lora_config(
        target_modules="all-linear",
        task_type="SEQ_CLS",
        layers_to_transform=None,
        rank_pattern={"intermediate.dense": 5},
        alpha_pattern={"key": 10},
        use_rslora=True,
        lora_dropout=0.25,
    )
    model = add_lora_experts(bert(), config, 3, 1)
    blocks = {n: m for n, m in model.named_modules() if isinstance(m, LoRAExpertsLinear)}
    assert len(blocks) == 13 and "classifier" not in blocks
    wide = blocks["bert.encoder.layer.0.intermediate.dense"]
    assert wide.experts.lora_A.shape == (3, 5, 8) and wide.experts.lora_B.shape == (3, 12, 5)
    assert wide.scaling == pytest.approx(6 / 5**0.5)
    assert blocks["bert.encoder.layer.1.attention.self.key"].scaling == pytest.approx(10 / 2**0.5)
    assert wide.dropout.p == 0.25
    one = add_lora_experts(bert(), lora_config("query", layers_to_transform=[1]), 3, 1)
    assert len(ExpertLayout.of(one).layers) == 1
    by_regex = lora_config(target_modules=r".*layer\.0\.attention\.self\.(key|value)")
    assert len(ExpertLayout.of(add_lora_experts(bert(), by_regex, 3, 1)).layers) == 2


def test_the_same_generator_gives_the_same_mixture_and_leaves_the_global_one_alone() -> None:
    def build(seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return add_lora_experts(bert(), lora_config(), 3, 1, generator=generator).state_dict()

    one, same, other = build(0), build(0), build(1)
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not all(torch.equal(one[key], other[key]) for key in one)
    base = bert()
    before = torch.get_rng_state()
    add_lora_experts(base, lora_config(), 3, 1, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_half_precision_bases_get_adapters_in_single_precision() -> None:
    model = train_a_little(add_lora_experts(bert().bfloat16(), lora_config(), 3, 2))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert logits(model).dtype == torch.bfloat16


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 0}, "num_experts is 0, expected at least 1"),
        ({"top_k": 0}, r"top_k is 0, expected 1 to 4 \(num_experts\)"),
        ({"top_k": 5}, r"top_k is 5, expected 1 to 4"),
        ({"gate": "word"}, r"gate is 'word', expected one of \['token', 'sequence'\]"),
        ({"config": lora_config("wq")}, r"\{'wq'\} fit nothing.*called query, key, value, dense"),
        ({"config": lora_config("LayerNorm")}, "fit nothing.*called query, key, value, dense"),
        ({"config": lora_config("word_embeddings")}, "is a Embedding, expected a linear layer"),
        ({"config": lora_config(use_dora=True)}, "use_dora is True, expected False"),
        ({"config": lora_config(bias="all")}, "bias is 'all', expected 'none'"),
        ({"config": lora_config(init_lora_weights="pissa")}, "init_lora_weights is 'pissa'"),
        ({"config": lora_config(modules_to_save=["head"])}, "modules_to_save 'head' does not"),
        ({"config": {"r": 2}}, "config is a dict, expected a peft.LoraConfig"),
        ({"model": nn.Sequential(nn.ReLU())}, "Sequential has no linear layer to adapt"),
        ({"model": Attention(), "config": lora_config("out_proj")}, "out_proj is never called"),
    ],
)
def test_bad_input_says_what_was_expected(changes: dict[str, object], message: str) -> None:
    arguments = {"model": bert(), "config": lora_config(), "num_experts": 4, "top_k": 2} | changes
    model = arguments.pop("model")
    before = {name: id(m) for name, m in model.named_modules()}
    with pytest.raises(ValueError, match=message):
        add_lora_experts(model, **arguments)
    assert {name: id(m) for name, m in model.named_modules()} == before
    assert len(list(model.parameters())) == len({*model.state_dict()})


def test_a_model_with_experts_is_refused() -> None:
    with pytest.raises(ValueError, match="has experts already"):
        add_lora_experts(mixture(), lora_config(), 4, 2)


def test_without_peft_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"pip install 'flwr-moe\[peft\]'"):
        add_lora_experts(bert(), None, 2, 1)
