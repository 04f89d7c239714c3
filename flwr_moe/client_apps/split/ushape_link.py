"""A client's way to the middle of its model, where its labels stay with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from flwr_moe.client_apps.split.link import CutLink, check_fit
from flwr_moe.network.traffic import ACTIVATION_BYTES, EXCHANGES, GRADIENT_BYTES
from flwr_moe.split.codecs import Chain, Role, shape_text
from flwr_moe.split.protocol import (
    ACTIVATION,
    BACKWARD,
    CONTEXT,
    FORWARD,
    GRADIENT,
    STAGE,
    with_prefix,
    without_prefix,
)

GRADIENT_BYTES_UP = "gradient-bytes-up"
"""Metric: how many of the bytes sent to the server's part were gradients."""
ACTIVATION_BYTES_DOWN = "activation-bytes-down"
"""Metric: how many of the bytes received from it were activations."""


class UShapeLink(CutLink):
    """What one client sends over both cuts in one round, and what comes back.

    Takes the arguments of `CutLink`, and:

    Parameters
    ----------
    top_codecs : mapping of str to Chain
        By role, for the top cut.

    Attributes
    ----------
    activation_bytes, gradient_bytes : int
        Sent, and received, of the cut.
    top_activation_bytes, top_gradient_bytes : int
        Received, and sent, of the top cut.
    """

    def __init__(self, *args: Any, top_codecs: Mapping[Role, Chain], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._top_codecs = top_codecs
        self.top_activation_bytes = self.top_gradient_bytes = 0

    @property
    def done(self) -> int:
        """Batches done: two exchanges make one."""
        return self.exchanges // 2

    def forward(self, activation: Tensor, context: Sequence[Tensor]) -> Tensor:
        """Have the server's part run on a batch; the activation at the top cut.

        Raises
        ------
        ExchangeError
            If the server's part does not answer, or refuses the batch.
        ValueError
            If the activation is not finite, or the answer cannot be read.
        """
        encoded = self._codecs["activation"].encode(activation, self._key_of("activation"))
        tensors, metadata = with_prefix(ACTIVATION, encoded)
        tensors |= {f"{CONTEXT}{i}": tensor for i, tensor in enumerate(context)}
        facts = {**metadata, STAGE: FORWARD, "shape": shape_text(activation.shape)}
        answer, told = self._call(tensors, facts)
        came = without_prefix(ACTIVATION, answer, told)
        top = self._top_codecs["activation"].decode(came, self._key_of("activation", "top"))
        self.exchanges += 1
        self.activation_bytes += sum(t.numel() * t.element_size() for t in tensors.values())
        self.top_activation_bytes += came.num_bytes
        self._flops = int(told.get("server-flops", 0))
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
        encoded = self._top_codecs["gradient"].encode(gradient, self._key_of("gradient", "top"))
        tensors, metadata = with_prefix(GRADIENT, encoded)
        facts = {**metadata, STAGE: BACKWARD, "shape": shape_text(gradient.shape)}
        answer, told = self._call(tensors, facts)
        came = without_prefix(GRADIENT, answer, told)
        below = self._codecs["gradient"].decode(came, self._key_of("gradient"))
        check_fit(below, activation)
        self.exchanges += 1
        self.top_gradient_bytes += encoded.num_bytes
        self.gradient_bytes += came.num_bytes
        if "server-flops" in told:
            self.server_flops = self._flops + int(told["server-flops"])
        return below

    def traffic(self) -> dict[str, int]:
        """Say what was moved; the network knows one sum for each direction, of which a part is."""
        return {
            ACTIVATION_BYTES: self.activation_bytes + self.top_gradient_bytes,
            GRADIENT_BYTES: self.gradient_bytes + self.top_activation_bytes,
            EXCHANGES: self.exchanges,
            GRADIENT_BYTES_UP: self.top_gradient_bytes,
            ACTIVATION_BYTES_DOWN: self.top_activation_bytes,
        }
