"""Cutting a model in two or three parts that share its tensors."""

from __future__ import annotations

import difflib
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from flwr_moe.split.cut_graph import GraphCutter
from flwr_moe.split.cut_transformers import PartOfModel, TransformersCutter, is_transformers_model
from flwr_moe.split.meta import ExampleInputs, Passed, run_recorded

_NAMES_SHOWN = 12
_WHOLE_MODEL = ""


class Cutter(Protocol):
    """Where one kind of model can be cut, and its halves."""

    def candidates(self) -> list[str]: ...  # noqa: D102
    def obstacle(self, at: str) -> str | None: ...  # noqa: D102
    def keys(self, at: str) -> tuple[set[str], set[str]]: ...  # noqa: D102
    def halves(self, at: str) -> tuple[nn.Module, nn.Module]: ...  # noqa: D102
    def thirds(  # noqa: D102
        self, at: str, top: str
    ) -> tuple[nn.Module, nn.Module, nn.Module, int | None]: ...

    @property
    def points(self) -> Mapping[str, object]: ...  # noqa: D102


@dataclass(frozen=True)
class Split:
    """The parts of a model: two halves, or three parts in a U-shape.

    Attributes
    ----------
    client : nn.Module
        Takes the model's inputs and returns a tuple of tensors: the activation at the cut, then
        what else the other parts need without a gradient, such as an attention mask.
    server : nn.Module
        Takes the tensors of that tuple and returns what the model returns; for transformers the
        logits, or the last hidden state of a model without a head. In a U-shape it takes the
        activation and the first `num_up` of the others, and returns the activation at the top cut.
    at : str
        The module after which the model is cut.
    head : nn.Module or None
        In a U-shape the end of the model, which is the client's too: takes the activation at the
        top cut and all the other tensors of the tuple, and returns what the model returns.
    top_cut : str
        The module after which the head begins.
    num_up : int or None
        How many tensors besides the activation the server's part takes; None for all.

    Notes
    -----
    Source: the U-shape is known from split learning without sharing of labels. Parameters and
    buffers are the model's own, under the model's own names: training the parts trains the model,
    and their state dicts together are the model's, with no key in two of them. ``half.train()`` and
    ``half.eval()`` set the mode of the layers as usual.

    Tensors that the forward pass does not use belong to the server.

    In float64 loss and gradients are bitwise those of the whole model. Dropout draws from the
    global random generator of the process that runs it; the parts draw what the whole model
    draws only if they run in one process, in turn, and nothing else draws in between.
    """

    client: nn.Module
    server: nn.Module
    at: str
    head: nn.Module | None = None
    top_cut: str = ""
    num_up: int | None = None

    def client_state_dict(self) -> dict[str, Tensor]:
        """Return all tensors that are the client's."""
        head = {} if self.head is None else self.head.state_dict()
        return {**self.client.state_dict(), **head}


def possible_cuts(model: nn.Module, example_inputs: ExampleInputs) -> list[str]:
    """Return the modules after which the model can be cut, in order of execution.

    A cut is possible where one floating-point tensor crosses, both halves have parameters and no
    weight is shared by them. Of several names for one place (``features``, ``features.3`` and
    ``features.3.relu``) the one of a member of a sequence is given; `split_model` takes them all.

    Parameters
    ----------
    model : nn.Module
        Any module that torch.fx can trace, or a supported model of transformers; it may be on the
        meta device, and is not changed.
    example_inputs : Tensor, sequence or mapping
        The only, the positional or the keyword arguments of one forward pass.

    Raises
    ------
    ValueError
        If the model cannot be traced, or the inputs do not go through it.
    """
    return list(survey(model, example_inputs).activations)


