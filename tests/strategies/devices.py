"""Links, devices and a task that are small enough to be followed by hand."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from flwr_moe.client_apps.ems_fl.training import remember_shared
from flwr_moe.experts import ExpertLayout
from flwr_moe.messages.ems_fl import TRAINED_SHARED, ExpertOrder
from flwr_moe.network import NodeProfile, SimulatedGrid, answer_roll_call
from flwr_moe.strategies import EMSFL
from flwr_moe.tasks.models import MoEClassifier
from flwr_moe.training import Samples
from tests.local_grid import LocalGrid

SPEED = 1.0
"""Steps a second of every device, unless a test says otherwise."""


class PassLinks:
    """Every site has its own windows; what is sent within one takes no time."""

    def __init__(self, windows: Sequence[Sequence[tuple[float, float]]]) -> None:
        self.windows = windows

    @classmethod
    def every(cls, *periods: float, until: float = 10_000.0) -> PassLinks:
        """Site k sees a satellite for a second every ``periods[k]`` seconds, first at 0."""
        return cls([[(t, t + 1.0) for t in np.arange(0.0, until, p).tolist()] for p in periods])

    def transfer(self, node: NodeProfile, direction: str, n_bytes: int, start_s: float) -> float:
        open_now = (max(a, start_s) for a, b in self.windows[node.site] if b > start_s)
        return next(open_now, math.inf)

    def next_contact(self, node: NodeProfile, direction: str, after_s: float) -> float:
        return next((a for a, _ in self.windows[node.site] if a > after_s), math.inf)


class TinyTask:
    """Two inputs, two classes; cluster k's data lie around a centre of its own."""

    num_classes = 2
    centres = ((4.0, 0.0), (-4.0, 0.0), (0.0, 5.0), (0.0, -5.0))

    def __init__(self, num_clients: int, num_clusters: int, num_experts: int) -> None:
        self.num_clients, self.num_clusters = num_clients, num_clusters
        self.num_experts = num_experts

    def cluster_of(self, partition_id: int) -> int:
        return partition_id % self.num_clusters

    def draw(self, cluster: int, size: int, seed: int) -> Samples:
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(size, 2, generator=generator)
        return Samples(noise + torch.tensor(self.centres[cluster]), (noise[:, 1] > 0).long())

    def train_data(self, partition_id: int) -> Samples:
        return self.draw(self.cluster_of(partition_id), 30 + 10 * partition_id, partition_id)

    def public_data(self) -> Samples:
        parts = self.test_data()
        return Samples(torch.cat([p.x for p in parts]), torch.cat([p.y for p in parts]))

    def test_data(self) -> list[Samples]:
        return [self.draw(k, 100, 1000 + k) for k in range(self.num_clusters)]

    def build_model(self) -> MoEClassifier:
        return MoEClassifier(2, 2, 4, 5, self.num_experts, 2)

    def warm_model(self) -> MoEClassifier:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            return self.build_model()


