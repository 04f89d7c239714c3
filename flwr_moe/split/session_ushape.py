"""The server's side of a model in a U-shape: it trains the middle, and sees no labels.

A batch takes two requests: the activation at the cut in and the one at the top cut out, then the
gradient at the top cut in and the one at the cut out.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from flwr_moe.exchange.request import Refused
from flwr_moe.split.codecs import Chain, CodecKey, Role
from flwr_moe.split.protocol import (
    ACTIVATION,
    BACKWARD,
    CONTEXT,
    FORWARD,
    GRADIENT,
    LABELS,
    STAGE,
    BatchCall,
    numbered,
    with_prefix,
    without_prefix,
)
from flwr_moe.split.session import SplitSession
from flwr_moe.split.session_round import ClientState, Pending, Round, Trunk
from flwr_moe.split.step import balance_loss, clip_gradient, counted, seeded

Answer = tuple[dict[str, Tensor], dict[str, str]]


class UShapeSession(SplitSession):
    """The middle of a model whose labels stay with the clients.

    Takes the arguments of :class:`~flwr_moe.split.session.SplitSession` but the loss, and:

    Parameters
    ----------
    top_codecs : mapping of str to Chain
        How activations and gradients travel at the top cut.

    Notes
    -----
    Source: the U-shape is known from split learning; what happens between the two requests is ours.
    A client has at most one batch under way. Until its gradient comes, its forward pass has changed
    nothing: the parameters have not been trained, and the buffers it would change are held with it.
    If the gradient never comes, they go when the round ends.

    With one shared half, others may train it between a client's two requests. The gradient is that
    of the parameters that the forward pass has seen, of which it takes a copy, and is applied to
    the newer ones, as in asynchronous descent. Nobody waits for anybody, and where clients come in
    turn it is plain training.
    """

    def __init__(
        self,
        half: nn.Module,
        codecs: Mapping[Role, Chain],
        agreed: Mapping[str, str],
        *,
        top_codecs: Mapping[Role, Chain],
        **settings: Any,
    ) -> None:
        super().__init__(half, codecs, agreed, **settings)
        self._top_codecs = dict(top_codecs)

    def handle(self, tensors: dict[str, Tensor], metadata: dict[str, str]) -> Answer:
        """Do one of the two passes of a batch: a handler for an exchange.

        Raises
        ------
        Refused
            With 422 if what came cannot be used, with 409 if it is not its turn or its round is
            over. Nothing has changed then, but that a batch whose gradient is of no use begins
            anew.
        """
        stage = metadata.get(STAGE)
        if stage not in (FORWARD, BACKWARD):
            raise Refused(f"{STAGE} is {stage!r}, expected {FORWARD!r} or {BACKWARD!r}")
        if LABELS in tensors:
            raise Refused(f"tensor {LABELS!r} is not expected: labels stay with the clients")
        call, round_, client = self._admit(metadata)
        key = CodecKey(self._seed, round_.number, call.batch, call.partition, "activation")
        if stage == FORWARD:
            return self._forward(call, round_, client, key, tensors, metadata)
        return self._backward(call, round_, client, key, tensors, metadata)

    # --- inside ------------------------------------------------------------------

    def _forward(
        self,
        call: BatchCall,
        round_: Round,
        client: ClientState,
        key: CodecKey,
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, str],
    ) -> Answer:
        activation = self._arrived(call, client, key, tensors, metadata)
        context = numbered(CONTEXT, tensors)
        with client.trunk.lock:
            if round_.closed or client.done != call.batch or client.pending is not None:
                raise Refused(
                    f"batch {call.batch} of round {round_.number} is not expected again", 409
                )
            facts = {}
            try:
                if call.batch == 0:
                    pending, flops = counted(
                        lambda: self._run(client.trunk, call, key, activation, context)
                    )
                    facts["server-flops"] = str(flops)
                else:
                    pending = self._run(client.trunk, call, key, activation, context)
                top_key = replace(key, place="top")
                encoded = self._top_codecs["activation"].encode(pending.output, top_key)
            except (ValueError, RuntimeError, IndexError, TypeError, AttributeError) as error:
                raise _useless(error) from None
            client.pending = pending
        sent, told = with_prefix(ACTIVATION, encoded)
        return sent, {**told, **facts}

    def _run(
        self,
        trunk: Trunk,
        call: BatchCall,
        key: CodecKey,
        activation: Tensor,
        context: list[Tensor],
    ) -> Pending:
        """Run the half forward, on copies of what must stay as it is until the gradient comes."""
        leaf = activation.detach().requires_grad_()
        parameters = {}
        if not self._copies:
            parameters = {
                name: p.detach().clone().requires_grad_(p.requires_grad)
                for name, p in trunk.half.named_parameters()
            }
        before = dict(trunk.half.named_buffers())
        after = {name: buffer.clone() for name, buffer in before.items()}
        with seeded(key) if self._random else nullcontext():
            whole = self._expanded(leaf, call.kept)
            whole = whole.clone() if self._in_place else whole
            output = functional_call(trunk.half, parameters | after, (whole, *context))
        changed = {n: t for n, t in after.items() if not torch.equal(t, before[n])}
        return Pending(
            leaf,
            output,
            balance_loss(trunk.half),
            parameters,
            {name: before[name].clone() for name in changed},
            changed,
        )

    def _backward(
        self,
        call: BatchCall,
        round_: Round,
        client: ClientState,
        key: CodecKey,
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, str],
    ) -> Answer:
        with client.trunk.lock:
            pending = client.pending
            if round_.closed or client.done != call.batch or pending is None:
                raise Refused(
                    f"the gradient of batch {call.batch} of round {round_.number} is not expected",
                    409,
                )
            gradient = self._top_gradient(pending.output, key, tensors, metadata)
            client.pending = None

            def step() -> Tensor:
                return self._gradient_of(client.trunk, pending, gradient)

            facts = {}
            try:
                if call.batch == 0:
                    below, flops = counted(step)
                    facts["server-flops"] = str(flops)
                else:
                    below = step()
                gradient_key = replace(key, role="gradient")
                encoded = self._codecs["gradient"].encode(below, gradient_key)
            except (ValueError, RuntimeError) as error:
                raise _useless(error) from None
            _keep_buffers(client.trunk.half, pending)
            clip_gradient(client.trunk.half, self._clip)
            assert client.trunk.optimiser is not None
            client.trunk.optimiser.step()
            client.sample_shape = tuple(pending.leaf.shape[1:])
            self._count(round_, client)
        sent, told = with_prefix(GRADIENT, encoded)
        return sent, {**told, **facts}

    def _top_gradient(
        self,
        output: Tensor,
        key: CodecKey,
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, str],
    ) -> Tensor:
        """Decode the gradient at the top cut and check it against the activation there."""
        try:
            encoded = without_prefix(GRADIENT, tensors, metadata)
            top_key = replace(key, role="gradient", place="top")
            gradient = self._top_codecs["gradient"].decode(encoded, top_key)
        except ValueError as error:
            raise Refused(f"gradient: {error}") from None
        if gradient.shape != output.shape or gradient.dtype != output.dtype:
            raise Refused(
                f"gradient is {gradient.dtype} {tuple(gradient.shape)}, expected {output.dtype} "
                f"{tuple(output.shape)}"
            )
        if not torch.isfinite(gradient).all():
            raise Refused("gradient has values that are not finite, expected none")
        # Aligned in memory, matrix products round as they do in training of the whole model.
        return gradient.clone()

    def _gradient_of(self, trunk: Trunk, pending: Pending, gradient: Tensor) -> Tensor:
        """Go back through the half; its parameters get their gradients, the caller the leaf's."""
        assert trunk.optimiser is not None
        trunk.optimiser.zero_grad(set_to_none=True)
        ends, gradients = [pending.output], [gradient]
        if pending.extra is not None:
            ends.append(pending.extra)
            gradients.append(torch.ones_like(pending.extra))
        torch.autograd.backward(ends, gradients)
        for name, parameter in trunk.half.named_parameters():
            if name in pending.parameters:
                parameter.grad = pending.parameters[name].grad
        if pending.leaf.grad is None:
            raise ValueError("the top activation does not depend on the activation at the cut")
        return pending.leaf.grad


def _keep_buffers(half: nn.Module, pending: Pending) -> None:
    """Let the half have the buffers of a forward pass; what came in between stays in the sum."""
    now = dict(half.named_buffers())
    for name, after in pending.after.items():
        if torch.equal(now[name], pending.before[name]):
            now[name].copy_(after)
        else:
            now[name].add_(after - pending.before[name])


def _useless(error: Exception) -> Refused:
    reason = str(error).strip().split("\n")[0]
    return Refused(f"the server's part cannot use the batch: {reason}")
