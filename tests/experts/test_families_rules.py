"""What each family's router does among fewer experts, and models of families nobody described."""

import copy
import re

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama import LlamaConfig, LlamaForCausalLM
from transformers.models.phimoe import PhimoeConfig, PhimoeForCausalLM

from flwr_moe.experts import ExpertLayout, affinity_from_inputs, families, restricted_gate
from flwr_moe.experts.families import Family, register_family, renumber, repair_nllb
from tests.experts.test_families import CONFIGS, DECODER, SIX, build, inputs, logits

ROUNDING = 1e-5  # float32


def router_output(name: str, experts: list[int], x: Tensor):
    model = build(name)
    layout = ExpertLayout.of(model)
    router = layout.submodel(model, experts).get_submodule(layout.moe_layers[0].router)
    rows = {key.rsplit(".", 1)[-1]: model.state_dict()[key][experts] for key in layout.gate_rows[0]}
    return router, router(x), rows


@pytest.mark.parametrize("experts", [[7, 2, 3], [0, 3], [3, 2, 4, 5], [2, 3, 5, 4]])
def test_deepseek_experts_that_fill_no_groups_are_one_group(experts: list[int]):
    x = torch.randn(50, 32)
    router, (_, weights, chosen), rows = router_output("deepseek-v3", experts, x)
    assert (router.num_group, router.topk_group, router.top_k) == (1, 1, 2)
    score_TM = (x @ rows["weight"].T).sigmoid()
    expected = (score_TM + rows["e_score_correction_bias"]).topk(2, -1).indices
    assert torch.equal(chosen.sort(-1).values, expected.sort(-1).values)
    picked = score_TM.gather(1, chosen)
    plain = picked / picked.sum(-1, keepdim=True) * router.routed_scaling_factor
    torch.testing.assert_close(weights, plain, rtol=ROUNDING, atol=ROUNDING)


def test_deepseek_experts_that_are_whole_groups_stay_grouped():
    x = torch.randn(50, 32)
    router, (_, _, chosen), rows = router_output("deepseek-v3", [6, 7, 0, 1, 2, 3], x)
    assert (router.num_group, router.topk_group) == (3, 2)
    choice_TGS = ((x @ rows["weight"].T).sigmoid() + rows["e_score_correction_bias"]).view(-1, 3, 2)
    worst_T = choice_TGS.sum(-1).argmin(-1)  # two of three groups are open
    choice_TGS[torch.arange(50), worst_T] = -torch.inf
    expected = choice_TGS.view(50, 6).topk(2, -1).indices
    assert torch.equal(chosen.sort(-1).values, expected.sort(-1).values)
    single, _, _ = router_output("deepseek-v3", [4, 5], x)
    assert (single.num_group, single.topk_group) == (1, 1)


def test_a_lone_deepseek_expert():
    x = torch.randn(9, 32)
    router, (_, weights, chosen), _ = router_output("deepseek-v3", [6], x)
    assert not chosen.any() and chosen.shape == (9, 1)
    torch.testing.assert_close(weights, torch.full((9, 1), router.routed_scaling_factor))
    again = copy.deepcopy(router)
    with torch.no_grad():
        again.weight.zero_()
    assert not again(x)[0].any() and router(x)[0].any()  # the copy reads its own weight


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "olmoe"])
def test_softmax_families_by_hand(name: str):
    x = torch.randn(50, 32)
    router, (_, weights, chosen), rows = router_output(name, [5, 1, 2], x)
    probs, expected = (x @ rows["weight"].T).softmax(-1).topk(2, -1)
    if getattr(router, "norm_topk_prob", True):
        probs = probs / probs.sum(-1, keepdim=True)
    assert torch.equal(chosen, expected)
    torch.testing.assert_close(weights, probs, rtol=ROUNDING, atol=ROUNDING)


def test_a_restriction_is_undone_after_an_error():
    model = build("mixtral")
    layout = ExpertLayout.of(model)
    before = logits(model, "mixtral")
    with pytest.raises(KeyError), restricted_gate(model, layout, [0, 1]):
        assert model.num_experts == 2
        raise KeyError
    assert model.num_experts == 6 and model.num_experts_per_tok == 2
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.equal(logits(model, "mixtral"), before)
    with restricted_gate(model, layout, [0, 1]), restricted_gate(model, layout, [3]):
        inner = logits(model, "mixtral")
    assert torch.equal(inner, logits(layout.submodel(model, [3]), "mixtral"))
    assert torch.equal(logits(model, "mixtral"), before)


def test_gradient_checkpointing_in_the_submodel():
    model = build("qwen3-moe")
    small = ExpertLayout.of(model).submodel(model, [4, 1]).train()
    batch = inputs("qwen3-moe")
    gradients = []
    for again in (False, True):
        if again:
            small.activation_checkpointing_enable()
        small.zero_grad()
        small(**batch, labels=batch["input_ids"]).loss.backward()
        gradients.append([p.grad.clone() for p in small.parameters()])
    assert all(map(torch.equal, *gradients))


