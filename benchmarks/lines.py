"""Counts lines of code by room: no blanks, comments or docstrings (of attributes neither).

    python benchmarks/lines.py [FOLDER]

Prints one JSON line; ``isinstance`` counts its uses on classes of this package in the rooms
``strategies`` and ``client_apps``.
"""

from __future__ import annotations

import ast
import json
import sys
from collections import Counter
from pathlib import Path


def main() -> int:
    root = Path(sys.argv[1] if len(sys.argv) > 1 else "flwr_moe")
    sources = {path: path.read_text(encoding="utf-8") for path in sorted(root.rglob("*.py"))}
    trees = {path: ast.parse(text) for path, text in sources.items()}
    own = {n.name for t in trees.values() for n in ast.walk(t) if isinstance(n, ast.ClassDef)}
    rooms: Counter[str] = Counter()
    checks = 0
    for path, text in sources.items():
        room = path.relative_to(root).parts[0]
        rooms[room] += code_lines(text, trees[path])
        if room in ("strategies", "client_apps"):
            checks += sum(checks_own(node, own) for node in ast.walk(trees[path]))
    line = {"lines": sum(rooms.values()), "isinstance": checks, "rooms": dict(rooms.most_common())}
    print(json.dumps(line))
    return 0


def code_lines(text: str, tree: ast.Module) -> int:
    """Count the lines of a file that are neither blank, nor a comment, nor in a docstring."""
    strings = [
        node
        for parent in ast.walk(tree)
        if isinstance(parent, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        for node in parent.body
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    ]
    told = {n for s in strings for n in range(s.lineno, (s.end_lineno or s.lineno) + 1)}
    return sum(
        bool(line.strip()) and not line.lstrip().startswith("#") and number not in told
        for number, line in enumerate(text.splitlines(), 1)
    )


def checks_own(node: ast.AST, own: set[str]) -> int:
    """Count one for a call of ``isinstance`` that names a class of this package."""
    if not (isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance"):
        return 0
    names = {getattr(n, "id", getattr(n, "attr", "")) for n in ast.walk(node.args[1])}
    return int(bool(names & own))


if __name__ == "__main__":
    sys.exit(main())
