"""What a reply must look like before anybody averages it."""

from __future__ import annotations

import math

import numpy as np
from flwr.app import ArrayRecord, MetricRecord, RecordDict

from flwr_moe.arrays import values_of


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
            if isinstance(known, ArrayRecord):
                reason = _check_names_and_shapes(record_key, known, record)
                if reason:
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


def _check_names_and_shapes(name: str, sent: ArrayRecord, reply: ArrayRecord) -> str | None:
    missing = sorted(set(sent) - set(reply))
    extra = sorted(set(reply) - set(sent))
    if missing or extra:
        return f"record '{name}' has wrong keys: missing {missing[:3]}, unexpected {extra[:3]}"
    for key, array in reply.items():
        if tuple(array.shape) != tuple(sent[key].shape):
            return (
                f"array '{name}/{key}' has shape {tuple(array.shape)}, "
                f"expected {tuple(sent[key].shape)}"
            )
    return None
