"""What each possible cut costs: parameters, work and traffic on both sides."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from flwr_moe.split.cut import survey
from flwr_moe.split.meta import ExampleInputs


@dataclass(frozen=True)
class CutCost:
    """Costs of one cut.

    Attributes
    ----------
    at : str
        The module after which the model is cut.
    client_parameters, server_parameters : int
        Parameters of each half; a weight that has several names counts once.
    client_bytes, server_bytes : int
        Bytes of each half's state dict: parameters and buffers.
    client_flops, server_flops : int
        Floating-point operations of the forward pass per sample: two per multiplication and
        addition of matrix products, convolutions and attention; nothing else is counted.
    activation_shape : tuple of int
        Shape of what crosses the cut for one sample.
    activation_bytes : int
        Bytes of that; the gradient coming back has as many. What crosses besides (an attention
        mask, for example) is not counted.
    """

    at: str
    client_parameters: int
    server_parameters: int
    client_bytes: int
    server_bytes: int
    client_flops: int
    server_flops: int
    activation_shape: tuple[int, ...]
    activation_bytes: int


def cut_table(model: nn.Module, example_inputs: ExampleInputs) -> list[CutCost]:
    """Return the costs of every possible cut, in order of execution.

    One forward pass counts for all cuts, on the meta device unless the model looks at values.

    Parameters
    ----------
    model, example_inputs
        As in `possible_cuts`; the first dimension of what crosses is the number of samples.

    Raises
    ------
    ValueError
        As in `possible_cuts`.
    """
    cutter, activations, total = survey(model, example_inputs)
    rows = []
    for name, (activation, flops) in activations.items():
        size = len(activation)
        client_keys = cutter.keys(name)[0]
        client = _unique(model, client_keys)
        server = _unique(model, model.state_dict().keys() - client_keys)
        rows.append(
            CutCost(
                at=name,
                client_parameters=_parameters(client),
                server_parameters=_parameters(server),
                client_bytes=_bytes(client),
                server_bytes=_bytes(server),
                client_flops=flops // size,
                server_flops=(total - flops) // size,
                activation_shape=tuple(activation.shape[1:]),
                activation_bytes=_bytes([activation]) // size,
            )
        )
    return rows


def _unique(model: nn.Module, keys: Iterable[str]) -> list[Tensor]:
    tensors = [operator.attrgetter(key)(model) for key in keys]
    return list({id(tensor): tensor for tensor in tensors}.values())


def _parameters(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors if isinstance(tensor, nn.Parameter))


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
