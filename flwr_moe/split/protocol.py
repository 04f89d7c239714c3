"""What the halves of a split model say to each other, batch by batch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from flwr_moe.exchange.request import Refused
from flwr_moe.split.codecs import Chain, Encoded, Role

HANDLER = "split"
"""Name of the server half's handler at the exchange."""
ACTIVATION, GRADIENT, CONTEXT, LABELS = "activation.", "gradient.", "context.", "labels"
"""Names, or beginnings of names, of what travels."""
STAGE, FORWARD, BACKWARD = "stage", "forward", "backward"
"""Which of its two requests a batch has come to, where clients keep their labels."""


def agreement(state: Mapping[str, Tensor], at: str, codecs: Mapping[Role, Chain]) -> dict[str, str]:
    """Say in words what both halves must agree on; it travels with every batch.

    Parameters
    ----------
    state : mapping of str to Tensor
        Of the whole model; names, shapes and types count, values do not.
    at : str
        Where it is cut.
    codecs : mapping of str to Chain
        By role.
    """
    names = "\n".join(f"{k} {tuple(t.shape)} {t.dtype}" for k, t in sorted(state.items()))
    return {
        "cut": at,
        "codecs": _in_words(codecs),
        "model": hashlib.sha256(names.encode()).hexdigest()[:16],
    }


def top_agreement(top_cut: str, codecs: Mapping[Role, Chain]) -> dict[str, str]:
    """Say what both sides must agree on besides, where clients keep their labels."""
    return {"top-cut": top_cut, "top-codecs": _in_words(codecs)}


def _in_words(codecs: Mapping[Role, Chain]) -> str:
    return "; ".join(
        f"{role}: {', '.join(map(repr, codecs[role].codecs))}" for role in sorted(codecs)
    )


def with_prefix(prefix: str, encoded: Encoded) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Name an encoded tensor's parts so that several fit into one body."""
    return (
        {prefix + name: tensor for name, tensor in encoded.tensors.items()},
        {prefix + name: text for name, text in encoded.metadata.items()},
    )


def without_prefix(
    prefix: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> Encoded:
    """Undo `with_prefix`."""
    return Encoded(
        {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)},
        {k.removeprefix(prefix): t for k, t in metadata.items() if k.startswith(prefix)},
    )


@dataclass(frozen=True)
class BatchCall:
    """The numbers of one request.

    Attributes
    ----------
    partition, round, batch : int
        Which batch of which client.
    examples : int
        Training examples the client holds.
    shape : tuple of int
        Announced shape of the activation.
    kept : tuple of int or None
        Units at the cut that the client has; None for all.
    """

    partition: int
    round: int
    batch: int
    examples: int
    shape: tuple[int, ...]
    kept: tuple[int, ...] | None

    @classmethod
    def of(cls, metadata: Mapping[str, str]) -> BatchCall:
        """Read a request's metadata; what is missing or no number is `Refused`."""
        kept = metadata.get("kept")
        return cls(
            _int(metadata, "partition"),
            _int(metadata, "round"),
            _int(metadata, "batch"),
            _int(metadata, "examples", 1),
            _ints("shape", metadata.get("shape", "")),
            None if kept is None else _ints("kept", kept),
        )


def numbered(prefix: str, tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """Return the tensors ``prefix0``, ``prefix1`` and so on; `Refused` if one is missing."""
    names = {name for name in tensors if name.startswith(prefix)}
    if names != {f"{prefix}{i}" for i in range(len(names))}:
        raise Refused(f"tensors are {sorted(names)}, expected {prefix}0, {prefix}1, …")
    return [tensors[f"{prefix}{i}"] for i in range(len(names))]


def _int(metadata: Mapping[str, str], key: str, least: int = 0) -> int:
    text = metadata.get(key, "")
    if not (text.isascii() and text.isdigit() and len(text) < 16 and int(text) >= least):
        raise Refused(f"{key} is {text!r}, expected a whole number from {least}")
    return int(text)


def _ints(key: str, text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(p.isascii() and p.isdigit() and len(p) < 16 for p in parts):
        raise Refused(f"{key} is {text!r}, expected whole numbers and commas")
    return tuple(int(part) for part in parts)
