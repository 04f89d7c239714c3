"""The server's side of split training: activations in, gradients out.

A `SplitSession` holds the server's part of a model between rounds and answers the calls of a tensor
exchange. Where labels travel, a batch is one request; where clients keep them and the end of the
model, it is two: the activation at the cut in and the one at the top cut out, then the gradient at
the top cut in and the one at the cut out. It knows nothing of Flower: whoever runs it opens and
closes the rounds.
"""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from flwr_moe.arrays import numpy_of, weighted_mean
from flwr_moe.exchange.body import Refused
from flwr_moe.split.codecs import Chain, CodecKey, Encoded, Place, Role
from flwr_moe.split.protocol import (
    ACTIVATION,
    BACKWARD,
    CONTEXT,
    FORWARD,
    GRADIENT,
    LABELS,
    Answer,
    BatchCall,
    numbered,
)
from flwr_moe.split.prune import Kept, expand
from flwr_moe.split.prune_groups import PruneGroup
from flwr_moe.split.step import (
    LossFn,
    adam,
    balance_loss,
    clip_gradient,
    counted,
    draws_numbers,
    quick_layout,
    seeded,
)

SERVERS = ("copies", "shared")


@dataclass
class Trunk:
    """A server half at work: one for each client, or one for all."""

    half: nn.Module
    optimiser: torch.optim.Optimizer | None
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass
class Pending:
    """A forward pass on its way to a gradient.

    Attributes
    ----------
    leaf, output : Tensor
        What arrived, and what the gradient is taken of.
    loss : Tensor or None
        Without loss terms of the server's own, if labels came.
    extra : Tensor or None
        Loss of the server's own that is not in the output.
    parameters, before, after : dict of str to Tensor
        Copies that the pass used instead of the half's parameters, if it did; buffers before and
        after it, if it was not to change them yet.
    """

    leaf: Tensor
    output: Tensor
    loss: Tensor | None = None
    extra: Tensor | None = None
    parameters: dict[str, Tensor] = field(default_factory=dict)
    before: dict[str, Tensor] = field(default_factory=dict)
    after: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class ClientState:
    """What one client has done in the open round."""

    trunk: Trunk
    examples: int
    done: int = 0
    sample_shape: tuple[int, ...] = ()
    pending: Pending | None = None


@dataclass
class Round:
    """What has been done in one round, and who may do what next."""

    number: int
    batches: int
    expected: frozenset[int]
    learning_rate: float
    clients: dict[int, ClientState] = field(default_factory=dict)
    closed: bool = False


