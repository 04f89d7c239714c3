"""Adding a system, a task or links is one registration; everything else follows from it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import pytest
from flwr.serverapp.strategy import FedAvg

from flwr_moe.app import registry
from flwr_moe.app.client_app import make_client_app
from flwr_moe.app.judge import judge_global
from flwr_moe.app.registry import (
    LINKS,
    SECTIONS,
    SYSTEMS,
    TASKS,
    LinksKind,
    System,
    SystemKind,
    TaskKind,
    Tuned,
)
from flwr_moe.app.runner import run_system
from flwr_moe.app.section import ConfigError, Section, Whole, setting
from flwr_moe.app.settings import Settings, pyproject_table, settings_help
from flwr_moe.network import FixedLinks
from flwr_moe.tasks import Digits, Task
from tests.local_grid import LocalGrid


class HalfSettings(Section):
    """Settings of a made-up system."""

    prefix: ClassVar[str] = "half"
    share: Whole = setting(2, "one in how many clients trains", ge=1)


def build_half(settings: Settings, task: Task, seed: int) -> System:
    """FedAvg with some of the clients a round."""
    share = settings.of(HalfSettings).share
    strategy = FedAvg(
        fraction_train=1 / share,
        fraction_evaluate=0.0,
        min_train_nodes=1,
        min_available_nodes=task.num_clients,
    )
    return System(strategy, judge_global(settings, task), report=lambda arrays: {"share": share})


@pytest.fixture(autouse=True)
def put_back() -> Iterator[None]:
    tables = (SYSTEMS, TASKS, LINKS, SECTIONS)
    before = [dict(table) for table in tables]
    yield
    for table, content in zip(tables, before, strict=True):
        table.clear()
        table.update(content)


HALF = SystemKind(build_half, tuned={"warm": Tuned(0.01, 3)}, section=HalfSettings)


def run(settings: Settings) -> dict[str, object]:
    grid = LocalGrid(make_client_app(settings), settings.num_clients)
    return run_system(grid, settings, settings.seed).summary


def small(**more: object) -> Settings:
    return Settings(num_clients=4, num_clusters=2, num_experts=2, num_rounds=2, **more)


def test_a_system_is_one_registration() -> None:
    registry.register_system("half", HALF)
    settings = small(system="half", links="fixed", **{"half.share": "4"})
    summary = run(settings)
    # One of four clients a round, two rounds, three steps each.
    assert (summary["share"], summary["updates"], summary["device-steps"]) == (4, 2, 6)
    assert "half.share" in settings_help()
    assert "[tool.flwr.app.config.half]\nshare = 2\n" in pyproject_table()
    with pytest.raises(ConfigError, match=r"half\.share=0: expected a whole number at least 1"):
        settings.replace(half_share=0)
    with pytest.raises(ConfigError, match=r"did you mean half\?"):
        Settings(system="hlaf")


def test_a_task_and_links_are_one_registration_each() -> None:
    def two_clusters(settings: Settings, num_clients: int, seed: int) -> Task:
        return Digits(num_clients, 2, 2, 1, seed, partition="iid")

    registry.register_task("two-clusters", TaskKind(two_clusters, has_experts=True, cut="stem"))
    registry.register_links("slow", LinksKind(lambda settings, num_nodes: FixedLinks(1e4, 1.0)))
    summary = run(small(system="splitfed", task="two-clusters", links="slow", local_steps=2))
    assert (summary["updates"], summary["device-steps"]) == (8, 16)


def test_names_and_sections_are_taken_once() -> None:
    registry.register_system("half", HALF)
    with pytest.raises(ValueError, match="'half' is registered already"):
        registry.register_system("half", HALF)

    class Other(Section):
        prefix: ClassVar[str] = "half"

    with pytest.raises(ValueError, match=r"settings half\.\* of 'other' are those of something"):
        registry.register_system("other", SystemKind(build_half, {}, section=Other))
