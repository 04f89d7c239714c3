"""A device's way to the server's part of its model: encode, send, and decode what comes back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from flwr_moe.exchange import ExchangeClient
from flwr_moe.split.codecs import Chain, CodecKey, Encoded, Place, Role
from flwr_moe.split.protocol import BACKWARD, CONTEXT, FORWARD, HANDLER, LABELS, BatchCall


class CutLink:
    """What one client sends over its cuts in one round, and what comes back.

    Parameters
    ----------
    exchange : ExchangeClient
        Of the server's part.
    codecs : mapping of str to Chain
        By role.
    key : CodecKey
        Of batch 0: seed, round and partition hold for all.
    agreed : mapping of str to str
        Said with every batch, see :func:`~flwr_moe.split.protocol.agreement`.
    examples : int
        That the client holds.
    kept : tuple of int, optional
        Units at the cut that it has; all without.
    top_codecs : mapping of str to Chain, optional
        By role, for the top cut, if labels stay with the client: then a batch takes two exchanges.

    Attributes
    ----------
    moved : Counter of tuple of str
        Bytes by role and place: activations are sent at the cut and received at the top cut,
        gradients the other way round. Labels and what else crosses count with activations.
    exchanges : int
        How often.
    server_flops : int
        Work of the server's part in one step, as it has told.
    """

    def __init__(
        self,
        exchange: ExchangeClient,
        codecs: Mapping[Role, Chain],
        key: CodecKey,
        agreed: Mapping[str, str],
        examples: int = 1,
        kept: tuple[int, ...] | None = None,
        top_codecs: Mapping[Role, Chain] | None = None,
    ) -> None:
        self._exchange, self._key, self._agreed = exchange, key, dict(agreed)
        self._examples, self._kept = examples, kept
        self._codecs: dict[Place, Mapping[Role, Chain]] = {"cut": codecs}
        if top_codecs is not None:
            self._codecs["top"] = top_codecs
        self.moved: Counter[tuple[Role, Place]] = Counter()
        self.exchanges = self.server_flops = 0

    @property
    def done(self) -> int:
        """Batches done."""
        return self.exchanges // len(self._codecs)

    def send(
        self, activation: Tensor, context: Sequence[Tensor], labels: Tensor
    ) -> tuple[Tensor, float]:
        """Have the server half train on a batch; the gradient of the activation, and the loss.

        Raises
        ------
        ExchangeError
            If the server half does not answer, or refuses the batch.
        ValueError
            If the activation is not finite, or the answer does not fit it.
        """
        beside = {**_numbered(context), LABELS: labels}
        up, down = self._key_of("activation"), self._key_of("gradient")
        gradient, told = self._trade(activation, up, down, beside)
        _check_fit(gradient, activation)
        return gradient, float(told["loss"])

    def forward(self, activation: Tensor, context: Sequence[Tensor]) -> Tensor:
        """Have the server's part run on a batch; the activation at the top cut.

        Raises
        ------
        ExchangeError
            If the server's part does not answer, or refuses the batch.
        ValueError
            If the activation is not finite, or the answer cannot be read.
        """
        up, down = self._key_of("activation"), self._key_of("activation", "top")
        top, _ = self._trade(activation, up, down, _numbered(context), FORWARD)
        # Aligned in memory, matrix products round as they do in training of the whole model.
        return top.clone()

    def backward(self, gradient: Tensor, activation: Tensor) -> Tensor:
        """Have the server's part learn from the gradient at the top cut; the one of `activation`.

        Raises
        ------
        ExchangeError
            If the server's part does not answer, or refuses the gradient.
        ValueError
            If the gradient is not finite, or the answer does not fit the activation.
        """
        up, down = self._key_of("gradient", "top"), self._key_of("gradient")
        below, _ = self._trade(gradient, up, down, {}, BACKWARD)
        _check_fit(below, activation)
        return below

    def _trade(
        self,
        tensor: Tensor,
        up: CodecKey,
        down: CodecKey,
        beside: Mapping[str, Tensor],
        stage: str = "",
    ) -> tuple[Tensor, dict[str, str]]:
        """Send one tensor and get another: that, and what was told with it."""
        encoded = self._codecs[up.place][up.role].encode(tensor, up).under(f"{up.role}.")
        tensors = {**encoded.tensors, **beside}
        call = BatchCall(
            up.partition, up.round, up.batch, self._examples, tuple(tensor.shape), self._kept, stage
        )
        answer, told = self._exchange.call(
            HANDLER, tensors, {**self._agreed, **call.metadata(), **encoded.metadata}
        )
        came = Encoded(answer, told).within(f"{down.role}.")
        decoded = self._codecs[down.place][down.role].decode(came, down)
        self.exchanges += 1
        self.moved[up.role, up.place] += sum(t.nbytes for t in tensors.values())
        self.moved[down.role, down.place] += came.num_bytes
        self.server_flops += int(told.get("server-flops", 0))
        return decoded, told

    def _key_of(self, role: Role, place: Place = "cut") -> CodecKey:
        key = self._key
        return CodecKey(key.seed, key.round, self.done, key.partition, role, place)


def _numbered(context: Sequence[Tensor]) -> dict[str, Tensor]:
    return {f"{CONTEXT}{i}": tensor for i, tensor in enumerate(context)}


def _check_fit(gradient: Tensor, activation: Tensor) -> None:
    """Raise ValueError unless a gradient that came fits its activation."""
    if gradient.shape != activation.shape or gradient.dtype != activation.dtype:
        raise ValueError(
            f"the gradient has shape {tuple(gradient.shape)} and {gradient.dtype}, expected "
            f"{tuple(activation.shape)} and {activation.dtype}"
        )


def small_labels(labels: Tensor) -> Tensor:
    """Return whole-number labels in the smallest type that holds them all."""
    low, high = (int(labels.min()), int(labels.max())) if labels.numel() else (0, 0)
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
        limits = torch.iinfo(dtype)
        if limits.min <= low and high <= limits.max:
            return labels.to(dtype)
    return labels.to(torch.int64)