def split_model(model: nn.Module, at: str, example_inputs: ExampleInputs | None = None) -> Split:
    """Cut a model after one of its modules.

    Parameters
    ----------
    model : nn.Module
        As in `possible_cuts`.
    at : str
        Dotted name of the module.
    example_inputs : Tensor, sequence or mapping, optional
        As in `possible_cuts`; needed if the forward pass has optional arguments that are in use.

    Raises
    ------
    ValueError
        If there is no such cut or it would split a shared weight, or if the model cannot be
        traced.
    """
    cutter = make_cutter(model, example_inputs)
    if at not in cutter.points:
        raise ValueError(f"no cut after {at!r}; {_nearest(model, cutter, at)}")
    reason = obstacle_to(model, cutter, at)
    if reason is None and example_inputs is not None:
        output = run_recorded(model, [at], example_inputs)[at].output
        reason = None if _is_activation(output) else "it does not return one floating-point tensor"
    if reason is not None:
        raise ValueError(f"no cut after {at!r}: {reason}")
    client, server = cutter.halves(at)
    return Split(client, server, at)


class Survey(NamedTuple):
    """What one forward pass tells about all possible cuts.

    Attributes
    ----------
    cutter : Cutter
        Which tensors each half of a cut holds.
    activations : dict of str to Passed
        What crosses at each possible cut, in order of execution.
    total_flops : int
        Of the whole forward pass.
    """

    cutter: Cutter
    activations: dict[str, Passed]
    total_flops: int


def survey(model: nn.Module, example_inputs: ExampleInputs) -> Survey:
    """Find all possible cuts; see `possible_cuts`."""
    cutter = make_cutter(model, example_inputs)
    names = [name for name in cutter.candidates() if obstacle_to(model, cutter, name) is None]
    passed = run_recorded(model, [*names, _WHOLE_MODEL], example_inputs)
    activations = {name: passed[name] for name in names if _is_activation(passed[name].output)}
    return Survey(cutter, activations, passed[_WHOLE_MODEL].flops)


def make_cutter(model: nn.Module, example_inputs: ExampleInputs | None) -> Cutter:
    """Choose what knows how a model is cut; ValueError if nothing does."""
    if is_transformers_model(model):
        return TransformersCutter(model)
    return GraphCutter(model, example_inputs)


def materialise(
    half: nn.Module, state: Mapping[str, Tensor], device: torch.device | str = "cpu"
) -> None:
    """Give a half that was cut from a model on the meta device its tensors.

    Only this half is allocated. Buffers that no state dict holds get the values that their
    transformers model starts them with; others are filled with zeros, or NaN if they are
    floating-point, so that a forgotten one does not go unseen.

    Parameters
    ----------
    half : nn.Module
        Client or server half; changed in place.
    state : mapping of str to Tensor
        Values under the names of ``half.state_dict()``; copied, in the half's types.
    device : torch.device or str
        Where to put them.

    Raises
    ------
    ValueError
        If names or shapes do not fit.
    """
    own = half.state_dict(keep_vars=True)
    for key in sorted(own.keys() ^ state.keys()):
        raise ValueError(f"tensor {key!r} is {'missing' if key in own else 'not of this half'}")
    for key, tensor in own.items():
        if state[key].shape != tensor.shape:
            shapes = f"{tuple(state[key].shape)}, expected {tuple(tensor.shape)}"
            raise ValueError(f"tensor {key!r} has shape {shapes}")
    _fill_other_buffers(half, own, torch.device(device))
    copies: dict[int, Tensor] = {}  # one for all names of a shared weight
    for key, tensor in own.items():
        if id(tensor) not in copies:
            value = state[key].detach().to(device, tensor.dtype, copy=True)
            is_parameter = isinstance(tensor, nn.Parameter)
            copies[id(tensor)] = (
                nn.Parameter(value, tensor.requires_grad) if is_parameter else value
            )
        path, _, name = key.rpartition(".")
        owner = half.get_submodule(path)
        held = owner._parameters if name in owner._parameters else owner._buffers
        held[name] = copies[id(tensor)]  # type: ignore[assignment]


