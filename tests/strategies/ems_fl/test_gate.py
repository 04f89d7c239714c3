"""EMS-FL's gates, with devices that really learn a tiny task."""

import numpy as np
import pytest
from flwr.app import ArrayRecord

from flwr_moe.client_apps import build_client_app
from flwr_moe.experts import ExpertLayout
from flwr_moe.network import SimulatedGrid
from flwr_moe.strategies import EMSFL
from flwr_moe.strategies.ems_fl.gate import NOBODYS_BIAS
from tests.local_grid import LocalGrid
from tests.strategies.devices import PassLinks, TinyTask, numpy_state, until_contact

GATE = ("moe.gate.weight", "moe.gate.bias")
RANDOM_FEATURES = {"gate": "random-features", "num_inputs": 2, "num_features": 64, "gamma": 0.05}


class Scene:
    """A tiny task, its devices on a Grid, and EMS-FL over passes."""

    def __init__(self, clients, clusters, experts, periods, **options):
        self.task = TinyTask(clients, clusters, experts)
        self.layout = ExpertLayout.of(self.task.build_model())
        self.strategy = EMSFL(self.layout, **options)
        app = build_client_app(lambda context: self.task, lambda context: 1.0)
        self.local = LocalGrid(app, clients)
        links = periods if isinstance(periods, PassLinks) else PassLinks.every(*periods)
        self.links = links
        self.initial = numpy_state(ArrayRecord(self.task.warm_model().state_dict()))
        self.seen = []
        self.bias_E = {}

    def run(self, horizon_s, num_rounds=1000):
        self.grid = SimulatedGrid(self.local, self.links, horizon_s=horizon_s, poll_s=0.0)

        def evaluate(server_round, arrays):
            known = [c.site for c in self.strategy.routed_clusters]
            self.seen.append((self.grid.now, server_round, known))
            self.bias_E[self.grid.now] = arrays["moe.gate.bias"].numpy()

        self.result = self.strategy.start(
            self.grid,
            ArrayRecord(self.task.warm_model().state_dict()),
            num_rounds,
            train_config=until_contact(**{"max-local-steps": 20}),
            evaluate_fn=evaluate,
        )
        self.state = numpy_state(self.result.arrays)
        return self

    def hits(self):
        """How often the posterior finds the cluster a sample comes from."""
        posterior = [self.strategy.router.posterior(t.x) for t in self.task.test_data()]
        return [(p.argmax(1) == k).mean() for k, p in enumerate(posterior)]

    def messages(self, partition, kind):
        node = self.local.node_id(partition)
        mine = [m for m in self.local.executed if m.metadata.dst_node_id == node]
        return [m for m in mine if m.metadata.message_type == kind]


def test_devices_statistics_make_a_router_that_finds_their_cluster():
    scene = Scene(6, 3, 6, (100, 90, 80), **RANDOM_FEATURES).run(250.0)
    # The clusters' centres are 8 and 6.4 standard deviations apart.
    assert min(scene.hits()) > 0.95
    posterior = scene.strategy.router.posterior(scene.task.test_data()[0].x)
    assert posterior.shape == (100, 3) and np.allclose(posterior.sum(1), 1)
    # The gate is that of the start, and only experts have changed.
    changed = {k for k in scene.state if not np.array_equal(scene.state[k], scene.initial[k])}
    assert changed == {f"moe.experts.{p}" for p in ("w1", "b1", "w2", "b2")}
    assert not scene.grid.ledger.events


def test_a_late_cluster_is_fitted_without_and_then_with():
    early = [(float(t), t + 1.0) for t in range(0, 1000, 50)]
    late = [(t, e) for t, e in early if t >= 500]
    scene = Scene(4, 2, 4, PassLinks([early, late]), report_patience_s=120.0, **RANDOM_FEATURES)
    scene.run(700.0)
    at = {now: known for now, _, known in scene.seen}
    assert at[100.0] == [] and at[150.0] == [0]  # the first event after the patience
    assert at[450.0] == [0] and at[550.0] == [0, 1]
    assert min(scene.hits()) > 0.95
    owned = [set(c.experts[0]) for c in scene.strategy.clusters]
    assert [len(o) for o in owned] == [2, 2] and not owned[0] & owned[1]


def test_fitted_rows_reach_the_devices_and_send_clusters_to_their_experts():
    scene = Scene(4, 2, 4, (100, 80), gate="linear").run(350.0)
    assert scene.strategy.router is None
    assert not any(np.array_equal(scene.state[k], scene.initial[k]) for k in GATE)
    for partition in range(4):
        orders = scene.messages(partition, "train.experts")
        shared = [set(m.content.array_records.get("shared", {})) for m in orders]
        # Fitted at 100 s, when all had reported; the shared rest had come with the question.
        assert sum(map(bool, shared)) == 1
        first = next(m for m in orders if "shared" in m.content.array_records)
        assert set(first.content["shared"]) == set(GATE)
        assert all(np.array_equal(first.content["shared"][k].numpy(), scene.state[k]) for k in GATE)
    model = scene.task.build_model()
    model.load_state_dict(scene.result.arrays.to_torch_state_dict())
    for cluster, test in zip(scene.strategy.clusters, scene.task.test_data(), strict=True):
        h = model.stem(test.x).relu()
        mass = model.moe.gate(h).softmax(-1)[:, cluster.experts[0]].sum(1).mean()
        assert mass > 0.9


