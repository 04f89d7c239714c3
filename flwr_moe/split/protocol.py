"""What the parts of a split model say to each other, batch by batch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from flwr_moe.exchange.body import Refused
from flwr_moe.split.codecs import Chain, Role, shape_text

HANDLER = "split"
"""Name of the server half's handler at the exchange."""
ACTIVATION, GRADIENT, CONTEXT, LABELS = "activation.", "gradient.", "context.", "labels"
"""Names, or beginnings of names, of the tensors that travel."""
FORWARD, BACKWARD = "forward", "backward"
"""Which of its two requests a batch has come to, where clients keep their labels."""

Answer = tuple[dict[str, Tensor], dict[str, str]]


def agreement(
    state: Mapping[str, Tensor],
    at: str,
    codecs: Mapping[Role, Chain],
    top_cut: str = "",
    top_codecs: Mapping[Role, Chain] | None = None,
) -> dict[str, str]:
    """Say in words what both sides must agree on; it travels with every batch.

    Parameters
    ----------
    state : mapping of str to Tensor
        Of the whole model; names, shapes and types count, values do not.
    at : str
        Where it is cut.
    codecs : mapping of str to Chain
        By role.
    top_cut : str
        Where it is cut a second time, if clients keep their labels.
    top_codecs : mapping of str to Chain, optional
        By role, for that cut.
    """
    names = "\n".join(f"{k} {tuple(t.shape)} {t.dtype}" for k, t in sorted(state.items()))
    agreed = {
        "cut": at,
        "codecs": _in_words(codecs),
        "model": hashlib.sha256(names.encode()).hexdigest()[:16],
    }
    if top_codecs is not None:
        agreed |= {"top-cut": top_cut, "top-codecs": _in_words(top_codecs)}
    return agreed


def _in_words(codecs: Mapping[Role, Chain]) -> str:
    return "; ".join(
        f"{role}: {', '.join(map(repr, codecs[role].codecs))}" for role in sorted(codecs)
    )


@dataclass(frozen=True)
class BatchCall:
    """What one request says of itself beside what is agreed on.

    Attributes
    ----------
    partition, round, batch : int
        Which batch of which client.
    examples : int
        Training examples the client holds.
    shape : tuple of int
        Of the tensor that travels, before it is encoded.
    kept : tuple of int or None
        Units at the cut that the client has; None for all.
    stage : {"", "forward", "backward"}
        Which of a batch's two requests, where clients keep their labels.
    """

    partition: int
    round: int
    batch: int
    examples: int
    shape: tuple[int, ...]
    kept: tuple[int, ...] | None = None
    stage: str = ""

    def metadata(self) -> dict[str, str]:
        """Write it as a request's metadata."""
        told = {
            "partition": str(self.partition),
            "round": str(self.round),
            "batch": str(self.batch),
            "examples": str(self.examples),
            "shape": shape_text(self.shape),
        }
        if self.kept is not None:
            told["kept"] = shape_text(self.kept)
        return {**told, "stage": self.stage} if self.stage else told

    @classmethod
    def of(cls, metadata: Mapping[str, str], in_two: bool) -> BatchCall:
        """Read a request's metadata; what is missing or no number is `Refused`.

        Parameters
        ----------
        metadata : mapping of str to str
            As `metadata` writes it.
        in_two : bool
            Whether a batch takes two requests.
        """
        kept, stage = metadata.get("kept"), metadata.get("stage") if in_two else ""
        if stage is None or (in_two and stage not in (FORWARD, BACKWARD)):
            raise Refused(f"stage is {stage!r}, expected {FORWARD!r} or {BACKWARD!r}")
        return cls(
            _int(metadata, "partition"),
            _int(metadata, "round"),
            _int(metadata, "batch"),
            _int(metadata, "examples", 1),
            _ints("shape", metadata.get("shape", "")),
            None if kept is None else _ints("kept", kept),
            stage,
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
