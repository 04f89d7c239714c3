"""Tracing a model's forward pass, and where in it every module's output is."""

from __future__ import annotations

import inspect
import operator
from typing import Any

from torch import Tensor, fx, nn

from flwr_moe.split.cut_transformers import PartOfModel, TransformersCutter, is_transformers_model


class RecordingTracer(fx.Tracer):
    """Traces a model, and remembers what every module gave."""

    proxy_buffer_attributes = True

    def run(self, model: nn.Module, unused: dict[str, Any]) -> None:
        """Trace a forward pass, with the values of its arguments that are not in use.

        Raises
        ------
        ValueError
            If it cannot be traced.
        """
        self._given: list[tuple[str, Any]] = []
        try:
            self.graph = self.trace(model, unused or None)
        except Exception as error:  # whatever the user's code raises on a proxy
            reason = str(error).strip().split("\n")[0]
            raise ValueError(
                f"cannot trace {type(model).__name__}.forward ({reason}); move what depends on "
                "values into a submodule, which is then kept in one piece"
            ) from error

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Keep models of transformers, and modules without submodules, in one piece too."""
        whole = super().is_leaf_module(m, module_qualified_name) or is_transformers_model(m)
        return whole or not any(True for _ in m.children())

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """Trace a module, in one piece if its inside cannot be traced."""
        path, known, stack = self.path_of_module(m), len(self._given), self.module_stack.copy()
        try:
            result = super().call_module(m, forward, args, kwargs)
        except Exception:  # whatever happens inside: the module runs in one piece
            del self._given[known:]
            self.module_stack = stack
            result = self.create_proxy("call_module", path, args, kwargs)
        self._given.append((path, result))
        return result

    def points(self) -> dict[str, fx.Node]:
        """Return the node of every module that is called once and gives one value."""
        names = [name for name, _ in self._given]
        once = {name for name in names if names.count(name) == 1}
        return {
            name: value.node
            for name, value in self._given
            if name in once and isinstance(value, fx.Proxy)
        }

    def spread(self, path: str, places: dict[str, fx.Node]) -> None:
        """Put the places inside a module, by name, where the module itself was in the order."""
        place = [name for name, _ in self._given].index(path)
        self._given[place : place + 1] = [(name, fx.Proxy(node)) for name, node in places.items()]

    @property
    def source(self) -> dict[fx.Node, str]:
        """Which module gave a node's value."""
        return {node: name for name, node in reversed(self.points().items())}

    def code(self) -> str:
        """Write the graph as source, to compare with another."""
        return self.graph.python_code("self").src


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
