"""Workers whose updates and speeds are known by hand, for the asynchronous strategies."""

import math
from collections import Counter

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from flwr_moe.network import FixedLinks, SimulatedGrid, answer_roll_call
from tests.local_grid import LocalGrid

TEN_STEPS = ConfigRecord({"local-steps": 10})


class Workers:
    """Node p adds p + 1 to the model it gets; node p's evaluation is the model plus p."""

    def __init__(self):
        self.trouble = {}  # by partition: what replaces its reply's arrays, or an exception
        self.trained, self.evaluated = Counter(), Counter()
        self.rounds = []

    def app(self):
        app = ClientApp()

        @app.train()
        def train(message, context):
            partition = context.node_config["partition-id"]
            self.trained[partition] += 1
            self.rounds.append(message.content["config"]["server-round"])
            x = message.content["arrays"]["x"].numpy() + partition + 1
            records = {"arrays": ArrayRecord({"x": Array(x)})}
            if partition in self.trouble:
                bad = self.trouble[partition]
                if isinstance(bad, Exception):
                    raise bad
                records = bad
            metrics = MetricRecord({"num-examples": 1, "steps": 10})
            return Message(RecordDict({**records, "metrics": metrics}), reply_to=message)

        @app.evaluate()
        def evaluate(message, context):
            partition = context.node_config["partition-id"]
            self.evaluated[partition] += 1
            value = float(message.content["arrays"]["x"].numpy()[0]) + partition
            metrics = {"num-examples": partition + 1, "value": value}
            if ("evaluate", partition) in self.trouble:
                metrics = self.trouble["evaluate", partition]
            return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)

        return answer_roll_call(app)


def local_grid(workers, speeds, **options):
    configs = {p: {"steps-per-second": speed} for p, speed in enumerate(speeds)}
    return LocalGrid(workers.app(), len(speeds), node_configs=configs, **options)


def run(strategy, grid, num_rounds=2, **options):
    """The global models in order of evaluation, and the result."""
    seen = {}

    def evaluate(server_round, arrays):
        seen[server_round] = float(arrays["x"].numpy()[0])
        return MetricRecord({"x": seen[server_round]})

    start = ArrayRecord({"x": Array(np.zeros(1))})
    options.setdefault("train_config", TEN_STEPS)
    result = strategy.start(grid, start, num_rounds, evaluate_fn=evaluate, **options)
    assert {r: m["x"] for r, m in result.evaluate_metrics_serverapp.items()} == seen
    return seen, result


def simulated(workers, speeds, links=None, horizon_s=math.inf, **options):
    local = local_grid(workers, speeds, **options)
    return SimulatedGrid(local, links or FixedLinks(), horizon_s=horizon_s, poll_s=0.0)


# Nodes 0 and 1 take 10 s and 25 s: updates come at 10 (0), 20 (0), 25 (1) and 30 s (0).
SPEEDS = (1.0, 0.4)


def mixed(x, new, weight):
    return x + weight * (new - x)
