"""Split learning when nodes leave for good."""

from __future__ import annotations

from collections.abc import Iterable

from flwr.app import ArrayRecord, ConfigRecord

from flwr_moe.network import RealGrid
from flwr_moe.strategies.split.splitfed import SplitFed
from tests.local_grid import LocalGrid
from tests.strategies.split.split_clients import CONFIG, build_model, serving, split_app


class Shrinking(LocalGrid):
    """A Grid whose first nodes have left once a round of training has been answered."""

    left = 0

    def get_node_ids(self) -> Iterable[int]:
        """Nodes that are still there."""
        trained = any(m.metadata.message_type.startswith("train") for m in self.executed)
        return list(super().get_node_ids())[self.left if trained else 0 :]


def start(strategy: SplitFed, network: RealGrid) -> None:
    strategy.start(
        network,
        ArrayRecord(build_model().state_dict()),
        num_rounds=3,
        train_config=ConfigRecord(CONFIG),
    )


def test_rounds_go_on_with_the_nodes_that_are_left() -> None:
    strategy = SplitFed(build_model, "2", min_available_nodes=3, min_train_nodes=3)
    grid = Shrinking(split_app(), 3)
    grid.left = 1
    with serving(strategy):
        start(strategy, RealGrid(grid, horizon_s=100.0))
    assert strategy.run.batches == (3 + 2 + 2) * CONFIG["local-steps"]


def test_nobody_is_waited_for_beyond_the_horizon() -> None:
    strategy = SplitFed(build_model, "2", min_available_nodes=2)
    grid = Shrinking(split_app(), 2)
    grid.left = 2
    with serving(strategy):
        start(strategy, network := RealGrid(grid, horizon_s=5.0))
    # The first round was trained by both.
    assert network.now >= 5.0 and strategy.run.batches == 2 * CONFIG["local-steps"]
