"""The one interface of our Grids: both of Flower's pull signatures, on either side of them."""

import pytest
from flwr.serverapp.strategy import FedAvg

from flwr_moe.network import ClockGrid, FixedLinks, RealGrid, SimulatedGrid, with_clock
from flwr_moe.network.filters import DevicesOnly, OneAtATime, with_wire_dtype
from tests.local_grid import LocalGrid
from tests.network.apps import order, worker_app
from tests.network.test_rejected import SENT, app_with_one_bad_node


class Coming(LocalGrid):
    """Flower's Grid with the signature that its nightly builds have."""

    def pull_messages(self, reply_to_message_ids=None, *, message_ids=None):
        assert message_ids is None
        return super().pull_messages(reply_to_message_ids or ())


class Nothing:
    """Nothing goes beside."""

    def flush(self):
        pass

    def open_ids(self):
        return []

    def take(self, replies):
        assert not replies


def simulated(local):
    return SimulatedGrid(local, FixedLinks(800.0), poll_s=0.0)


GRIDS = {
    "simulated": simulated,
    "real": lambda local: RealGrid(local, poll_s=0.0),
    "gated": lambda local: RealGrid(local, FixedLinks(), poll_s=0.0),
    "half-size": lambda local: with_wire_dtype(simulated(local), "bfloat16"),
    "devices": lambda local: DevicesOnly(simulated(local), Nothing()),
    "devices on real links": lambda local: DevicesOnly(RealGrid(local, poll_s=0.0), Nothing()),
    "one at a time": lambda local: OneAtATime(simulated(local)),
}


@pytest.mark.parametrize("inner", [LocalGrid, Coming])
@pytest.mark.parametrize("kind", GRIDS)
def test_both_pull_signatures_inside_and_outside(kind, inner):
    local = inner(worker_app(), 2)
    grid = GRIDS[kind](local)
    assert isinstance(grid, ClockGrid) and with_clock(grid) is grid

    def push():
        return grid.push_messages([order(local.node_id(0), 500, tag=1)])

    def tags(replies):
        return [reply.content["metrics"]["tag"] for reply in replies]

    assert tags(grid.pull_messages(push())) == [1]
    assert tags(grid.pull_messages(message_ids=push())) == [1]
    assert tags(grid.pull_messages(reply_to_message_ids=push())) == [1]
    push()
    assert tags(grid.pull_messages()) == [1]
    assert grid.pull_messages() == [] and grid.open_ids() == []
    assert not grid.ledger.events and grid.ledger.updates == 4


@pytest.mark.parametrize("kind", sorted(GRIDS.keys() - {"half-size"}))
def test_replies_are_checked_on_every_grid(kind):
    grid = GRIDS[kind](LocalGrid(app_with_one_bad_node("nan"), 3))
    result = FedAvg(fraction_evaluate=0.0).start(grid, SENT["arrays"].copy(), num_rounds=2)
    assert result.arrays["w"].numpy() == pytest.approx([(10 + 3 * 12) / 4] * 3)
    assert grid.ledger.events == {"rejected": 2} and grid.ledger.updates == 4


@pytest.mark.parametrize("kind", ["real", "gated"])
def test_errors_are_logged_with_node_and_cause(kind, caplog):
    grid = GRIDS[kind](LocalGrid(app_with_one_bad_node("wrong shape"), 3))
    FedAvg(fraction_evaluate=0.0).start(grid, SENT["arrays"].copy(), num_rounds=1)
    assert "node 1: rejected: array 'arrays/w' has shape (4,), expected (3,)" in caplog.text
