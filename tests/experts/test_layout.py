import pickle
import re

import numpy as np
import pytest
import torch
from torch import nn

from flwr_moe.experts import ExpertLayout, SparseMoE
from tests.experts.models import CLASSES, EXPERTS, HIDDEN, WIDTH, ListBlock, both_kinds, build

CHOSEN = {0: [3, 0], 1: [2]}


def assert_same_state(got: dict, expected: dict) -> None:
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(np.asarray(got[key]), np.asarray(value), err_msg=key)


def as_kind(state: dict, array: str) -> dict:
    return {k: v.numpy() for k, v in state.items()} if array == "numpy" else state


both_arrays = pytest.mark.parametrize("array", ["torch", "numpy"])


def test_names_of_fused_experts():
    model = build("fused")
    layout = ExpertLayout.of(model)
    part = layout.take(model.state_dict(), CHOSEN)
    assert set(part) == {
        f"layer.{layer}.expert.{e}.{name}"
        for layer, e in ((0, 3), (0, 0), (1, 2))
        for name in ("w1", "b1", "w2", "b2")
    }
    assert torch.equal(part["layer.0.expert.3.w1"], model.blocks[0].experts.w1[3])
    assert torch.equal(part["layer.1.expert.2.b2"], model.blocks[1].experts.b2[2])


def test_names_of_listed_experts():
    model = build("list")
    part = ExpertLayout.of(model).take(model.state_dict(), {1: [2]})
    assert list(part) == [
        f"layer.1.expert.2.{name}" for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
    ]
    assert torch.equal(part["layer.1.expert.2.fc1.weight"], model.blocks[1].experts[2].fc1.weight)


@both_kinds
def test_counts_and_bytes_by_hand(kind: str):
    layout = ExpertLayout.of(build(kind))
    assert layout.layers == EXPERTS == (5, 4)
    assert layout.num_layers == 2
    expert = 8 * (2 * WIDTH * HIDDEN + HIDDEN + WIDTH)
    gates = 8 * (WIDTH * 9 + (9 if kind == "fused" else 0))
    assert layout.expert_bytes() == 9 * expert
    assert layout.expert_bytes(CHOSEN) == 3 * expert
    assert layout.expert_bytes([0, 1]) == 4 * expert
    assert layout.shared_bytes() == gates + 8 * (4 * WIDTH + WIDTH + WIDTH * CLASSES + CLASSES)
    names = ("weight", "bias") if kind == "fused" else ("weight",)
    assert layout.gate_rows == tuple(
        tuple(f"blocks.{i}.gate.{name}" for name in names) for i in range(2)
    )


@both_kinds
def test_shared_is_everything_else(kind: str):
    model = build(kind)
    layout = ExpertLayout.of(model)
    shared = layout.shared(model.state_dict())
    assert set(shared) == {key for key in model.state_dict() if ".experts." not in key}
    assert set(shared) == set(layout.shared_specs)
    assert "blocks.0.gate.weight" in shared


@both_kinds
@both_arrays
def test_put_is_the_inverse_of_take(kind: str, array: str):
    state = as_kind(build(kind, seed=1).state_dict(), array)
    other = as_kind(build(kind, seed=2).state_dict(), array)
    before = {key: np.asarray(value).copy() for key, value in other.items()}
    layout = ExpertLayout.of(build(kind))

    everything = layout.take(state, {0: range(5), 1: range(4)})
    assert_same_state(
        layout.put(layout.shared(state) | other, everything),
        {key: other[key] if key in layout.shared_specs else state[key] for key in state},
    )

    part = layout.take(state, CHOSEN)
    mixed = layout.put(other, part)
    assert_same_state(layout.take(mixed, CHOSEN), part)
    rest = {0: [1, 2, 4], 1: [0, 1, 3]}
    assert_same_state(layout.take(mixed, rest), layout.take(other, rest))
    assert_same_state(other, before)
    assert type(mixed["blocks.0.gate.weight"]) is type(part["layer.0.expert.3." + first(layout)])


def first(layout: ExpertLayout) -> str:
    return next(iter(layout.moe_layers[0].parts))


@both_kinds
def test_what_is_taken_and_put_is_a_copy(kind: str):
    model = build(kind)
    layout = ExpertLayout.of(model)
    state = model.state_dict()
    part = layout.take(state, CHOSEN)
    new = layout.put(state, part)
    kept = {key: value.clone() for key, value in part.items()}
    for tensor in part.values():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_same_state(part, kept)
    assert_same_state(layout.take(new, CHOSEN), kept)


def test_put_takes_over_type_and_dtype():
    model = build("fused")
    layout = ExpertLayout.of(model)
    part = layout.take(model.state_dict(), CHOSEN)
    single = {key: value.numpy().astype(np.float32) for key, value in part.items()}
    new = layout.put(model.state_dict(), single)
    assert new["blocks.0.experts.w1"].dtype == torch.float64
    graph = {key: value.requires_grad_() for key, value in part.items()}
    assert not layout.put(model.state_dict(), graph)["blocks.0.experts.w1"].requires_grad


@both_kinds
@both_arrays
def test_submodel_state_there_and_back(kind: str, array: str):
    model = build(kind)
    layout = ExpertLayout.of(model)
    state = as_kind(model.state_dict(), array)
    part = layout.take(state, CHOSEN)
    sub = layout.to_submodel_state(layout.shared(state), part, CHOSEN)
    assert_same_state(sub, layout.take_submodel(state, CHOSEN))
    assert_same_state(sub, layout.submodel(model, CHOSEN).state_dict())
    np.testing.assert_array_equal(
        sub["blocks.0.gate.weight"], np.asarray(state["blocks.0.gate.weight"])[[3, 0]]
    )
    assert_same_state(layout.from_submodel_state(sub, CHOSEN), part)


