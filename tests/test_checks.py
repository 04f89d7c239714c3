"""Numbers out of bounds are named, with what was expected."""

import math
from typing import Any

import pytest

from flwr_moe.checks import check_numbers


@pytest.mark.parametrize(
    ("bounds", "good", "bad", "expected"),
    [
        ({"least": 1}, 1, 0, "at least 1"),
        ({"above": 0}, 1e-9, 0, "above 0"),
        ({"least": 0, "most": 1}, 1, 1.5, "0 to 1"),
        ({"above": 0, "most": 1}, 1, 0, "above 0 and up to 1"),
        ({"least": 0, "below": 1}, 0, 1, "at least 0 and below 1"),
    ],
)
def test_the_first_number_out_of_bounds_is_named(
    bounds: dict[str, Any], good: float, bad: float, expected: str
) -> None:
    check_numbers(**bounds, rate=good)
    for value in (bad, math.nan):
        with pytest.raises(ValueError, match=f"^share is {value}, expected {expected}$"):
            check_numbers(**bounds, rate=good, share=value, other=value)
