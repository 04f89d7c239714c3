"""One client's experts: taken apart with their gate rows, and mixed with those of peers."""

import torch

from flwr_moe.experts import ExpertLayout
from flwr_moe.experts.mixing_plan import Ingredient
from flwr_moe.experts.personal import mix_experts, split_state
from flwr_moe.tasks.models import MoEClassifier


def expert(value: float, gate: float) -> dict[str, torch.Tensor]:
    return {"up": torch.full((2,), value), "gate.0": torch.full((3,), gate)}


OWN = {(0, 0): expert(1.0, 10.0), (0, 1): expert(2.0, 20.0)}
THEIRS = {(5, 0, 1): expert(4.0, 40.0), (6, 0, 0): expert(8.0, 80.0)}
PLAN = [
    Ingredient(0, 0, 3, 0, 0.5),
    Ingredient(0, 0, 5, 1, 0.25),
    Ingredient(0, 0, 6, 0, 0.25),
]


def value_of(mixed: dict[tuple[int, int], dict[str, torch.Tensor]], name: str = "up") -> float:
    return float(mixed[0, 0][name][0])


def test_experts_are_mixed_by_their_weights() -> None:
    mixed, lost = mix_experts(PLAN, OWN, 3, lambda *at: THEIRS.get(at), mix_gates=True)
    assert value_of(mixed) == 0.5 * 1 + 0.25 * 4 + 0.25 * 8
    assert value_of(mixed, "gate.0") == 35.0
    assert lost == 0
    assert mixed[0, 1]["up"].tolist() == [2.0, 2.0]  # no share names it
    assert OWN[0, 0]["up"].tolist() == [1.0, 1.0]


def test_gate_rows_stay_where_gates_are_local() -> None:
    mixed, _ = mix_experts(PLAN, OWN, 3, lambda *at: THEIRS.get(at), mix_gates=False)
    assert value_of(mixed) == 3.5
    assert value_of(mixed, "gate.0") == 10.0


def test_who_does_not_answer_is_left_out_and_the_others_scaled_up() -> None:
    mixed, lost = mix_experts(
        PLAN, OWN, 3, lambda *at: None if at[0] == 6 else THEIRS.get(at), mix_gates=True
    )
    assert value_of(mixed) == (0.5 * 1 + 0.25 * 4) / 0.75
    assert lost == 1


def test_alone_an_expert_stays_as_it_is() -> None:
    mixed, lost = mix_experts(PLAN, OWN, 3, lambda *at: None, mix_gates=True)
    assert (value_of(mixed), lost) == (1.0, 2)


def test_what_does_not_fit_or_is_not_finite_counts_as_lost() -> None:
    broken = {
        (5, 0, 1): {"up": torch.full((3,), 4.0), "gate.0": torch.full((3,), 40.0)},
        (6, 0, 0): expert(float("nan"), 80.0),
    }
    mixed, lost = mix_experts(PLAN, OWN, 3, lambda *at: broken.get(at), mix_gates=True)
    assert (value_of(mixed), lost) == (1.0, 2)


def test_an_expert_that_goes_into_two_is_fetched_once() -> None:
    asked = []
    plan = [Ingredient(0, 0, 5, 1, 1.0), Ingredient(0, 1, 5, 1, 1.0)]

    def fetch(*at: int) -> dict[str, torch.Tensor]:
        asked.append(at)
        return THEIRS[at]

    mixed, _ = mix_experts(plan, OWN, 3, fetch, mix_gates=True)
    assert asked == [(5, 0, 1)]
    assert mixed[0, 0]["up"].tolist() == mixed[0, 1]["up"].tolist() == [4.0, 4.0]


def test_half_precision_is_kept_and_summed_in_double() -> None:
    own = {(0, 0): {"up": torch.tensor([1.0], dtype=torch.bfloat16)}}
    theirs = {"up": torch.tensor([1.0078125], dtype=torch.bfloat16)}
    plan = [Ingredient(0, 0, 0, 0, 0.5), Ingredient(0, 0, 1, 0, 0.5)]
    mixed, _ = mix_experts(plan, own, 0, lambda *at: theirs, mix_gates=True)
    assert mixed[0, 0]["up"].dtype == torch.bfloat16


def test_a_state_is_taken_apart() -> None:
    torch.manual_seed(0)
    model = MoEClassifier(4, 2, 3, 5, num_experts=3, top_k=1)
    state = model.state_dict()
    rest, experts = split_state(ExpertLayout.of(model), state)
    assert set(experts) == {(0, 0), (0, 1), (0, 2)}
    assert "head.weight" in rest and "moe.gate.weight" in rest
    assert not any("experts" in key for key in rest)
    assert torch.equal(experts[0, 2]["gate.0"], state["moe.gate.weight"][2])
    numbers = sum(t.numel() for e in experts.values() for k, t in e.items() if "gate" not in k)
    assert numbers + sum(t.numel() for t in rest.values()) == sum(t.numel() for t in state.values())
