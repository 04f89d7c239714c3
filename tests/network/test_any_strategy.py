"""Every strategy that Flower exports runs unchanged on satellite links.

Left out are the two XGBoost strategies, whose clients must train trees. On links without limits a
strategy gives the arrays it gives on the plain Grid. That holds to the last bit where the result
does not depend on the order of the replies (FedMedian, and Krum, which picks one reply); the others
sum replies in the order in which they come, which on the plain Grid is random, and agree to
rounding. Two things are random on any Grid: the noise of the wrappers for differential privacy,
from numpy's global generator, which is seeded here; and which nodes are drawn where not all take
part, so here all do.
"""

from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import adaptiveclipping_mod, fixedclipping_mod
from flwr.serverapp import strategy as flower

from flwr_moe.network import (
    ROLL_CALL_TYPE,
    FixedLinks,
    SatelliteLinks,
    SimulatedGrid,
    answer_roll_call,
)
from flwr_moe.orbit import Site, constellation, find_passes
from tests.local_grid import LocalGrid

START = datetime(2026, 3, 1, tzinfo=UTC)
SITES = [Site("Munich", 48.1, 11.6), Site("Quito", -0.2, -78.5), Site("Nairobi", -1.3, 36.8)]
HOURS, MASK_DEG = 48.0, 10.0
# The longest wait for a pass is shorter; Flower's own hour is not.
TIMEOUT_S = timedelta(hours=12).total_seconds()

NODES, ROUNDS = 7, 2  # Bulyan needs 4 f + 3 replies; f, the attackers it fears, is 1 here
SHARED = {"min_train_nodes": NODES, "min_evaluate_nodes": NODES, "min_available_nodes": NODES}
NOISE, CLIP, SEED = 0.5, 0.05, 11

# Weights are around 1, in double precision; Adam and its kin divide by as little as 1e-3.
EXACT, SUMMATION = 0.0, 1e-12

MODS = {
    "DifferentialPrivacyClientSideFixedClipping": [fixedclipping_mod],
    "DifferentialPrivacyClientSideAdaptiveClipping": [adaptiveclipping_mod],
}
OPTIONS = {
    "FedAvg": {},
    "FedAvgM": {"server_learning_rate": 0.7, "server_momentum": 0.9},
    "FedAdam": {},
    "FedAdagrad": {},
    "FedYogi": {},
    "FedProx": {"proximal_mu": 0.5},
    "FedMedian": {},
    "FedTrimmedAvg": {"beta": 0.2},
    "Krum": {"num_malicious_nodes": 1},
    "MultiKrum": {"num_malicious_nodes": 1, "num_nodes_to_select": 3},
    "Bulyan": {"num_malicious_nodes": 1},
    "QFedAvg": {"client_learning_rate": 0.1},
}
WRAPPERS = [
    f"DifferentialPrivacy{side}Side{how}Clipping"
    for side in ("Client", "Server")
    for how in ("Fixed", "Adaptive")
]
NO_STRATEGY = {"Strategy", "Result"}
SPECIAL_CLIENT = {"FedXgbBagging", "FedXgbCyclic"}
NAMES = [*OPTIONS, *WRAPPERS]


def build(name: str, noise: float = NOISE):
    if name in OPTIONS:
        return getattr(flower, name)(**SHARED, **OPTIONS[name])
    norm = "clipping_norm" if "Fixed" in name else "initial_clipping_norm"
    settings = {"noise_multiplier": noise, "num_sampled_clients": NODES, norm: CLIP}
    return getattr(flower, name)(flower.FedAvg(**SHARED), **settings)


