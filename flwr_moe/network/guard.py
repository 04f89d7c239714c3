"""What a reply must look like before anybody averages it, and what happens if none does."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

import numpy as np
from flwr.app import ArrayRecord, Error, Message, MetricRecord, RecordDict

from flwr_moe.arrays import outline, unlike, values_of

REJECTED = 1001
"""Error code of a reply that arrived and cannot be used."""
MOST_FAILED = 3
"""Rounds in a row of which all replies are errors, after which a run is stopped."""


def check_reply(sent: RecordDict, reply: RecordDict) -> str | None:
    """Say what is wrong with a reply, or nothing.

    An ArrayRecord that has the same key as one that was sent must hold arrays of the same
    names and shapes; every floating-point array and every metric must be finite.

    Parameters
    ----------
    sent : RecordDict
        Content of the message the node answered.
    reply : RecordDict
        Content of its answer.

    Returns
    -------
    str or None
        A reason that names the record, the array and what was expected, or None.

    Notes
    -----
    Source: ours.
    """
    for record_key, record in reply.items():
        if isinstance(record, ArrayRecord):
            known = sent.get(record_key)
            reason = unlike(record, known, record_key) if isinstance(known, ArrayRecord) else None
            if reason is not None:
                return reason
            for key, array in record.items():
                try:
                    values = np.asarray(values_of(array))
                except Exception as err:  # whatever a broken node makes numpy's reader stumble on
                    return f"array '{record_key}/{key}' cannot be read: {err}"
                if values.shape != tuple(array.shape):
                    return (
                        f"array '{record_key}/{key}' has shape {values.shape}, "
                        f"expected {tuple(array.shape)} as it says itself"
                    )
                if values.dtype.kind in "OSUMm":
                    return f"array '{record_key}/{key}' is of {values.dtype}, expected numbers"
                if values.dtype.kind in "fc" and not np.isfinite(values).all():
                    return f"array '{record_key}/{key}' has non-finite values"
        elif isinstance(record, MetricRecord):
            for key, value in record.items():
                numbers = value if isinstance(value, list) else [value]
                if not all(math.isfinite(number) for number in numbers):
                    return f"metric '{record_key}/{key}' is not finite"
    return None


def outline_of(content: RecordDict) -> RecordDict:
    """Copy the names and shapes of arrays: all that a reply is checked against."""
    return RecordDict({key: outline(record) for key, record in content.array_records.items()})


def refuse(reply: Message, reason: str) -> None:
    """Make an error of a reply that arrived and cannot be used."""
    # Flower's records refer to one another in circles: arrays would outlive many replies.
    for record in reply.content.array_records.values():
        record.clear()
    # A message has content or an error, and Flower exchanges neither for the other.
    reply.content = None  # type: ignore[assignment]
    reply.error = Error(REJECTED, f"rejected: {reason}")


class NothingTrained(RuntimeError):  # noqa: N818 - says what happened
    """Nobody trains, for a reason that will not go away by itself."""


class FailedRounds:
    """Stops a run in which all replies of its first round, or of three in a row, are errors."""

    def __init__(self) -> None:
        self._trained = False
        self._failed = 0
        self._reasons: Counter[str] = Counter()

    def over(self, reasons: Iterable[str | None]) -> None:
        """Take note of a round of training.

        Parameters
        ----------
        reasons : iterable of str or None
            For every reply that came, why it cannot be used; None for one that can. A round
            without replies says nothing: links may be at fault.

        Raises
        ------
        NothingTrained
            With the commonest error.
        """
        told = list(reasons)
        errors = [reason for reason in told if reason is not None]
        if len(errors) < len(told):
            self._trained, self._failed = True, 0
            self._reasons.clear()
        elif errors:
            self._failed += 1
            self._reasons.update(errors)
            if self._failed == MOST_FAILED or not self._trained:
                ((reason, count),) = self._reasons.most_common(1)
                rounds = "the first round" if not self._trained else f"{MOST_FAILED} rounds"
                raise NothingTrained(
                    f"nothing is trained: all {self._reasons.total()} replies of {rounds} are "
                    f"errors, {count} of them: {' '.join(reason.split())}"
                )