def test_one_sequence_means_every_layer():
    model = build("fused")
    layout = ExpertLayout.of(model)
    state = model.state_dict()
    assert_same_state(layout.take(state, [1, 3]), layout.take(state, {0: [1, 3], 1: [1, 3]}))


@both_kinds
def test_on_the_meta_device_and_pickled(kind: str):
    real = ExpertLayout.of(build(kind))
    with torch.device("meta"):
        meta = ExpertLayout.of(build(kind))
    assert meta == real
    assert pickle.loads(pickle.dumps(real)) == real


def test_a_block_can_be_the_model_and_the_gate_a_router():
    block = ListBlock(4, 6, 3)
    block.router = block.gate
    del block.gate
    layout = ExpertLayout.of(block)
    assert layout.gate_rows == (("router.weight",),)
    assert "layer.0.expert.2.fc2.bias" in layout.take(block.state_dict(), [2])


def test_a_routing_bias_beside_the_gate_has_rows_too():
    block = SparseMoE(4, 6, 3)
    block.register_buffer("routing_bias", torch.arange(3.0))
    layout = ExpertLayout.of(block)
    assert layout.gate_rows == (("gate.weight", "gate.bias", "routing_bias"),)
    assert layout.submodel(block, [2, 0]).routing_bias.tolist() == [2.0, 0.0]


def message(text: str) -> str:
    return re.escape(text)


def test_no_experts():
    with pytest.raises(ValueError, match="Sequential has no experts: no child module named"):
        ExpertLayout.of(nn.Sequential(nn.Linear(2, 2)))


def test_experts_that_do_not_fit_their_gate():
    block = ListBlock(4, 6, 3)
    with pytest.raises(ValueError, match="experts holds 3 experts, but num_experts says 4"):
        ExpertLayout.of(block, num_experts=4)
    assert ExpertLayout.of(block, num_experts=3).layers == (3,)
    block.gate = nn.Linear(4, 5)
    with pytest.raises(ValueError, match="experts holds 3 experts, but its gate has 5"):
        ExpertLayout.of(nn.Sequential(block))
    del block.gate
    with pytest.raises(ValueError, match="block '0' has experts, but no child 'gate'"):
        ExpertLayout.of(nn.Sequential(block))
    block.gate = nn.Identity()
    with pytest.raises(ValueError, match=r"0\.gate has no weight"):
        ExpertLayout.of(nn.Sequential(block))
    fused = SparseMoE(4, 6, 3)
    fused.gate = nn.Linear(4, 5)
    with pytest.raises(ValueError, match="no tensor with one entry per expert"):
        ExpertLayout.of(fused)


def test_experts_of_one_list_must_be_alike():
    block = ListBlock(4, 6, 3)
    block.experts[1] = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"experts\.1 has tensors .* expected those of experts\.0"):
        ExpertLayout.of(block)


@pytest.mark.parametrize(
    ("experts", "text"),
    [
        ([4], "layer 1 has no expert 4, expected 0 to 3"),
        ({0: [-1]}, "layer 0 has no expert -1, expected 0 to 4"),
        ({2: [0]}, "layer 2 does not exist, expected 0 to 1"),
        ({0: [1, 1]}, "layer 0: experts [1, 1] name an expert twice"),
    ],
)
def test_unknown_experts(experts, text: str):
    model = build("fused")
    with pytest.raises(ValueError, match=message(text)):
        ExpertLayout.of(model).take(model.state_dict(), experts)


@pytest.mark.parametrize(
    "name",
    ["layer.0.expert.5.w1", "layer.2.expert.0.w1", "layer.0.expert.0.w9", "head.weight"],
)
def test_put_rejects_unknown_names(name: str):
    model = build("fused")
    text = f"unknown expert tensor '{name}', expected layer.L.expert.E.PART with 2 layers of [5, 4]"
    with pytest.raises(ValueError, match=message(text)):
        ExpertLayout.of(model).put(model.state_dict(), {name: torch.zeros(6, 10)})


@both_kinds
def test_wrong_shapes_and_missing_tensors(kind: str):
    model = build(kind)
    layout = ExpertLayout.of(model)
    state = model.state_dict()
    part = layout.take(state, CHOSEN)
    name, key = (
        f"layer.0.expert.3.{first(layout)}",
        layout.moe_layers[0].state_key(3, first(layout)),
    )
    shape = layout.moe_layers[0].parts[first(layout)].shape
    with pytest.raises(ValueError, match=message(f"{name} has shape (2,), expected {shape}")):
        layout.put(state, {name: torch.zeros(2)})
    with pytest.raises(ValueError, match=message(f"{key} has shape (2,), expected (")):
        layout.take({**state, key: torch.zeros(2)}, CHOSEN)
    with pytest.raises(ValueError, match=message(f"tensor '{key}' is missing")):
        layout.take({k: v for k, v in state.items() if k != key}, CHOSEN)
    with pytest.raises(ValueError, match=message(f"state has no tensor '{key}'")):
        layout.put(layout.shared(state), part)
    with pytest.raises(ValueError, match=message(f"tensor '{name}' is missing")):
        layout.to_submodel_state(layout.shared(state), layout.take(state, {0: [0], 1: [2]}), CHOSEN)
    with pytest.raises(ValueError, match="layer 1 is left without experts"):
        layout.to_submodel_state(layout.shared(state), part, {0: [3]})
    sub = layout.take_submodel(state, CHOSEN)
    text = "has shape (2, 6, 10), expected (3, 6, 10)" if kind == "fused" else "is missing"
    with pytest.raises(ValueError, match=message(text)):
        layout.from_submodel_state(sub, {0: [3, 0, 1], 1: [2]})