def _fill_other_buffers(half: nn.Module, own: Mapping[str, Tensor], device: torch.device) -> None:
    parts = {path: part for path, part in half.named_modules() if isinstance(part, PartOfModel)}
    for path, module in half.named_modules():
        empty = False
        for name, buffer in module._buffers.items():
            key = f"{path}.{name}".lstrip(".")
            if buffer is not None and key not in own:
                if buffer.is_meta:
                    value = torch.nan if buffer.is_floating_point() else 0
                    module._buffers[name] = torch.full_like(buffer, value, device=device)
                    empty = True
                else:
                    module._buffers[name] = buffer.to(device)
        around = [
            part for root, part in parts.items() if not root or f"{path}.".startswith(f"{root}.")
        ]
        if empty and around:
            with torch.no_grad():
                around[0].skeleton._init_weights(module)


def obstacle_to(model: nn.Module, cutter: Cutter, at: str) -> str | None:
    """Say why there is no cut after `at`, one of the cutter's points, or nothing."""
    reason = cutter.obstacle(at)
    if reason is not None:
        return reason
    client, used = cutter.keys(at)
    server = used | (model.state_dict().keys() - client)
    owner = {id(operator.attrgetter(key)(model)): key for key in sorted(client)}
    for key in sorted(server):
        ours = owner.get(id(operator.attrgetter(key)(model)))
        if ours is not None:
            return (
                f"it splits a shared weight, {ours!r} before the cut is {key!r} after it; untie "
                "them first (in transformers with tie_word_embeddings=False in the config)"
            )
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    if not client & parameters:
        return "there are no parameters before it"
    if not used & parameters:
        return "there are no parameters after it, the server half would be empty"
    return None


def _is_activation(output: object) -> bool:
    return isinstance(output, Tensor) and output.is_floating_point() and output.ndim > 0


def _nearest(model: nn.Module, cutter: Cutter, at: str) -> str:
    possible = [name for name in cutter.candidates() if obstacle_to(model, cutter, name) is None]
    if not possible:
        reasons = {obstacle_to(model, cutter, name) for name in cutter.candidates()}
        return f"this model has no possible cut: {'; '.join(sorted(filter(None, reasons)))}"

    def distance(name: str) -> float:
        return -difflib.SequenceMatcher(None, at, name).ratio()

    nearest = sorted(possible, key=distance)
    more = len(nearest) - _NAMES_SHOWN
    shown = ", ".join(nearest[:_NAMES_SHOWN])
    return f"possible, nearest first: {shown}{f' and {more} more' if more > 0 else ''}"


def split_in_three(
    model: nn.Module,
    at: str,
    top_cut: str = "",
    example_inputs: ExampleInputs | None = None,
) -> Split:
    """Cut a model after two of its modules.

    Parameters
    ----------
    model, at, example_inputs
        As in :func:`~flwr_moe.split.cut.split_model`.
    top_cut : str
        Dotted name of the module after which the head begins; by default the last one possible,
        which leaves the smallest head.

    Raises
    ------
    ValueError
        If one of the cuts is not possible, or there are no parameters between them.
    """
    cutter = make_cutter(model, example_inputs)
    if example_inputs is not None or at not in cutter.points or obstacle_to(model, cutter, at):
        split_model(model, at, example_inputs)  # says what is wrong with the first cut
    possible = [name for name in cutter.candidates() if not _why_not(model, cutter, at, name)]
    if not possible:
        raise ValueError(f"no top cut: the model cannot be cut a second time after {at!r}")
    top = top_cut or possible[-1]
    reason = _why_not(model, cutter, at, top)
    if reason is not None:
        raise ValueError(
            f"no top cut after {top!r}: {reason}; possible, in order: {', '.join(possible)}"
        )
    if example_inputs is not None:
        split_model(model, top, example_inputs)
    client, server, head, num_up = cutter.thirds(at, top)
    return Split(client, server, at, head, top, num_up)


def _why_not(model: nn.Module, cutter: Cutter, at: str, top: str) -> str | None:
    """Say why there is no head after `top`, or nothing."""
    if top not in cutter.points:
        return "there is no such place"
    reason = obstacle_to(model, cutter, top)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    if reason is None and not (cutter.keys(top)[0] - cutter.keys(at)[0]) & parameters:
        return f"it does not come later than {at!r} with parameters in between"
    return reason