def test_nllb_has_to_be_repaired_first():
    kind, config = CONFIGS["nllb-moe"]
    model = kind(copy.deepcopy(config)).eval()
    layout = ExpertLayout.of(model)
    text = re.escape("call flwr_moe.experts.families.repair_nllb(model) before")
    with pytest.raises(ValueError, match=text):
        layout.submodel(model, [0])
    with pytest.raises(ValueError, match=text), restricted_gate(model, layout, [0]):
        pass
    used = []
    for _ in range(2):
        model.zero_grad()
        logits(model, "nllb-moe").square().sum().backward()
        grads = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
        experts = [layout.moe_layers[0].module_key(e) for e in range(6)]
        used.append({e for e in range(6) if f"{experts[e]}.fc1.weight" in grads})
        repair_nllb(model)
    assert used[0] == {0, 1}  # if not, transformers has been mended and the repair must go
    assert len(used[1]) > 2
    repair_nllb(model)
    block = model.get_submodule(layout.moe_layers[0].block)
    assert len(block.experts._forward_pre_hooks) == 1
    # Each token goes to the experts its router names, with the router's weights.
    x = torch.randn(1, 8, 32)
    mask, weights, _ = block.router(x[0])
    expected = sum(w[:, None] * block.experts[f"expert_{e}"](x[0]) for e, w in enumerate(weights.T))
    expected = expected * (1 - block.experts.moe_token_dropout)
    torch.testing.assert_close(block(x)[0], expected, rtol=ROUNDING, atol=ROUNDING)
    assert torch.equal(mask.argmax(-1), weights.argmax(-1))


class Chooser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 4))

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits_TE = x_TD @ self.weight.T
        probs_T1, expert_T1 = logits_TE.sigmoid().max(-1, keepdim=True)
        return logits_TE, probs_T1, expert_T1


class ToyBlock(nn.Module):
    """Sends a token to its best expert, which the router finds."""

    def __init__(self) -> None:
        super().__init__()
        self.chooser = Chooser()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(5))

    def forward(self, x_TD: Tensor) -> Tensor:
        _, probs_T1, expert_T1 = self.chooser(x_TD)
        y_TED = torch.stack([expert(x_TD) for expert in self.experts], 1)
        return probs_T1 * y_TED[torch.arange(len(x_TD)), expert_T1[:, 0]]


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(families, "_families", dict(families._families))


TOY = Family(
    "toy",
    blocks=("ToyBlock",),
    router="chooser",
    logits=0,
    probabilities=families.normalised_sigmoid,
    widen=renumber,
)


def test_a_family_of_ones_own(registry):
    model = nn.Sequential(ToyBlock())
    with pytest.raises(ValueError, match="block '0' has experts, but no child 'gate' or 'router'"):
        ExpertLayout.of(model)
    register_family(TOY)
    register_family(TOY)  # twice is no harm
    layout = ExpertLayout.of(model)
    assert layout.gate_rows == (("0.chooser.weight",),)
    x = torch.randn(30, 4)
    small = layout.submodel(model, [3, 1])
    with restricted_gate(model, layout, [3, 1]):
        y = model(x)
    torch.testing.assert_close(y, small(x), rtol=0, atol=0)
    best = (x @ model[0].chooser.weight[[3, 1]].T).max(1)
    for t in range(30):
        expert = model[0].experts[[3, 1][best.indices[t]]]
        torch.testing.assert_close(y[t], best.values[t].sigmoid() * expert(x[t]))
    affinity = affinity_from_inputs([x], layout, model.state_dict()).mean
    assert affinity.sum() == pytest.approx(1)


def test_names_of_families_are_taken_once(registry):
    register_family(TOY)
    with pytest.raises(ValueError, match="toy is registered already"):
        register_family(Family("toy", blocks=("Other",)))
    with pytest.raises(ValueError, match=r"\['ToyBlock'\] is registered already"):
        register_family(Family("other", blocks=("ToyBlock",)))


def test_a_process_that_does_not_know_the_family(registry):
    register_family(TOY)
    layout = ExpertLayout.of(ToyBlock())
    families._families.pop("toy")
    with pytest.raises(ValueError, match=r"family is 'toy', expected one of \['deepseek-v3'"):
        affinity_from_inputs([torch.randn(2, 4)], layout, ToyBlock().state_dict())


def test_a_family_of_transformers_that_nobody_described():
    with torch.device("meta"):
        model = PhimoeForCausalLM(PhimoeConfig(**DECODER, **SIX, num_local_experts=4))
    text = r"block class \w+ is of no known family .*describe it with .*families\.register_family"
    with pytest.raises(ValueError, match=text):
        ExpertLayout.of(model)


def test_a_dense_model():
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**DECODER, intermediate_size=24))
    text = r"LlamaForCausalLM has no experts.*flwr_moe\.lora\.add_lora_experts"
    with pytest.raises(ValueError, match=text):
        ExpertLayout.of(model)


def test_a_gate_that_returns_no_logits():
    block = ToyBlock()
    block.gate = block.chooser
    del block.chooser
    layout = ExpertLayout.of(block)
    with (
        pytest.raises(ValueError, match=r"gate 'gate' returned tuple, .*register_family"),
        restricted_gate(block, layout, [0]),
    ):
        block.gate(torch.randn(2, 4))