class SplitSession:
    """The server's part of a split model, trained by the activations that clients send.

    Parameters
    ----------
    half : nn.Module
        The server half, or the middle of three parts, with its values; kept as the session's own.
    codecs : mapping of str to Chain
        How activations and gradients travel, see :func:`~flwr_moe.split.cut_codecs`.
    agreed : mapping of str to str
        What every request must say, see :func:`~flwr_moe.split.protocol.agreement`.
    top_codecs : mapping of str to Chain, optional
        How they travel at the top cut, if clients keep their labels and the end of the model.
    server : {"copies", "shared"}
        ``"copies"``: every client trains a copy of its own, and the copies are averaged at the end
        of the round, weighted by examples and by the share of the batches done. ``"shared"``: all
        train the same half, batch by batch in the order the requests come.
    seed : int
        Of the run; seeds codecs and random layers.
    clip : float
        Largest norm of the half's gradient, 0 for any.
    loss_fn : callable
        Loss of output and labels, by default cross entropy; labels come as int64.
    output : PruneGroup, optional
        Units that clients may have pruned at the cut.

    Raises
    ------
    ValueError
        If a setting is out of range.

    Notes
    -----
    Source: SplitFed V1 (copies) and V2 (shared); the U-shape is known from split learning; partial
    weights, refusals and what happens between two requests are ours. Copies give the same result
    whatever the order of requests.

    A client has at most one batch under way. Until its gradient comes, its forward pass has changed
    nothing: the parameters have not been trained, and the buffers it would change are held with it.
    If the gradient never comes, they go when the round ends. With one shared half, others may train
    it between a client's two requests. The gradient is that of the parameters that the forward pass
    has seen, of which it takes a copy, and is applied to the newer ones, as in asynchronous
    descent. Nobody waits for anybody, and where clients come in turn it is plain training.
    """

    def __init__(
        self,
        half: nn.Module,
        codecs: Mapping[Role, Chain],
        agreed: Mapping[str, str],
        *,
        top_codecs: Mapping[Role, Chain] | None = None,
        server: str = "copies",
        seed: int = 0,
        clip: float = 0.0,
        loss_fn: LossFn = functional.cross_entropy,
        output: PruneGroup | None = None,
    ) -> None:
        if server not in SERVERS:
            raise ValueError(f"server is {server!r}, expected one of {', '.join(SERVERS)}")
        if not clip >= 0:
            raise ValueError(f"clip is {clip}, expected 0 (off) or more")
        self._codecs: dict[Place, Mapping[Role, Chain]] = {"cut": codecs}
        if top_codecs is not None:
            self._codecs["top"] = top_codecs
        self._agreed = dict(agreed)
        self._copies, self._seed, self._clip = server == "copies", seed, clip
        self._loss_fn, self._output = loss_fn, output
        self._half = quick_layout(half).train()
        self._shared = Trunk(self._half, None)
        self._in_place = any(getattr(m, "inplace", False) for m in half.modules())
        self._random = any(draws_numbers(module) for module in half.modules())
        self._lock = threading.Lock()
        self._round: Round | None = None

    def state_dict(self) -> dict[str, Tensor]:
        """Return a copy of the server half's state, as of the last round that was closed."""
        return {key: tensor.detach().clone() for key, tensor in self._half.state_dict().items()}

    def begin_round(
        self, number: int, batches: int, clients: Iterable[int], learning_rate: float
    ) -> None:
        """Take batches of a new round.

        Parameters
        ----------
        number : int
            Of the round; batches of any other are refused.
        batches : int
            How many each client has.
        clients : iterable of int
            Partition ids that take part.
        learning_rate : float
            Of Adam, which starts anew for each copy; with one shared half it goes on.
        """
        with self._lock:
            self._round = Round(number, batches, frozenset(clients), learning_rate)

    def end_round(self) -> dict[int, int]:
        """Take no more batches, and average the copies; what came of them so far counts.

        Returns
        -------
        dict of int to int
            Batches done by each client that was heard of.
        """
        with self._lock:
            ended, self._round = self._round, None
        if ended is None:
            return {}
        ended.closed = True
        clients = dict(sorted(ended.clients.items()))
        states, weights = [], []
        for client in clients.values():
            with client.trunk.lock:  # a step that has begun is waited for
                if client.done and self._copies:
                    states.append(numpy_of(client.trunk.half.state_dict()))
                    weights.append(client.examples * client.done / ended.batches)
        if states:
            mean = weighted_mean(states, weights, like=numpy_of(self._half.state_dict()))
            self._half.load_state_dict({key: torch.from_numpy(a) for key, a in mean.items()})
        return {partition: client.done for partition, client in clients.items()}

    def handle(self, tensors: dict[str, Tensor], metadata: dict[str, str]) -> Answer:
        """Train on a batch, or do one of its two passes: a handler for an exchange.

        Raises
        ------
        Refused
            With 422 if what came cannot be used, with 409 if it is not its turn or its round is
            over. Nothing has changed then, but that a batch whose gradient is of no use begins
            anew.
        """
        in_two = "top" in self._codecs
        if in_two and LABELS in tensors:
            raise Refused(f"tensor {LABELS!r} is not expected: labels stay with the clients")
        for name, expected in self._agreed.items():
            if metadata.get(name) != expected:
                raise Refused(f"{name} is {metadata.get(name)!r}, expected {expected!r}")
        call = BatchCall.of(metadata, in_two)
        round_, client = self._enter(call)
        key = CodecKey(self._seed, round_.number, call.batch, call.partition, "activation")
        if call.stage != BACKWARD:
            activation = self._decoded(key, tensors, metadata)
            self._check(call, client, activation)
            labels = None if in_two else _labels(tensors, len(activation))
            context = numbered(CONTEXT, tensors)
        with client.trunk.lock:
            pending = client.pending
            if (
                round_.closed
                or client.done != call.batch
                or (not pending) == (call.stage == BACKWARD)
            ):
                what = "the gradient of batch" if call.stage == BACKWARD else "batch"
                again = " again" if pending else ""
                raise Refused(
                    f"{what} {call.batch} of round {round_.number} is not expected{again}", 409
                )
            gradient = None
            if pending is not None:
                top_key = replace(key, role="gradient", place="top")
                gradient = self._decoded(top_key, tensors, metadata)
                _check_fit(gradient, pending.output)
                client.pending = None

            def work() -> tuple[Pending, Encoded]:
                passed = pending or self._forward(
                    client.trunk, call, key, activation, context, labels
                )
                if call.stage == FORWARD:
                    return passed, self._encoded(passed.output, replace(key, place="top"))
                below = self._backward(client.trunk, passed, gradient)
                return passed, self._encoded(below, replace(key, role="gradient"))

            try:
                (passed, answer), flops = counted(work, call.batch == 0)
            except (ValueError, RuntimeError, IndexError, TypeError, AttributeError) as error:
                reason = str(error).strip().split("\n")[0]
                raise Refused(f"the server half cannot use the batch: {reason}") from None
            facts = {"server-flops": str(flops)} if call.batch == 0 else {}
            if passed.loss is not None:
                facts["loss"] = repr(loss := float(passed.loss.detach()))
                if math.isnan(loss):
                    raise Refused("the loss is not a number")
            if call.stage == FORWARD:
                client.pending = passed
            else:
                self._learn(round_, client, passed)
        sent = answer.under(ACTIVATION if call.stage == FORWARD else GRADIENT)
        return sent.tensors, {**sent.metadata, **facts}

    # --- inside ------------------------------------------------------------------

    def _enter(self, call: BatchCall) -> tuple[Round, ClientState]:
        """Find the client's place in the round, and check that it is its turn."""
        with self._lock:
            round_ = self._round
            if round_ is None or round_.number != call.round:
                open_now = "none is open" if round_ is None else f"expected {round_.number}"
                raise Refused(f"round is {call.round}, {open_now}", 409)
            if call.partition not in round_.expected:
                raise Refused(f"partition is {call.partition}, which has no part in this round")
            client = round_.clients.get(call.partition)
            done = client.done if client else 0
            if call.batch != done or done >= round_.batches:
                raise Refused(
                    f"batch is {call.batch}, expected {done} of {round_.batches} in this round", 409
                )
            if client is None:
                client = ClientState(self._trunk(round_.learning_rate), call.examples)
                round_.clients[call.partition] = client
            if client.examples != call.examples:
                raise Refused(f"examples are {call.examples}, expected {client.examples} as before")
            return round_, client

    def _trunk(self, learning_rate: float) -> Trunk:
        if self._copies:
            half = copy.deepcopy(self._half)
            return Trunk(half, adam(half, learning_rate))
        if self._shared.optimiser is None:
            self._shared.optimiser = adam(self._half, learning_rate)
        for group in self._shared.optimiser.param_groups:
            group["lr"] = learning_rate
        return self._shared

    def _check(self, call: BatchCall, client: ClientState, activation: Tensor) -> None:
        """Check an activation against what was announced, and what came before."""
        if tuple(activation.shape) != call.shape:
            raise Refused(
                f"activation has shape {tuple(activation.shape)}, {call.shape} was announced"
            )
        if client.done and call.shape[1:] != client.sample_shape:
            raise Refused(
                f"samples have shape {call.shape[1:]}, expected {client.sample_shape} as before"
            )

    def _encoded(self, tensor: Tensor, key: CodecKey) -> Encoded:
        return self._codecs[key.place][key.role].encode(tensor, key)

    def _decoded(
        self, key: CodecKey, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
    ) -> Tensor:
        """Decode the activation or gradient that came, which has to be finite."""
        encoded = Encoded(dict(tensors), dict(metadata)).within(f"{key.role}.")
        try:
            tensor = self._codecs[key.place][key.role].decode(encoded, key)
        except ValueError as error:
            raise Refused(f"{key.role}: {error}") from None
        if not torch.isfinite(tensor).all():
            raise Refused(f"{key.role} has values that are not finite, expected none")
        # Aligned in memory, matrix products round as they do in training of the whole model.
        return tensor.clone() if key.place == "top" else tensor

    def _forward(
        self,
        trunk: Trunk,
        call: BatchCall,
        key: CodecKey,
        activation: Tensor,
        context: list[Tensor],
        labels: Tensor | None,
    ) -> Pending:
        """Run the half; without labels, on copies of what must stay until the gradient comes."""
        half, leaf = trunk.half, activation.detach().requires_grad_()
        with seeded(key) if self._random else nullcontext():
            whole = self._expanded(leaf, call.kept)
            given = (whole.clone() if self._in_place else whole, *context)
            if labels is not None:
                loss = self._loss_fn(half(*given), labels)
                extra = balance_loss(half)
                return Pending(leaf, loss if extra is None else loss + extra, loss)
            parameters = {}
            if not self._copies:
                parameters = {
                    name: p.detach().clone().requires_grad_(p.requires_grad)
                    for name, p in half.named_parameters()
                }
            before = dict(half.named_buffers())
            after = {name: buffer.clone() for name, buffer in before.items()}
            output = functional_call(half, parameters | after, given)
        changed = {n: t for n, t in after.items() if not torch.equal(t, before[n])}
        unchanged = {name: before[name].clone() for name in changed}
        return Pending(leaf, output, None, balance_loss(half), parameters, unchanged, changed)

    def _expanded(self, leaf: Tensor, kept: tuple[int, ...] | None) -> Tensor:
        if kept is None:
            return leaf
        if self._output is None:
            raise ValueError("units at the cut are pruned, which is not expected")
        return expand(leaf, Kept.of([self._output], {self._output.name: kept}))

    def _backward(self, trunk: Trunk, passed: Pending, gradient: Tensor | None) -> Tensor:
        """Go back through the half; its parameters get their gradients, the caller the leaf's."""
        assert trunk.optimiser is not None
        trunk.optimiser.zero_grad(set_to_none=True)
        ends, gradients = [passed.output], [gradient]
        if passed.extra is not None:
            ends, gradients = [*ends, passed.extra], [*gradients, None]
        torch.autograd.backward(ends, gradients)
        for name, parameter in trunk.half.named_parameters():
            if name in passed.parameters:
                parameter.grad = passed.parameters[name].grad
        if passed.leaf.grad is None:
            raise ValueError("what it gives does not depend on the activation")
        return passed.leaf.grad

    def _learn(self, round_: Round, client: ClientState, passed: Pending) -> None:
        """Step by the gradient, and count the batch."""
        half, optimiser = client.trunk.half, client.trunk.optimiser
        assert optimiser is not None
        buffers = dict(half.named_buffers()) if passed.after else {}
        for name, after in passed.after.items():
            if torch.equal(buffers[name], passed.before[name]):
                buffers[name].copy_(after)
            else:  # others have changed it since: what both have added stays in the sum
                buffers[name].add_(after - passed.before[name])
        clip_gradient(half, self._clip)
        optimiser.step()
        client.sample_shape = tuple(passed.leaf.shape[1:])
        client.done += 1
        if self._copies and client.done == round_.batches:
            client.trunk.optimiser = None
            half.zero_grad(set_to_none=True)


def _check_fit(gradient: Tensor, output: Tensor) -> None:
    if gradient.shape != output.shape or gradient.dtype != output.dtype:
        raise Refused(
            f"gradient is {gradient.dtype} {tuple(gradient.shape)}, expected {output.dtype} "
            f"{tuple(output.shape)}"
        )


def _labels(tensors: Mapping[str, Tensor], count: int) -> Tensor:
    """Read one or more whole-number labels for each of `count` samples."""
    if LABELS not in tensors:
        raise Refused(f"tensor {LABELS!r} is missing")
    labels = tensors[LABELS]
    if labels.is_floating_point() or not labels.ndim or len(labels) != count:
        raise Refused(
            f"labels are {labels.dtype} {tuple(labels.shape)}, expected whole numbers for "
            f"{count} samples"
        )
    return labels.long()
