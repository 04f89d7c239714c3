"""Tracing a model's forward pass, and where in it every module's output is."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from flwr_moe.split.cut_transformers import is_transformers_model


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
