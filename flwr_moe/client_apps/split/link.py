"""A client half's way to its server half: encode, send, and decode what comes back."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from flwr_moe.exchange import ExchangeClient
from flwr_moe.network.traffic import ACTIVATION_BYTES, EXCHANGES, GRADIENT_BYTES
from flwr_moe.split.codecs import Chain, CodecKey, Place, Role, shape_text
from flwr_moe.split.protocol import (
    ACTIVATION,
    CONTEXT,
    GRADIENT,
    HANDLER,
    LABELS,
    with_prefix,
    without_prefix,
)


class CutLink:
    """What one client sends over the cut in one round, and what comes back.

    Parameters
    ----------
    exchange : ExchangeClient
        Of the server half.
    codecs : mapping of str to Chain
        By role.
    key : CodecKey
        Of batch 0: seed, round and partition hold for all.
    facts : mapping of str to str
        Said with every batch.

    Attributes
    ----------
    activation_bytes, gradient_bytes, exchanges : int
        Sent, received, and how often; labels and what else crosses the cut count with activations.
    waited_s : float
        Wall seconds from sending to the answer, the server's work included.
    server_flops : int
        Work of the server half in one step, as it has told.
    """

    def __init__(
        self,
        exchange: ExchangeClient,
        codecs: Mapping[Role, Chain],
        key: CodecKey,
        facts: Mapping[str, str],
    ) -> None:
        self._exchange, self._codecs, self._key, self._facts = exchange, codecs, key, dict(facts)
        self.activation_bytes = self.gradient_bytes = self.exchanges = self.server_flops = 0
        self.waited_s = 0.0

    @property
    def done(self) -> int:
        """Batches done."""
        return self.exchanges

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
        encoded = self._codecs["activation"].encode(activation, self._key_of("activation"))
        tensors, metadata = with_prefix(ACTIVATION, encoded)
        tensors |= {f"{CONTEXT}{i}": tensor for i, tensor in enumerate(context)}
        tensors[LABELS] = labels
        answer, told = self._call(tensors, {**metadata, "shape": shape_text(activation.shape)})
        came = without_prefix(GRADIENT, answer, told)
        gradient = self._codecs["gradient"].decode(came, self._key_of("gradient"))
        check_fit(gradient, activation)
        self.exchanges += 1
        self.activation_bytes += sum(t.numel() * t.element_size() for t in tensors.values())
        self.gradient_bytes += came.num_bytes
        self.server_flops = int(told.get("server-flops", self.server_flops))
        return gradient, float(told["loss"])

    def traffic(self) -> dict[str, int]:
        """Say what was moved, under the names by which the network reads it from a reply."""
        return {
            ACTIVATION_BYTES: self.activation_bytes,
            GRADIENT_BYTES: self.gradient_bytes,
            EXCHANGES: self.exchanges,
        }

    def _call(
        self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        facts = {
            **self._facts,
            "round": str(self._key.round),
            "partition": str(self._key.partition),
            "batch": str(self.done),
            **metadata,
        }
        began = time.perf_counter()
        answer = self._exchange.call(HANDLER, tensors, facts)
        self.waited_s += time.perf_counter() - began
        return answer

    def _key_of(self, role: Role, place: Place = "cut") -> CodecKey:
        key = self._key
        return CodecKey(key.seed, key.round, self.done, key.partition, role, place)


def check_fit(gradient: Tensor, activation: Tensor) -> None:
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
