"""What docs/extending.md says, done: a strategy, a system, a task."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flwr_moe.app import registry
from flwr_moe.app.client_app import make_client_app
from flwr_moe.app.runner import run_system
from flwr_moe.app.settings import ConfigError, Settings
from tests.local_grid import LocalGrid

PAGE = Path(__file__).parent.parent / "docs" / "extending.md"
BLOCKS = re.findall(r"```python\n# (\S+)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def page() -> Iterator[dict[str, Any]]:
    """What the page's code has defined; the registry forgets it afterwards."""
    registered = [registry.SYSTEMS, registry.TASKS, registry.LINKS, registry.SECTIONS]
    before = [dict(names) for names in registered]
    defined: dict[str, Any] = {"__name__": "extending"}
    for name, code in BLOCKS:
        exec(compile(code, name, "exec", dont_inherit=True), defined)
    yield defined
    for names, known in zip(registered, before, strict=True):
        names.clear()
        names.update(known)


def test_the_page_has_one_file_each_and_a_task_is_short() -> None:
    names = [name for name, _ in BLOCKS]
    assert names == ["newest.py", "newest_system.py", "wine.py"]
    lines = [line for line in dict(BLOCKS)["wine.py"].splitlines() if line.strip()]
    assert len(lines) <= 30


def test_what_the_page_says_runs(page: dict[str, Any]) -> None:
    settings = Settings(
        system="newest", task="wine", num_clients=4, num_clusters=2, horizon_hours=10
    ).replace(local_steps=20, learning_rate=0.01, max_local_steps=20)
    record = run_system(LocalGrid(make_client_app(settings), 4), settings, 0)
    assert record.summary["updates"] > 4
    assert record.history[-1].accuracy > record.history[0].accuracy + 0.2


def test_its_settings_are_known_and_checked(page: dict[str, Any]) -> None:
    settings = Settings.from_mapping({"system": "newest", "newest.oldest": 7})
    assert settings.of(page["NewestSettings"]).oldest == 7
    with pytest.raises(ConfigError, match=r"newest.oldest=-1: expected a whole number at least 0"):
        Settings.from_mapping({"newest.oldest": -1})
