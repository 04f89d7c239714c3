"""What a client of FedMoE-DA is told."""

import pytest

from flwr_moe.experts.mixing import Ingredient
from flwr_moe.messages.fedmoe_da import PeerOrder, PersonalOrder

PLAN = [Ingredient(0, 1, 4, 0, 0.25), Ingredient(2, 1, 5, 3, 0.75)]


def test_a_plan_survives_its_message() -> None:
    record = PeerOrder(**PeerOrder.columns_of(PLAN)).to_record()
    assert record["mix-weight"] == [0.25, 0.75] and record["mix-peer-expert"] == [0, 3]
    assert PeerOrder.from_record(record).plan == PLAN


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"mix-weight": [0.5]}, "differ in length: .*'mix-peer': 2.*'mix-weight': 1"),
        ({"mix-peer": "4"}, "'mix-peer' is '4' in the message, expected a list of whole numbers"),
    ],
)
def test_a_broken_plan_is_refused(change: dict[str, object], expected: str) -> None:
    record = PeerOrder(**PeerOrder.columns_of(PLAN)).to_record()
    with pytest.raises(ValueError, match=expected):
        PeerOrder.from_record({**record, **change})


def test_how_to_train_is_handed_on() -> None:
    order = PersonalOrder(
        personal=["head."], server_round=2, version=1, gate="mixed", extra={"learning-rate": 0.1}
    )
    record = order.to_record()
    assert record["fedmoe-da.personal"] == ["head."] and record["learning-rate"] == 0.1
    assert PersonalOrder.from_record(record) == order