def app_for(name: str) -> ClientApp:
    """Least squares in numpy on every node; it keeps near the global model if FedProx asks."""
    app = ClientApp()

    def problem(context: Context):
        partition = int(context.node_config["partition-id"])
        rng = np.random.default_rng(partition)
        x = rng.normal(size=(8 + 2 * partition, 3))
        return x, x @ [1.0, -2.0, 3.0] + rng.normal(size=len(x))

    def read(message: Message):
        return [message.content["arrays"][key].numpy() for key in ("w", "b")]

    def metrics_of(w, b, x, y) -> MetricRecord:
        loss = float(((x @ w + b - y) ** 2).mean())
        return MetricRecord({"num-examples": len(y), "train_loss": loss})

    @app.train(mods=MODS.get(name))
    def train(message: Message, context: Context) -> Message:
        x, y = problem(context)
        w, b = old_w, old_b = read(message)
        mu = float(message.content["config"].get("proximal-mu", 0.0))
        for _ in range(5):
            error = x @ w + b - y
            w = w - 0.1 * (x.T @ error / len(y) + mu * (w - old_w))
            b = b - 0.1 * (error.mean() + mu * (b - old_b))
        arrays = ArrayRecord({"w": Array(w), "b": Array(b)})
        content = RecordDict({"arrays": arrays, "metrics": metrics_of(w, b, x, y)})
        return Message(content, reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        content = RecordDict({"metrics": metrics_of(*read(message), *problem(context))})
        return Message(content, reply_to=message)

    return answer_roll_call(app, site=lambda context: context.node_config["partition-id"] % 3)


class CountingGrid(LocalGrid):
    """Counts the bytes of the replies that it hands out, as Flower does."""

    reply_bytes = 0

    def pull_messages(self, message_ids):
        replies = super().pull_messages(message_ids)
        for reply in replies:
            if reply.metadata.message_type != ROLL_CALL_TYPE:
                assert reply.has_content(), reply.error.reason
                self.reply_bytes += record_bytes(reply)
        return replies


def record_bytes(message: Message) -> int:
    return sum(record.count_bytes() for record in message.content.values())


def initial() -> ArrayRecord:
    return ArrayRecord({"w": Array(np.ones(3)), "b": Array(np.full(1, 0.5))})


def run(grid, name: str, noise: float = NOISE):
    # Flower draws its noise from numpy's global generator.
    np.random.seed(SEED)  # noqa: NPY002
    return build(name, noise).start(
        grid, initial(), ROUNDS, TIMEOUT_S, train_config=ConfigRecord({"lr": 0.1})
    )


def flat(arrays: ArrayRecord) -> np.ndarray:
    assert list(arrays) == ["w", "b"]
    return np.concatenate(arrays.to_numpy_ndarrays())


def move(arrays: ArrayRecord) -> float:
    return float(np.linalg.norm(flat(arrays) - flat(initial())))


@pytest.fixture(scope="module")
def links():
    satellites = constellation("delta-4", START)
    return SatelliteLinks(find_passes(satellites, SITES, START, HOURS, MASK_DEG), satellites)


def test_no_strategy_is_forgotten():
    assert set(NAMES) | NO_STRATEGY | SPECIAL_CLIENT == set(flower.__all__)


@pytest.mark.parametrize("name", NAMES)
def test_runs_over_satellites(name, links):
    local = CountingGrid(app_for(name), NODES)
    grid = SimulatedGrid(local, links, poll_s=0.0)
    result = run(grid, name)

    assert np.isfinite(flat(result.arrays)).all() and move(result.arrays) > 1e-3
    every_round = list(range(1, ROUNDS + 1))
    assert list(result.train_metrics_clientapp) == every_round
    assert list(result.evaluate_metrics_clientapp) == every_round

    # Every node takes part, so no round is over before the last site's first pass.
    assert grid.now > max(links.windows(site)[0][0] for site in range(len(SITES))) > 60.0
    assert grid.ledger.updates == NODES * ROUNDS and not grid.ledger.events
    orders = [m for m in local.executed if m.metadata.message_type != ROLL_CALL_TYPE]
    assert len(orders) == 2 * NODES * ROUNDS
    assert grid.ledger.total("uplink") == local.reply_bytes > 0
    assert grid.ledger.total("downlink") == sum(record_bytes(m) for m in orders)


@pytest.mark.parametrize("name", NAMES)
def test_same_as_on_the_plain_grid(name):
    expected = run(LocalGrid(app_for(name), NODES), name)
    grid = SimulatedGrid(LocalGrid(app_for(name), NODES), FixedLinks(), poll_s=0.0)
    result = run(grid, name)
    tolerance = EXACT if name in ("FedMedian", "Krum") else SUMMATION
    assert move(expected.arrays) > 1e-3
    assert np.abs(flat(result.arrays) - flat(expected.arrays)).max() <= tolerance
    assert grid.now == 0.0


@pytest.mark.parametrize("name", [name for name in WRAPPERS if "Fixed" in name])
def test_clipping_reaches_the_nodes(name, links):
    # Without noise, a round moves the mean of the nodes' models by no more than the norm.
    grid = SimulatedGrid(LocalGrid(app_for(name), NODES), links, poll_s=0.0)
    clipped = move(run(grid, name, noise=0.0).arrays)
    assert 0.5 * CLIP < clipped <= ROUNDS * CLIP + SUMMATION
    free = move(run(LocalGrid(app_for("FedAvg"), NODES), "FedAvg").arrays)
    assert free > 5 * ROUNDS * CLIP
