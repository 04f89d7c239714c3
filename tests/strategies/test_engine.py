"""EMS-FL through Flower's real simulation engine."""

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord

from flwr_moe.client_apps import build_client_app
from flwr_moe.engines.flower import simulate
from flwr_moe.experts import ExpertLayout
from flwr_moe.network import FixedLinks, SimulatedGrid
from flwr_moe.strategies import EMSFL
from flwr_moe.tasks import Digits
from tests.local_grid import LocalGrid
from tests.strategies.devices import numpy_state, until_contact

SUMMATION = 1e-5
"""Other processes may add up in another order, in single precision."""


@pytest.mark.ray
def test_equal_in_flowers_own_engine(monkeypatch):
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "0")
    task = Digits(6, 2, 4, 2, seed=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = task.build_model()
    layout, initial = ExpertLayout.of(model), ArrayRecord(model.state_dict())
    app = build_client_app(lambda context: task, lambda context: 0.5)

    def main(grid):
        strategy = EMSFL(layout, num_inputs=64, num_features=32, min_available_nodes=6)
        simulated = SimulatedGrid(grid, FixedLinks(1e6, 0.05))
        config = until_contact(**{"local-steps": 4})
        result = strategy.start(simulated, initial, 1, train_config=config)
        owned = [c.experts for c in strategy.clusters]
        uploads = [c.uploads_s for c in strategy.clusters]
        return (
            numpy_state(result.arrays),
            owned,
            uploads,
            simulated.ledger,
            strategy.router.arrays(),
        )

    arrays, owned, uploads, ledger, router = simulate(app, 6, main)
    expected, *rest = main(LocalGrid(app, 6))
    assert owned == rest[0] and [len(o[0]) for o in owned] == [2, 2]
    assert uploads == rest[1] and [len(u) for u in uploads] == [1, 1]
    assert ledger == rest[2] and ledger.updates == 6 and ledger.steps >= 6 * 4
    for key, array in expected.items():
        assert np.allclose(arrays[key], array, rtol=0, atol=SUMMATION), key
    for key, array in rest[3].items():
        assert np.allclose(router[key], array, rtol=1e-3, atol=1e-3), key
    start = numpy_state(initial)
    changed = {k for k in arrays if not np.array_equal(arrays[k], start[k])}
    assert changed == {f"moe.experts.{p}" for p in ("w1", "b1", "w2", "b2")}