class Devices:
    """Devices that take part in EMS-FL without learning: what comes back is known by hand.

    Device p adds p + 1 to each of its expert tensors, and half of that to the shared layers.

    Parameters
    ----------
    sites : sequence of int
        Site of every device.
    affinity : sequence of sequence of float
        Per site the affinity to every expert; alike by default.
    speeds : mapping of int to float
        Steps a second of the devices that differ from the others.

    Attributes
    ----------
    trouble : dict of int to callable
        Per device, what it does to its reply: ``(content) -> None``, or raises.
    asked : Counter
        Messages by (device, ``"query"`` or ``"train"``).
    """

    def __init__(
        self,
        sites: Sequence[int],
        num_experts: int,
        affinity: Sequence[Sequence[float]] | None = None,
        speeds: Mapping[int, float] | None = None,
    ) -> None:
        self.sites = list(sites)
        self.task = TinyTask(len(sites), max(sites) + 1, num_experts)
        self.layout = ExpertLayout.of(self.task.build_model())
        self.affinity = affinity or [[1.0] * num_experts] * (max(sites) + 1)
        self.speeds = dict(speeds or {})
        self.trouble: dict[int, Callable[[RecordDict], None]] = {}
        self.asked: Counter[tuple[int, str]] = Counter()
        self.initial = ArrayRecord(self.task.warm_model().state_dict())

    def examples(self, partition: int) -> int:
        return 10 * (partition + 1)

    def app(self) -> ClientApp:
        app = ClientApp()

        @app.query("gate_statistics")
        def gate_statistics(message: Message, context: Context) -> Message:
            remember_shared(message, context)
            affinity = 10.0 * np.array([self.affinity[context.node_config["site"]]])
            arrays = {"affinity": Array(affinity), "decisions": Array(np.array([10]))}
            return self._reply(message, context, {"gate": ArrayRecord(arrays)}, "query")

        @app.train("experts")
        def train(message: Message, context: Context) -> Message:
            shared = remember_shared(message, context)
            config = message.content["config"]
            part = message.content["experts"]
            own = self.layout.select(ExpertOrder.from_record(config).experts)
            assert {key.rsplit(".", 1)[0] for key in part} == {
                f"layer.{i}.expert.{e}" for i, ids in enumerate(own) for e in ids
            }
            step = context.node_config["partition-id"] + 1
            records = {
                "experts": ArrayRecord({k: Array(a.numpy() + step) for k, a in part.items()})
            }
            if config["train-shared"]:
                gates = self.layout.gate_rows[0]
                records[TRAINED_SHARED] = ArrayRecord(
                    {
                        k: Array(a.numpy() + np.float32(step / 2))
                        for k, a in shared.items()
                        if k not in gates
                    }
                )
            return self._reply(message, context, records, "train")

        return answer_roll_call(app)

    def _reply(
        self, message: Message, context: Context, records: dict[str, ArrayRecord], kind: str
    ) -> Message:
        partition = context.node_config["partition-id"]
        self.asked[partition, kind] += 1
        steps = message.content["config"].get("step-budget", 0)
        metrics = {
            "num-examples": self.examples(partition),
            "train-loss": float(partition),
            "steps": steps,
        }
        content = RecordDict({**records, "metrics": MetricRecord(metrics)})
        if partition in self.trouble:
            self.trouble[partition](content)
        return Message(content, reply_to=message)

    def local_grid(self, **options: object) -> LocalGrid:
        configs = {
            p: {"site": s, "steps-per-second": self.speeds.get(p, SPEED)}
            for p, s in enumerate(self.sites)
        }
        return LocalGrid(self.app(), len(self.sites), node_configs=configs, **options)


def broken(_: RecordDict) -> None:
    raise RuntimeError("battery empty")


def until_contact(**more: float | int) -> ConfigRecord:
    """Training orders for as many steps as fit before the next contact."""
    config = {"seed": 0, "learning-rate": 0.05, "batch-size": 8}
    return ConfigRecord({**config, "local-steps": 0, "max-local-steps": 500, **more})


def simulate(local: LocalGrid, links: object, horizon_s: float = math.inf) -> SimulatedGrid:
    return SimulatedGrid(local, links, horizon_s=horizon_s, poll_s=0.0)  # type: ignore[arg-type]


def numpy_state(record: ArrayRecord) -> dict[str, np.ndarray]:
    return {key: array.numpy() for key, array in record.items()}


SINGLE = 1e-5
"""Rounding in single precision."""

PREFER_OWN = [[0.5, 0.3, 0.1, 0.1], [0.1, 0.1, 0.4, 0.4]]
"""Clusters 0 and 1 prefer experts 0, 1 and 2, 3."""


def plain(devices, **options):
    return EMSFL(devices.layout, gate="plain", **options)


def run(strategy, devices, links, horizon_s=math.inf, num_rounds=1000, local=None, config=None):
    """Everything that happened: the result, the Grid, and the model after every upload."""
    grid = simulate(local or devices.local_grid(), links, horizon_s)
    models = {}

    def evaluate(server_round, arrays):
        models[server_round] = (grid.now, numpy_state(arrays))

    result = strategy.start(
        grid,
        devices.initial,
        num_rounds,
        train_config=config or until_contact(),
        evaluate_fn=evaluate,
    )
    return result, grid, models


def parts(devices, state):
    """Experts' tensors as one row of numbers per expert."""
    taken = [devices.layout.take(state, [e]) for e in range(devices.layout.layers[0])]
    return np.stack([np.concatenate([t.ravel() for t in part.values()]) for part in taken])


def shared_of(devices, state):
    return devices.layout.shared(state)


def same(one, other):
    return set(one) == set(other) and all(np.array_equal(one[k], other[k]) for k in one)
