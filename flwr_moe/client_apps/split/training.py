"""The client's side of split learning: the first half of a model, trained with a far second half.

A message brings the order and, when it has changed, the client half. Then one request per batch
goes over the tensor exchange: activations up, their gradient down.
"""

from __future__ import annotations

from logging import WARNING

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from torch import Tensor, nn
from torch.nn import functional

from flwr_moe.client_apps.node import partition_of
from flwr_moe.client_apps.split.link import CutLink, small_labels
from flwr_moe.client_apps.split.visit import Visit
from flwr_moe.client_apps.training import TaskFn
from flwr_moe.exchange import Unreachable
from flwr_moe.messages.split import SplitFigures, SplitReply
from flwr_moe.network.flower_adapter import log
from flwr_moe.split.step import (
    LossFn,
    adam,
    balance_loss,
    clip_gradient,
    counted,
    cross_entropy_over_labels,
    send_back,
)
from flwr_moe.training import Samples
from flwr_moe.training.loop import Transform
from flwr_moe.training.threads import one_thread_if_simulated


def train_half(
    message: Message,
    context: Context,
    model: nn.Module,
    data: Samples,
    *,
    transform: Transform | None = None,
    loss_fn: LossFn = functional.cross_entropy,
) -> Message:
    """Train the client half of a model as a message of `SplitFed` or `FedSL` asks for.

    Parameters
    ----------
    message : Message
        Of type ``train.split``.
    context : Context
        Of the node; keeps its half between averages, and which units it keeps of it.
    model : nn.Module
        The whole model, best on the meta device: only its client half gets values.
    data : Samples
        The client's; batches are drawn with replacement, as in training of the whole model.
    transform : callable, optional
        Changes the inputs of a batch, with a generator.
    loss_fn : callable
        Loss of output and labels, where the order says that labels stay here.

    Returns
    -------
    Message
        The reply: figures, and the half if it is to be averaged.

    Raises
    ------
    ValueError
        If the order cannot be read, the half is not there, or an activation is not finite.
    ExchangeError
        If the server half refuses a batch, or did not answer the first one.

    Notes
    -----
    Source: SplitFed and Lightweight FedSL; the order of things is ours. If the server half stops
    answering later, the reply tells the steps done so far. It tells the loss only where the labels
    travel.

    Virtual time: a node's steps a second are those of the whole model. A step here takes the share
    of that time that its work, forward and backward, has in the whole model's; to this comes the
    server half's share, divided by the order's ``server-speedup``.
    """
    visit = Visit(message, context, model)
    order, link = visit.order, visit.link(max(len(data), 1))
    losses: list[float] = []
    flops = head_flops = 0
    if len(data):
        losses, flops, head_flops = _train(visit, link, data, transform, loss_fn)
    done = link.done
    whole = visit.dense_flops(data, flops) + head_flops + link.server_flops
    seconds_per_flop = order.seconds_per_step / max(whole, 1)
    device_s = done * seconds_per_flop * (flops + head_flops)
    server_s = done * seconds_per_flop * link.server_flops / order.server_speedup
    moved, ushape = link.moved, visit.parts.head is not None
    figures = SplitFigures(
        num_examples=len(data),
        steps=done,
        kept_share=visit.kept.share if visit.kept else 1.0,
        compute_seconds=device_s + server_s,
        device_seconds=device_s,
        activation_bytes=moved["activation", "cut"] + moved["gradient", "top"],
        gradient_bytes=moved["gradient", "cut"] + moved["activation", "top"],
        exchanges=link.exchanges,
        gradient_bytes_up=moved["gradient", "top"] if ushape else None,
        activation_bytes_down=moved["activation", "top"] if ushape else None,
        train_loss=None if ushape else sum(losses) / max(done, 1),
    )
    reply = SplitReply(figures, visit.leave())
    return Message(reply.to_record(), reply_to=message)


def register_split_training(app: ClientApp, task_of: TaskFn) -> ClientApp:
    """Make ``app`` train client halves of a task's model, for SplitFed and FedSL.

    Parameters
    ----------
    app : ClientApp
        The app to extend.
    task_of : callable
        Gives the task for a node's context.

    Returns
    -------
    ClientApp
        The same app.
    """

    @app.train("split")
    def train(message: Message, context: Context) -> Message:
        one_thread_if_simulated()
        task = task_of(context)
        with torch.device("meta"):
            model = task.build_model()
        data = task.train_data(partition_of(context))
        return train_half(
            message,
            context,
            model,
            data,
            transform=getattr(task, "augment", None),
            loss_fn=cross_entropy_over_labels,
        )

    return app


def _train(
    visit: Visit, link: CutLink, data: Samples, transform: Transform | None, loss_fn: LossFn
) -> tuple[list[float], int, int]:
    """Do the order's steps, as many as the server's part lives to see.

    A batch that it does not finish changes no parameter.

    Returns
    -------
    list of float, int, int
        Their losses, and the work of one step of the half and of the head.

    Raises
    ------
    ExchangeError
        If the server's part refuses a batch, or does not answer the first one.
    ValueError
        If a value that is to travel is not finite.
    """
    training, head = visit.training, visit.parts.head
    ends = [visit.half.train()] if head is None else [visit.half.train(), head.train()]
    optimisers = [adam(end, training.learning_rate) for end in ends]
    in_place = head is not None and any(getattr(m, "inplace", False) for m in head.modules())
    labels = small_labels(data.y) if head is None else data.y.long()
    losses, flops, head_flops = [], 0, 0

    def judge(head: nn.Module, top: Tensor, context: list[Tensor], y: Tensor) -> float:
        loss = loss_fn(head(top.clone() if in_place else top, *context), y)
        extra = balance_loss(head)
        (loss if extra is None else loss + extra).backward()
        if top.grad is None:
            raise ValueError("the loss does not depend on the activation at the top cut")
        return float(loss.detach())

    def step(x: Tensor, y: Tensor) -> float:
        nonlocal head_flops
        for optimiser in optimisers:
            optimiser.zero_grad(set_to_none=True)
        activation, *context = visit.half(x)
        if head is None:
            gradient, loss = link.send(activation.detach(), context, y)
        else:
            up = context[: visit.parts.num_up]
            top = link.forward(activation.detach(), up).requires_grad_()
            loss, work = counted(lambda: judge(head, top, context, y), link.done == 0)
            head_flops += work
            assert top.grad is not None
            gradient = link.backward(top.grad, activation)
        send_back(activation, gradient, visit.half)
        for end, optimiser in zip(ends, optimisers, strict=True):
            clip_gradient(end, visit.order.clip)
            optimiser.step()
        return loss

    generator = training.generator
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        for number in range(training.steps):
            batch = torch.randint(len(data), (training.batch_size,), generator=generator)
            x = data.x[batch] if transform is None else transform(data.x[batch], generator)
            try:
                loss, work = counted(lambda x=x, y=labels[batch]: step(x, y), number == 0)  # type: ignore[misc]
            except Unreachable as error:
                if number == 0:
                    raise
                log(WARNING, "node %d: server half lost: %s", visit.partition, error)
                break
            losses.append(loss)
            flops += work
    return losses, flops - head_flops, head_flops
