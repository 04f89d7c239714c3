"""Training of both ends of a model on one device, with labels that stay there."""

from __future__ import annotations

from torch import Tensor

from flwr_moe.client_apps.split.ushape_link import UShapeLink
from flwr_moe.client_apps.split.visit import Visit, read_float, run_batches
from flwr_moe.split.session import LossFn
from flwr_moe.split.step import adam, balance_loss, clip_gradient, counted, send_back
from flwr_moe.training import Samples
from flwr_moe.training.loop import Transform


def train_both_ends(
    visit: Visit,
    link: UShapeLink,
    data: Samples,
    transform: Transform | None,
    loss_fn: LossFn,
) -> tuple[int, int]:
    """Train bottom and head for the order's steps.

    Parameters
    ----------
    visit : Visit
        With a head.
    link : UShapeLink
        Way to the middle.
    data, transform, loss_fn
        See :func:`~flwr_moe.client_apps.split.training.train_half`.

    Returns
    -------
    int, int
        Work of one step of the bottom, and of the head.

    Raises
    ------
    ExchangeError
        If the server's part refuses a batch, or does not answer the first one.
    ValueError
        If a value that is to travel is not finite.

    Notes
    -----
    Source: the U-shape is known from split learning. A batch that the server's part does not finish
    changes no parameter.
    """
    assert visit.ushape is not None
    bottom, head, num_up = visit.half.train(), visit.ushape.head.train(), visit.ushape.num_up
    rate, clip = visit.order.learning_rate, read_float(visit.config, "clip")
    ends = (bottom, head)
    optimisers = [adam(end, rate) for end in ends]
    in_place = any(getattr(module, "inplace", False) for module in head.modules())
    head_flops = 0

    def step(x: Tensor, y: Tensor) -> float:
        nonlocal head_flops
        for optimiser in optimisers:
            optimiser.zero_grad(set_to_none=True)
        activation, *context = bottom(x)
        top = link.forward(activation.detach(), context[:num_up]).requires_grad_()

        def judge() -> float:
            loss = loss_fn(head(top.clone() if in_place else top, *context), y)
            extra = balance_loss(head)
            (loss if extra is None else loss + extra).backward()
            return float(loss.detach())

        if link.done == 0:
            loss, head_flops = counted(judge)
        else:
            loss = judge()
        if top.grad is None:
            raise ValueError("the loss does not depend on the activation at the top cut")
        send_back(activation, link.backward(top.grad, activation), bottom)
        for end, optimiser in zip(ends, optimisers, strict=True):
            clip_gradient(end, clip)
            optimiser.step()
        return loss

    flops = run_batches(visit, data, data.y.long(), transform, step)[1]
    return flops - head_flops, head_flops
