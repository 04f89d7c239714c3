"""Models of transformers inside other modules, cut between their blocks.

In the traced graph the one call of such a model becomes a chain of stages: embeddings, every block,
and what comes after the last one. A half then calls the model once, with the blocks of its stages.
"""

from __future__ import annotations

import inspect
import operator
from typing import Any

from torch import Tensor, fx, nn

from flwr_moe.split.cut_parts import PartOfModel
from flwr_moe.split.cut_trace import RecordingTracer
from flwr_moe.split.cut_transformers import TransformersCutter, is_transformers_model

_STAGE = "flwr_moe_stage"
_TAKEN = {"input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds"}
_NO_MATTER = {"use_cache", "return_dict"}


class Stretch(PartOfModel):
    """Some blocks in a row of a model of transformers, called as the whole model is."""

    def __init__(self, cutter: TransformersCutter, begin: int | None, end: int | None) -> None:
        super().__init__(cutter.part(begin, end), cutter.is_decoder, cutter.pools_last)
        self._whole = end is None

    def forward(self, **given: Any) -> Tensor:
        """Run the blocks; what comes out is the hidden state (B, T, D), or logits at the end."""
        model = self.skeleton if self._whole else self.skeleton.base_model
        output = model(**given, **self._options)
        result: Tensor = output.get("logits", output.get("last_hidden_state"))
        return result


class StagedModels:
    """The models of transformers in a traced graph, and which node runs what of them.

    Parameters
    ----------
    model : nn.Module
        The whole model.
    tracer : RecordingTracer
        Has traced it; calls of such models in its graph are replaced by stages, and the places
        between them added to its points. A model of an architecture that cannot be cut, or whose
        call or result is used in another way than these stages allow, stays in one piece.

    Notes
    -----
    Source: ours.
    """

    def __init__(self, model: nn.Module, tracer: RecordingTracer) -> None:
        self._model = model
        self._cutters: dict[str, TransformersCutter] = {}
        for path, node in tracer.points().items():
            inner = model.get_submodule(path)
            if node.op != "call_module" or not is_transformers_model(inner):
                continue
            try:
                cutter = TransformersCutter(inner)
            except ValueError:
                continue
            given = _given(inner, node)
            results = _results(cutter, node)
            if given is not None and results is not None:
                self._cutters[path] = cutter
                _spread(path, cutter, tracer, node, given, results)

    def __contains__(self, node: fx.Node) -> bool:
        """Whether a node is a stage."""
        return _STAGE in node.meta

    def keys_of(self, node: fx.Node) -> set[str]:
        """Return the whole model's state dict's keys that a stage uses."""
        path, stage = str(node.target), int(node.meta[_STAGE])
        cutter = self._cutters[path]
        names = list(cutter.points)
        before = cutter.keys(names[stage - 1])[0] if stage else set()
        if stage < len(names):
            keys = cutter.keys(names[stage])[0] - before
        else:
            keys = cutter.keys(names[-1])[1]
        return {f"{path}.{key}" for key in keys}

    def joined(self, graph: fx.Graph) -> dict[str, nn.Module]:
        """Let one call stand for all stages of a model in a half's graph; the modules to call."""
        stretches: dict[str, nn.Module] = {}
        for path, cutter in self._cutters.items():
            stages = [node for node in graph.nodes if node in self and node.target == path]
            if not stages:
                continue
            first, last = stages[0], stages[-1]
            begin, end = int(first.meta[_STAGE]), int(last.meta[_STAGE])
            stretches[path] = Stretch(
                cutter, begin - 1 if begin else None, end if end < len(cutter.points) else None
            )
            if first is last:
                continue
            with graph.inserting_before(last):
                call = graph.call_module(path, (), dict(first.kwargs))
            last.replace_all_uses_with(call)
            for node in reversed(stages):
                graph.erase_node(node)
        return stretches


def _given(inner: nn.Module, node: fx.Node) -> dict[str, Any] | None:
    """Arguments by name that a model of transformers is called with, None if there are others."""
    bound = inspect.signature(inner.forward).bind(*node.args, **node.kwargs).arguments
    named = {**bound, **bound.get("kwargs", {})}
    given = {name: v for name, v in named.items() if name != "kwargs" and v is not None}
    if not given.keys() <= _TAKEN | _NO_MATTER:
        return None
    return {name: value for name, value in given.items() if name in _TAKEN}


def _results(cutter: TransformersCutter, node: fx.Node) -> list[fx.Node] | None:
    """Nodes that take the hidden state or the logits out of the result, if no others use it."""
    name = "logits" if cutter.has_head else "last_hidden_state"
    takes = {(getattr, name), (operator.getitem, name), (operator.getitem, 0)}
    users = list(node.users)
    plain = all((user.target, user.args[1:2] and user.args[1]) in takes for user in users)
    return users if users and plain and not cutter.pools_last else None


def _spread(
    path: str,
    cutter: TransformersCutter,
    tracer: RecordingTracer,
    node: fx.Node,
    given: dict[str, Any],
    results: list[fx.Node],
) -> None:
    """Put stages in the place of one call."""
    names = {"attention_mask", "position_ids"} if cutter.is_decoder else {"attention_mask"}
    later = {name: value for name, value in given.items() if name in names}
    places = []
    with tracer.graph.inserting_before(node):
        for number in range(len(cutter.points) + 1):
            stage = tracer.graph.call_module(path, (), given)
            stage.meta[_STAGE] = number
            given = {"inputs_embeds": stage, **later}
            places.append(stage)
    for result in results:
        result.replace_all_uses_with(places[-1])
        tracer.graph.erase_node(result)
    tracer.graph.erase_node(node)
    inner = [f"{path}.{name}" for name in cutter.points]
    tracer.spread(path, dict(zip(inner, places, strict=False)))
