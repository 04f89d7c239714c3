"""Cutting the graph of operations that torch.fx traces from a model's forward pass."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterable
from typing import Any

from torch import Tensor, fx, nn

from flwr_moe.split.cut_trace import RecordingTracer, StagedModels
from flwr_moe.split.meta import ExampleInputs, meta_twin, unused_arguments

_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
_SIZES = ("size", "dim", "numel", "getattr")
_RETURN_TUPLES = (nn.RNNBase, nn.MultiheadAttention)


class GraphCutter:
    """Where a traceable model can be cut, and its halves.

    A module whose own forward pass cannot be traced is kept in one piece, as are modules without
    submodules; the model's own forward pass has to be traceable. A model of transformers inside it
    can be cut between its blocks, as `TransformersCutter` does it.

    Parameters
    ----------
    model : nn.Module
        On any device; neither changed nor run.
    example_inputs : Tensor, sequence or mapping, optional
        They say which optional arguments of the forward pass are in use; without them none is.

    Raises
    ------
    ValueError
        If the model cannot be traced, or does something else in training than in evaluation
        outside its layers.
    """

    def __init__(self, model: nn.Module, example_inputs: ExampleInputs | None) -> None:
        self.model = model
        unused = unused_arguments(model, example_inputs)
        # On a copy, because a forward pass under tracing may leave proxies in the model.
        tracers = []
        for training in (False, True):
            tracer = RecordingTracer()
            tracer.run(meta_twin(model).train(training), unused)
            tracers.append(tracer)
        self._tracer = tracers[0]
        if len({tracer.code() for tracer in tracers}) > 1:
            raise ValueError(
                f"{type(model).__name__}.forward does something else in training than in "
                "evaluation outside its layers; use layers such as nn.Dropout instead of functions"
            )
        self._staged = StagedModels(model, self._tracer)
        self._nodes = list(self._tracer.graph.nodes)
        arguments = inspect.signature(model.forward).parameters.keys() - unused.keys()
        self._inputs = [
            node for node in self._nodes if node.op == "placeholder" and node.target in arguments
        ]
        self._keys = set(model.state_dict())
        self._carries, self._raw = self._kinds()
        self._wanted = _ancestors(self._nodes[-1:])
        self._on_input = {
            node
            for node in self._wanted - self._carries
            if any(source in self._raw for source in node.all_input_nodes)
        }
        self.points = self._tracer.points()
        """Node after each module's output by the module's name, in order of execution."""

    def candidates(self) -> list[str]:
        """Return one name for each place where one module's output can be taken."""
        names: dict[fx.Node, str] = {}
        for name, node in self.points.items():
            names[node] = min(names.get(node, name), name, key=_preference)
        return list(names.values())

    def obstacle(self, at: str) -> str | None:
        """Say why there is no cut after `at`, or nothing."""
        if isinstance(self.model.get_submodule(at), _RETURN_TUPLES):
            return "it does not return a single tensor"
        for node in self._crossing(at)[1:]:
            if node.op == "get_attr" and node in self._carries:
                return f"{node.target!r} is used on both sides"
            if node in self._carries:
                source = self._tracer.source.get(node, node.name)
                return f"a connection skips it: the output of {source!r} is needed after it too"
            if node in self._raw:
                return "the model's input, or its size, is needed after it too"
        return None

    def keys(self, at: str) -> tuple[set[str], set[str]]:
        """Return the state dict's keys that the client and the server half use."""
        client_nodes, server_nodes = self._sides(at)
        return self._keys_of(client_nodes), self._keys_of(server_nodes)

    def halves(self, at: str) -> tuple[nn.Module, nn.Module]:
        """Build the client and the server half, which share their tensors with the model."""
        client_nodes, server_nodes = self._sides(at)
        crossing = self._crossing(at)
        client = self._module(self._client_graph(client_nodes, crossing))
        result = self._nodes[-1].args[0]
        server = self._module(self._server_graph(server_nodes, crossing, result))
        for key in self._keys - self._keys_of(client_nodes) - self._keys_of(server_nodes):
            _attach(server, key, operator.attrgetter(key)(self.model))
        return client, server

    def thirds(self, at: str, top: str) -> tuple[nn.Module, nn.Module, nn.Module, int]:
        """Build what is before a cut, between it and a later one, and after that.

        The first part returns its activation and all that the others need besides; the second takes
        the activation and the first few of those, as many as the number says, and returns the later
        activation; the third takes that and all of them. They share their tensors with the model.
        """
        below_top = set(self._sides(top)[0])
        # What crosses besides depends on no parameter: the first part can compute all of it.
        before = _ancestors([self.points[at], *self._on_input, *self._crossing(top)[1:]])
        inner = [node for part in self._sides(at) for node in part]
        bottom = [node for node in inner if node in before]
        middle = [node for node in inner if node in below_top - before]
        head = [node for node in inner if node not in below_top]
        cuts, end = (self.points[at], self.points[top]), self._nodes[-1]
        up, down = self._used_by(middle), self._used_by([*head, end])
        context = [node for node in self._nodes if node in up.difference(cuts)]
        num_up = len(context)
        context += [node for node in self._nodes if node in down.difference(cuts, context)]
        first = self._module(self._client_graph(bottom, [cuts[0], *context]))
        second = self._module(self._server_graph(middle, [cuts[0], *context[:num_up]], cuts[1]))
        third = self._module(self._server_graph(head, [cuts[1], *context], end.args[0]))
        used = (self._keys_of(part) for part in (bottom, middle, head))
        for key in self._keys.difference(*used):
            _attach(second, key, operator.attrgetter(key)(self.model))
        return first, second, third, num_up

    def _kinds(self) -> tuple[set[fx.Node], set[fx.Node]]:
        """Values that depend on parameters, and others that tell the raw input or are no tensor."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        carries: set[fx.Node] = set()
        raw: set[fx.Node] = set(self._inputs[:1])
        for node in self._nodes:
            sources = node.all_input_nodes
            has_own = any(key in parameters for key in self._keys_of([node]))
            if has_own or any(source in carries for source in sources):
                carries.add(node)
            name = _operation(node)
            # What a comparison gives (a padding mask, say) no longer tells the input itself.
            hides = name in _COMPARISONS and node.op != "placeholder"
            if name in _SIZES or (not hides and any(source in raw for source in sources)):
                raw.add(node)
        return carries, raw

    def _sides(self, at: str) -> tuple[list[fx.Node], list[fx.Node]]:
        """Return the nodes that each half runs.

        What is computed on the raw input without parameters, such as a padding mask, is the
        client's work, wherever it is used.
        """
        before = _ancestors([self.points[at], *self._on_input])
        skipped = {"placeholder", "output"}
        inner = [n for n in self._nodes if n in self._wanted and n.op not in skipped]
        return [n for n in inner if n in before], [n for n in inner if n not in before]

    def _crossing(self, at: str) -> list[fx.Node]:
        """Return the activation, then the other values that the server half uses."""
        cut = self.points[at]
        used = self._used_by([*self._sides(at)[1], self._nodes[-1]])
        return [cut, *(node for node in self._nodes if node in used and node is not cut)]

    @staticmethod
    def _used_by(nodes: list[fx.Node]) -> set[fx.Node]:
        """Return what some nodes take from others."""
        return {source for node in nodes for source in node.all_input_nodes} - set(nodes)

    def _keys_of(self, nodes: Iterable[fx.Node]) -> set[str]:
        keys: set[str] = set()
        for node in nodes:
            target = str(node.target)
            if node in self._staged:
                keys |= self._staged.keys_of(node)
            elif node.op == "call_module":
                state = self.model.get_submodule(target).state_dict()
                keys |= {f"{target}.{key}" for key in state}
            elif node.op == "get_attr":
                keys |= {target} & self._keys
        return keys

    def _client_graph(self, nodes: list[fx.Node], crossing: list[fx.Node]) -> fx.Graph:
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for node in [*self._inputs, *nodes]:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output(tuple(copies[node] for node in crossing))
        return graph

    def _server_graph(self, nodes: list[fx.Node], crossing: list[fx.Node], result: Any) -> fx.Graph:
        graph = fx.Graph()
        copies = {node: graph.placeholder(node.name) for node in crossing}
        if any(self._works_in_place(node) for node in nodes):
            # What arrives at the cut is a leaf of autograd, which may not be written to.
            copies[crossing[0]] = graph.call_method("clone", (copies[crossing[0]],))
        for node in nodes:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output(fx.map_arg(result, copies.__getitem__))
        return graph

    def _works_in_place(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            module = self.model.get_submodule(str(node.target))
            return any(getattr(part, "inplace", False) for part in module.modules())
        name = _operation(node)
        if getattr(operator, name, None) is node.target:
            return name[0] == "i" and hasattr(operator, name[1:])  # iadd, as in h += x
        return bool(node.kwargs.get("inplace")) or name.endswith("_")

    def _module(self, graph: fx.Graph) -> fx.GraphModule:
        stretches = self._staged.joined(graph)
        targets = {str(n.target) for n in graph.nodes if n.op in ("call_module", "get_attr")}
        root = {target: self._lookup(target) for target in targets} | stretches
        half = fx.GraphModule(root, graph, type(self.model).__name__)
        half.training = self.model.training
        for path, module in half.named_modules():
            for name in module._buffers:
                if f"{path}.{name}".lstrip(".") not in self._keys:
                    module._non_persistent_buffers_set.add(name)
        return half

    def _lookup(self, target: str) -> Any:
        try:
            return operator.attrgetter(target)(self.model)
        except AttributeError:  # a constant that tracing has found
            return operator.attrgetter(target)(self._tracer.root)


def _preference(name: str) -> tuple[bool, int]:
    """Order names of one place: members of a sequence first, then the outermost."""
    return (not name.rpartition(".")[2].isdigit(), name.count("."))


def _operation(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target)).rpartition(".")[2]


def _ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    found = set(nodes)
    waiting = list(found)
    while waiting:
        for source in waiting.pop().all_input_nodes:
            if source not in found:
                found.add(source)
                waiting.append(source)
    return found


def _attach(root: nn.Module, key: str, tensor: Tensor) -> None:
    *path, name = key.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    if isinstance(tensor, nn.Parameter):
        root.register_parameter(name, tensor)
    else:
        root.register_buffer(name, tensor)
