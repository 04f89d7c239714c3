"""Records as dataclasses: what is read, what is refused, what is written."""

import math
from dataclasses import dataclass
from typing import Any

import pytest
from flwr.app import ConfigRecord, MetricRecord, RecordDict

from flwr_moe.messages.base import Fields, Figures, config_of, key, metrics_of, read_value


@dataclass(frozen=True)
class Order(Fields):
    steps: int = key(least=1)
    learning_rate: float = key(above=0, most=1)
    kind: str = key("the-kind", one_of=("a", "b"))
    peers: list[int] = key(factory=list, least=0)
    shares: list[float] = key(factory=list)
    full: bool = False
    budget: int | None = None
    experts: dict[int, list[int]] = key(factory=dict)
    extra: dict[str, Any] = key(factory=dict)


GOOD = {"steps": 3, "learning-rate": 0.5, "the-kind": "a"}


def test_there_and_back():
    order = Order(3, 1.0, "b", [0, 2], [0.5], True, 7, {0: [1, 4], 2: []}, {"mine": "x"})
    record = order.to_record()
    assert isinstance(record, ConfigRecord)
    assert dict(record) == {
        "steps": 3,
        "learning-rate": 1.0,
        "the-kind": "b",
        "peers": [0, 2],
        "shares": [0.5],
        "full": True,
        "budget": 7,
        "experts.0": [1, 4],
        "experts.2": [],
        "mine": "x",
    }
    assert Order.from_record(record) == order


def test_what_is_missing_and_what_is_converted():
    order = Order.from_record({**GOOD, "steps": 4.0, "learning-rate": 1})
    assert order == Order(4, 1.0, "a")
    assert isinstance(order.steps, int) and isinstance(order.learning_rate, float)
    assert "budget" not in order.to_record()


@pytest.mark.parametrize(
    ("at", "value", "expected"),
    [
        ("steps", None, "a whole number from 1"),
        ("steps", True, "a whole number from 1"),
        ("steps", 1.5, "a whole number from 1"),
        ("steps", 0, "a whole number from 1"),
        ("learning-rate", math.nan, "a number above 0 up to 1"),
        ("learning-rate", 0, "a number above 0 up to 1"),
        ("learning-rate", "1", "a number above 0 up to 1"),
        ("the-kind", "c", "one of a, b"),
        ("peers", 3, "a list of whole numbers from 0"),
        ("peers", [1, -1], "a list of whole numbers from 0"),
        ("shares", ["x"], "a list of numbers"),
        ("full", 1, "true or false"),
        ("experts.0", [0.5], "a list of whole numbers"),
    ],
)
def test_errors_name_key_value_and_expectation(at, value, expected):
    with pytest.raises(ValueError) as error:
        Order.from_record({**GOOD, at: value})
    assert str(error.value) == f"'{at}' is {value!r} in the message, expected {expected}"


def test_figures_are_metrics():
    @dataclass(frozen=True)
    class Told(Figures):
        num_examples: int

    assert isinstance(Told(3).to_record(), MetricRecord)
    with pytest.raises(ValueError, match="'num-examples' is None in the reply's metrics, expected"):
        Told.from_record(MetricRecord())


def test_single_values_and_records():
    assert read_value({}, "x", int, default=5) == 5
    assert read_value({"x": [1, 2.0]}, "x", list[int]) == [1, 2]
    first, marked = ConfigRecord({"a": 1}), ConfigRecord({"b": 1})
    content = RecordDict({"one": first, "two": marked})
    assert config_of(content) is first and config_of(content, "b") is marked
    with pytest.raises(ValueError, match="no config record with 'c'"):
        config_of(content, "c")
    assert not metrics_of(content)