def test_linear_gate_of_a_cluster_that_is_not_there_yet():
    early = [(float(t), t + 1.0) for t in range(0, 1000, 50)]
    late = [(t, e) for t, e in early if t >= 500]
    scene = Scene(4, 2, 4, PassLinks([late, early]), gate="linear", report_patience_s=60.0)
    scene.run(650.0)
    owned = [c.experts[0] for c in scene.strategy.clusters]
    # Fitted for cluster 1 alone: the experts of nobody get no probability, all rows are there.
    assert scene.bias_E[100.0].shape == (4,)
    assert (scene.bias_E[100.0][owned[0]] == NOBODYS_BIAS).all()
    assert (scene.bias_E[100.0][owned[1]] > NOBODYS_BIAS).all()
    assert (scene.bias_E[600.0] > NOBODYS_BIAS).all()
    assert all(c.uploads_s for c in scene.strategy.clusters)


def test_plain_gate_is_never_touched_and_asks_for_no_statistics():
    scene = Scene(4, 2, 4, (100, 80), gate="plain").run(350.0)
    assert scene.strategy.router is None
    assert all(np.array_equal(scene.state[k], scene.initial[k]) for k in GATE)
    (question,) = scene.messages(0, "query.gate_statistics")
    assert "num-features" not in question.content["config"]
    assert all(c.report.statistics is None for c in scene.strategy.clusters)
    assert [c.site for c in scene.strategy.routed_clusters] == [0, 1]


def test_linear_gate_and_trained_shared_layers_together():
    # The orders bring gate rows that the answers do not hold.
    scene = Scene(4, 2, 4, (100, 80), gate="linear", train_shared=True).run(350.0)
    assert not scene.grid.ledger.events
    assert [len(c.uploads_s) for c in scene.strategy.clusters] == [2, 3]
    assert not np.array_equal(scene.state["head.weight"], scene.initial["head.weight"])


def test_a_gate_that_cannot_be_fitted_does_not_end_the_run(caplog):
    # Six experts for a cluster, and two classes to tell them apart by.
    scene = Scene(4, 2, 12, (100, 80), gate="linear").run(350.0)
    assert "the gate stays as it is: 6 experts to share 2 groups" in caplog.text
    assert caplog.text.count("the gate stays") == 1
    assert all(np.array_equal(scene.state[k], scene.initial[k]) for k in GATE)
    assert [len(c.uploads_s) for c in scene.strategy.clusters] == [2, 3]
    assert scene.strategy.routed_clusters == []


def without_statistics(record):
    for key in ("count", "mean", "scatter", "scale"):
        del record[key]


def of_other_features(record):
    statistics_of_three = {"mean": (2, 3), "scatter": (6,)}
    for key, shape in statistics_of_three.items():
        record[key] = type(record[key])(np.ones(shape, np.float32))


@pytest.mark.parametrize("trouble", [without_statistics, of_other_features])
@pytest.mark.parametrize("options", [RANDOM_FEATURES, {"gate": "linear"}])
def test_statistics_that_do_not_fit_are_rejected(trouble, options):
    scene = Scene(4, 2, 4, (100, 80), **options)
    inner = scene.local.app

    def app(message, context):
        reply = inner(message, context)
        if context.node_config["partition-id"] == 2 and "gate" in reply.content:
            trouble(reply.content["gate"])
        return reply

    scene.local.app = app
    scene.run(250.0)
    assert scene.grid.ledger.events == {"rejected": 1}
    assert [c.site for c in scene.strategy.routed_clusters] == [0, 1]


def test_two_runs_with_learning_devices_are_equal():
    def once(order):
        scene = Scene(5, 2, 4, (100, 70), train_shared=True, **RANDOM_FEATURES)
        app = build_client_app(lambda context: scene.task, lambda context: 1.0)
        scene.local = LocalGrid(app, 5, finish_order=order)
        return scene.run(300.0)

    one, other = once(None), once([2, 0, 1])
    assert one.seen == other.seen and one.grid.ledger == other.grid.ledger
    assert all(np.array_equal(one.state[k], other.state[k]) for k in one.state)
    routers = [s.strategy.router.arrays() for s in (one, other)]
    assert all(np.array_equal(routers[0][k], routers[1][k]) for k in routers[0])


def test_training_helps():
    scene = Scene(4, 2, 4, (100, 100), **RANDOM_FEATURES).run(1500.0)
    losses = scene.result.train_metrics_clientapp
    for site in (0, 1):
        own = [m["train-loss"] for m in losses.values() if m["cluster"] == site]
        assert own[-1] < 0.7 * own[0]
