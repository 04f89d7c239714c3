"""Cutting a model in three: both ends stay with the client, and so do its labels."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from flwr_moe.split.cut import Split, make_cutter, obstacle_to, split_model
from flwr_moe.split.cut_graph import GraphCutter
from flwr_moe.split.cut_parts import ServerHalf
from flwr_moe.split.cut_transformers import TransformersCutter
from flwr_moe.split.meta import ExampleInputs

AnyCutter = GraphCutter | TransformersCutter


@dataclass(frozen=True)
class UShape(Split):
    """A model in a U-shape: bottom and head are the client's, the middle is the server's.

    Attributes
    ----------
    client : nn.Module
        The bottom: takes the model's inputs and returns the activation at the cut, then what else
        the other parts need without a gradient.
    server : nn.Module
        The middle: takes the activation and the first `num_up` of the others, and returns the
        activation at the top cut.
    at : str
        The module after which the bottom ends.
    head : nn.Module
        Takes the activation at the top cut and all the others, and returns what the model returns.
    top_cut : str
        The module after which the middle ends.
    num_up : int or None
        How many tensors besides the activation the middle takes; None for all.

    Notes
    -----
    Source: the U-shape is known from split learning without sharing of labels. As in `Split`, the
    parts share their tensors with the model under its names, with no key in two of them.
    """

    head: nn.Module
    top_cut: str
    num_up: int | None

    def client_state_dict(self) -> dict[str, Tensor]:
        """Return the tensors of bottom and head."""
        return {**self.client.state_dict(), **self.head.state_dict()}


def split_in_three(
    model: nn.Module,
    at: str,
    top_cut: str = "",
    example_inputs: ExampleInputs | None = None,
) -> UShape:
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
    possible = _top_cuts(model, cutter, at)
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
    if isinstance(cutter, GraphCutter):
        bottom, middle, head, num_up = cutter.thirds(at, top)
        return UShape(bottom, middle, at, head, top, num_up)
    return _transformers_thirds(cutter, at, top)


def _top_cuts(model: nn.Module, cutter: AnyCutter, at: str) -> list[str]:
    return [name for name in cutter.candidates() if _why_not(model, cutter, at, name) is None]


def _why_not(model: nn.Module, cutter: AnyCutter, at: str, top: str) -> str | None:
    """Say why there is no head after `top`, or nothing."""
    if top not in cutter.points:
        return "there is no such place"
    reason = obstacle_to(model, cutter, top)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    if reason is None and not (cutter.keys(top)[0] - cutter.keys(at)[0]) & parameters:
        return f"it does not come later than {at!r} with parameters in between"
    return reason


class MiddlePart(ServerHalf):
    """The blocks of a model of transformers between two cuts."""

    def forward(self, hidden_BTD: Tensor, *context: Tensor) -> Tensor:
        """Run from one cut to the other; hidden states (B, T, D) in and out."""
        given, _ = self._given([hidden_BTD, *context])
        hidden_later_BTD: Tensor = self.skeleton.base_model(**given).last_hidden_state
        return hidden_later_BTD


def _transformers_thirds(cutter: TransformersCutter, at: str, top: str) -> UShape:
    bottom, server = cutter.halves(at)
    head = cutter.halves(top)[1]
    between = TransformersCutter(server.skeleton).halves(top)[0]
    middle = MiddlePart(between.skeleton, *server.kind)
    return UShape(bottom, middle, at, head, top, None)
