"""The client's side of split learning: the first half of a model, trained with a far second half.

A message brings the order and, when it has changed, the client half. Then one request per batch
goes over the tensor exchange: activations up, their gradient down.
"""

from __future__ import annotations

import torch
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn
from torch.nn import functional

from flwr_moe.client_apps.node import partition_of
from flwr_moe.client_apps.split.link import CutLink, small_labels
from flwr_moe.client_apps.split.ushape import train_both_ends
from flwr_moe.client_apps.split.ushape_link import UShapeLink
from flwr_moe.client_apps.split.visit import Visit, read_float, run_batches
from flwr_moe.client_apps.training import TaskFn
from flwr_moe.split.session import LossFn
from flwr_moe.split.step import adam, clip_gradient, cross_entropy_over_labels, send_back
from flwr_moe.training import Samples
from flwr_moe.training.loop import Transform

SPLIT_TRAIN = "train.split"


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
    link = visit.link(max(len(data), 1))
    losses: list[float] = []
    flops = head_flops = 0
    if len(data) and isinstance(link, UShapeLink):
        flops, head_flops = train_both_ends(visit, link, data, transform, loss_fn)
    elif len(data):
        losses, flops = _train(visit, link, data, transform)
    done = link.done
    whole = visit.dense_flops(data, flops) + head_flops + link.server_flops
    seconds_per_flop = read_float(visit.config, "seconds-per-step") / max(whole, 1)
    device_s = done * seconds_per_flop * (flops + head_flops)
    server_s = done * seconds_per_flop * link.server_flops
    server_s /= read_float(visit.config, "server-speedup")
    metrics: dict[str, int | float | list[int] | list[float]] = {
        "num-examples": len(data),
        "steps": done,
        "kept-share": visit.kept.share if visit.kept else 1.0,
        "compute-seconds": device_s + server_s,
        "device-seconds": device_s,
        **link.traffic(),
    }
    if visit.ushape is None:  # where labels stay here, so does what is computed from them
        metrics["train-loss"] = sum(losses) / max(done, 1)
    content = RecordDict({"metrics": MetricRecord(metrics), **visit.leave()})
    return Message(content, reply_to=message)


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
        torch.set_num_threads(1)
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
    visit: Visit, link: CutLink, data: Samples, transform: Transform | None
) -> tuple[list[float], int]:
    """Train the half for the order's steps; the losses, and the work of one step."""
    half = visit.half.train()
    optimiser = adam(half, visit.order.learning_rate)
    clip = read_float(visit.config, "clip")

    def step(x: Tensor, y: Tensor) -> float:
        optimiser.zero_grad(set_to_none=True)
        activation, *context = half(x)
        gradient, loss = link.send(activation.detach(), context, y)
        send_back(activation, gradient, half)
        clip_gradient(half, clip)
        optimiser.step()
        return loss

    return run_batches(visit, data, small_labels(data.y), transform, step)
