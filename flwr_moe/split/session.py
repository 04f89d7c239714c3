"""The server's side of split training: one request a batch, activations in, gradients out.

A `SplitSession` holds the server half between rounds and answers the calls of a tensor exchange.
It knows nothing of Flower: whoever runs it opens and closes the rounds.
"""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional

from flwr_moe.exchange.request import Refused
from flwr_moe.split.codecs import Chain, CodecKey, Encoded, Role
from flwr_moe.split.protocol import (
    ACTIVATION,
    CONTEXT,
    GRADIENT,
    LABELS,
    BatchCall,
    numbered,
    with_prefix,
    without_prefix,
)
from flwr_moe.split.prune import Kept, expand
from flwr_moe.split.prune_groups import PruneGroup
from flwr_moe.split.session_round import ClientState, Round, Trunk, weighted_mean
from flwr_moe.split.step import (
    adam,
    balance_loss,
    clip_gradient,
    counted,
    draws_numbers,
    quick_layout,
    seeded,
)

SERVERS = ("copies", "shared")

LossFn = Callable[[Tensor, Tensor], Tensor]


class SplitSession:
    """The server half of a split model, trained by the activations that clients send.

    Parameters
    ----------
    half : nn.Module
        The server half with its values; the session keeps it as its own.
    codecs : mapping of str to Chain
        How activations and gradients travel, see :func:`~flwr_moe.split.cut_codecs`.
    agreed : mapping of str to str
        What every request must say, see :func:`~flwr_moe.split.protocol.agreement`.
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
    Source: SplitFed V1 (copies) and V2 (shared); partial weights and refusals are ours. Copies
    give the same result whatever the order of requests.
    """

    def __init__(
        self,
        half: nn.Module,
        codecs: Mapping[Role, Chain],
        agreed: Mapping[str, str],
        *,
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
        self._codecs, self._agreed = dict(codecs), dict(agreed)
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
                    states.append(client.trunk.half.state_dict())
                    weights.append(client.examples * client.done / ended.batches)
        if states:
            self._half.load_state_dict(weighted_mean(states, weights))
        return {partition: client.done for partition, client in clients.items()}

    def handle(
        self, tensors: dict[str, Tensor], metadata: dict[str, str]
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Train on one batch and return the gradient at the cut: a handler for an exchange.

        Raises
        ------
        Refused
            With 422 if the batch cannot be used, with 409 if it is not its turn or its round is
            over. Nothing has changed then.
        """
        call, round_, client = self._admit(metadata)
        key = CodecKey(self._seed, round_.number, call.batch, call.partition, "activation")
        activation = self._arrived(call, client, key, tensors, metadata)
        if LABELS not in tensors:
            raise Refused(f"tensor {LABELS!r} is missing")
        labels = tensors[LABELS]
        if labels.is_floating_point() or not labels.ndim or len(labels) != len(activation):
            raise Refused(
                f"labels are {labels.dtype} {tuple(labels.shape)}, expected whole numbers for "
                f"{len(activation)} samples"
            )
        context = numbered(CONTEXT, tensors)
        with client.trunk.lock:
            if round_.closed or client.done != call.batch:
                raise Refused(f"batch {call.batch} of round {round_.number} is not expected", 409)

            def step() -> tuple[Encoded, float]:
                return self._step(client.trunk, call, key, activation, context, labels.long())

            facts = {}
            if call.batch == 0:
                (encoded, loss), flops = counted(step)
                facts["server-flops"] = str(flops)
            else:
                encoded, loss = step()
            client.sample_shape = call.shape[1:]
            self._count(round_, client)
        sent, told = with_prefix(GRADIENT, encoded)
        return sent, {**told, **facts, "loss": repr(loss)}

    # --- inside ------------------------------------------------------------------

    def _admit(self, metadata: Mapping[str, str]) -> tuple[BatchCall, Round, ClientState]:
        """Find the client's place in the round, and check that it means this model and its turn."""
        for name, expected in self._agreed.items():
            if metadata.get(name) != expected:
                raise Refused(f"{name} is {metadata.get(name)!r}, expected {expected!r}")
        call = BatchCall.of(metadata)
        with self._lock:
            round_ = self._round
            if round_ is None or round_.number != call.round:
                open_now = "none is open" if round_ is None else f"expected {round_.number}"
                raise Refused(f"round is {call.round}, {open_now}", 409)
            client = round_.enter(call, self._trunk)
        return call, round_, client

    def _count(self, round_: Round, client: ClientState) -> None:
        """Note that a batch is done, and let go of what a copy needs for training alone."""
        client.done += 1
        if self._copies and client.done == round_.batches:
            client.trunk.optimiser = None
            client.trunk.half.zero_grad(set_to_none=True)

    def _trunk(self, learning_rate: float) -> Trunk:
        if self._copies:
            half = copy.deepcopy(self._half)
            return Trunk(half, adam(half, learning_rate))
        if self._shared.optimiser is None:
            self._shared.optimiser = adam(self._half, learning_rate)
        for group in self._shared.optimiser.param_groups:
            group["lr"] = learning_rate
        return self._shared

    def _arrived(
        self,
        call: BatchCall,
        client: ClientState,
        key: CodecKey,
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, str],
    ) -> Tensor:
        """Decode the activation and check it against what was announced."""
        try:
            encoded = without_prefix(ACTIVATION, tensors, metadata)
            activation = self._codecs["activation"].decode(encoded, key)
        except ValueError as error:
            raise Refused(f"activation: {error}") from None
        if tuple(activation.shape) != call.shape:
            raise Refused(
                f"activation has shape {tuple(activation.shape)}, {call.shape} was announced"
            )
        if client.done and call.shape[1:] != client.sample_shape:
            raise Refused(
                f"samples have shape {call.shape[1:]}, expected {client.sample_shape} as before"
            )
        if not torch.isfinite(activation).all():
            raise Refused("activation has values that are not finite, expected none")
        return activation

    def _step(
        self,
        trunk: Trunk,
        call: BatchCall,
        key: CodecKey,
        activation: Tensor,
        context: list[Tensor],
        labels: Tensor,
    ) -> tuple[Encoded, float]:
        """One step of training; the encoded gradient and the loss."""
        assert trunk.optimiser is not None
        trunk.optimiser.zero_grad(set_to_none=True)
        leaf = activation.detach().requires_grad_()
        try:
            with seeded(key) if self._random else nullcontext():
                whole = self._expanded(leaf, call.kept)
                output = trunk.half(whole.clone() if self._in_place else whole, *context)
                loss = self._loss_fn(output, labels)
                extra = balance_loss(trunk.half)
                (loss if extra is None else loss + extra).backward()
            gradient = leaf.grad
            if gradient is None:
                raise ValueError("the loss does not depend on the activation")
            gradient_key = CodecKey(key.seed, key.round, key.batch, key.partition, "gradient")
            encoded = self._codecs["gradient"].encode(gradient, gradient_key)
        except (ValueError, RuntimeError, IndexError, TypeError) as error:
            reason = str(error).strip().split("\n")[0]
            raise Refused(f"the server half cannot use the batch: {reason}") from None
        value = float(loss.detach())
        if math.isnan(value):
            raise Refused("the loss is not a number")
        clip_gradient(trunk.half, self._clip)
        trunk.optimiser.step()
        return encoded, value

    def _expanded(self, leaf: Tensor, kept: tuple[int, ...] | None) -> Tensor:
        if kept is None:
            return leaf
        if self._output is None:
            raise ValueError("units at the cut are pruned, which is not expected")
        return expand(leaf, Kept.of([self._output], {self._output.name: kept}))
