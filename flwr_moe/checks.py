"""Numbers that a caller gives, checked where they come in."""

from __future__ import annotations


def check_numbers(
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    **numbers: float,
) -> None:
    """Raise ValueError that names the first number out of bounds; NaN is out of all.

    Parameters
    ----------
    least, above, most, below : float, optional
        Bounds; ``least`` and ``most`` are allowed themselves.
    **numbers : float
        Values by the names they have for the caller.
    """
    for name, value in numbers.items():
        inside = (
            (least is None or value >= least)
            and (above is None or value > above)
            and (most is None or value <= most)
            and (below is None or value < below)
        )
        if not inside:
            bounds = (("at least", least), ("above", above), ("up to", most), ("below", below))
            expected = " and ".join(f"{word} {b:g}" for word, b in bounds if b is not None)
            if least is not None and most is not None:
                expected = f"{least:g} to {most:g}"
            raise ValueError(f"{name} is {value}, expected {expected}")
