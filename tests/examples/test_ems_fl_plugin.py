"""The example project runs as it stands: its own ClientApp through the mod, EMS-FL as strategy."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord

from flwr_moe.experts import mixed_log_probs
from flwr_moe.experts.mixture import cluster_logits
from flwr_moe.network import FixedLinks, SimulatedGrid
from flwr_moe.strategies import EMSFL
from flwr_moe.training import accuracy_and_loss, predict
from tests.local_grid import LocalGrid

EXAMPLE = Path(__file__).parents[2] / "examples" / "ems_fl_plugin"


def test_own_client_app_learns_through_the_mod(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    task = importlib.import_module("ems_fl_plugin.task")
    client_app = importlib.import_module("ems_fl_plugin.client_app").app
    importlib.import_module("ems_fl_plugin.server_app")
    grid = SimulatedGrid(LocalGrid(client_app, 4), FixedLinks(1e6, 0.1))
    torch.manual_seed(0)
    layout, net = task.layout(), task.Net()
    before = net.state_dict()
    strategy = EMSFL(layout, num_inputs=13, num_features=128)
    result = strategy.start(
        grid,
        ArrayRecord(before),
        num_rounds=2,
        train_config=ConfigRecord({"local-steps": 60, "learning-rate": 0.01, "batch-size": 32}),
    )
    state = result.arrays.to_torch_state_dict()
    owned = [cluster.experts for cluster in strategy.clusters]
    assert sorted(e for experts in owned for e in experts[0]) == list(range(6))
    # Only experts travel up: twice per device, besides the gate statistics.
    expert_bytes = layout.expert_bytes(owned[0])
    # Flower sends each array with a NumPy header of 128 bytes, and its name.
    envelopes = 3 * 4 * (128 + len("layer.0.expert.0.w1"))
    up = grid.ledger.by_kind()["uplink"]
    assert up["expert"] == pytest.approx(8 * (expert_bytes + envelopes), rel=0.01)
    assert "shared" not in up
    # The shared part is frozen although the user's function trained it.
    for key, value in layout.shared(before).items():
        assert state[key].equal(value)
    for cluster in range(2):
        test = task.load_data(cluster, test=True)
        assert strategy.router is not None
        logits = cluster_logits(net, layout, state, owned, test.x, predict)
        mixed = mixed_log_probs(logits, strategy.router.posterior(test.x))
        assert accuracy_and_loss(mixed, test.y)[0] > 0.85
    for name in [name for name in sys.modules if name.startswith("ems_fl_plugin")]:
        del sys.modules[name]
