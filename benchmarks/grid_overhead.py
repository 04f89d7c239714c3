"""Time of a round of FedAvg on SimulatedGrid against the same round on Flower's own Grid.

For each number of nodes, one start of Flower's simulation engine runs all. A round is training and
evaluation of all nodes with a model of 1 MB, and the nodes only add to it and send it back: there
is no training that would hide what the Grid costs. One round of each warms up (workers start, the
roll call is made); then they take turns, in an order that is reversed every other time. Prints one
JSON line; `ratio` is the median round on SimulatedGrid over the median round on the plain Grid, to
be at most `bar`. The plain Grid of the engine looks for replies every 0.1 s and ours every 0.005 s,
which helps ours with few nodes: `ratio_same_polling` is against a plain Grid that looks as often.
`quartiles` are those of the rounds' times in seconds, `cpu_s` the median CPU seconds of the server
process in a round, engine included.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Iterable

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

import numpy as np
from flwr.app import Array, ArrayRecord, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from flwr_moe.engines.flower import simulate
from flwr_moe.network import FixedLinks, SimulatedGrid
from flwr_moe.network.clock import WrappedGrid

BAR = 1.1
LAYERS, WIDTH = 4, 250  # 4 x 250 x 250 numbers of 4 bytes are 1 MB
RATE_BPS, DELAY_S = 8e6, 0.05
POLL_S = 0.005


def echo_app() -> ClientApp:
    """Add one to every weight."""
    # Imported in here so that the app pickles by value, for workers that cannot import this file.
    from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict

    from flwr_moe.network import answer_roll_call

    app = ClientApp()

    @app.train()
    def train(message, context):
        old = message.content["arrays"]
        arrays = ArrayRecord({key: Array(array.numpy() + 1) for key, array in old.items()})
        metrics = MetricRecord({"num-examples": 1})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    @app.evaluate()
    def evaluate(message, context):
        return Message(RecordDict({"metrics": MetricRecord({"num-examples": 1})}), reply_to=message)

    return answer_roll_call(app)


class EagerGrid(WrappedGrid):
    """The plain Grid, asked for replies as often as SimulatedGrid asks."""

    def get_node_ids(self) -> Iterable[int]:
        """Nodes of the plain Grid."""
        return self.grid.get_node_ids()

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Wait as the plain Grid does, but for looking more often."""
        waiting = set(self.grid.push_messages(messages))
        replies: list[Message] = []
        while waiting:
            came = list(self.grid.pull_messages(waiting))
            replies += came
            waiting -= {reply.metadata.reply_to_message_id for reply in came}
            if waiting:
                time.sleep(POLL_S)
        return replies


def round_s(grid: Grid, num_nodes: int) -> tuple[float, float]:
    """Wall and CPU seconds of one round; it must have averaged the answers of all nodes."""
    model = {f"layer-{i}": Array(np.zeros((WIDTH, WIDTH), np.float32)) for i in range(LAYERS)}
    strategy = FedAvg(
        min_train_nodes=num_nodes, min_evaluate_nodes=num_nodes, min_available_nodes=num_nodes
    )
    start, cpu = time.perf_counter(), time.process_time()
    result = strategy.start(grid, ArrayRecord(model), num_rounds=1, timeout=1e6)
    seconds = time.perf_counter() - start, time.process_time() - cpu
    if not all(np.allclose(array.numpy(), 1) for array in result.arrays.values()):
        raise RuntimeError("the round did not average the nodes' models")
    return seconds


def measure(num_nodes: int, rounds: int) -> dict[str, object]:
    def main(plain: Grid) -> dict[str, object]:
        simulated = SimulatedGrid(plain, FixedLinks(RATE_BPS, DELAY_S), poll_s=POLL_S)
        grids = {"plain": plain, "eager": EagerGrid(plain), "simulated": simulated}
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in grids}
        for grid in grids.values():
            round_s(grid, num_nodes)
        for number in range(rounds):
            for name in list(grids)[:: -1 if number % 2 else 1]:
                times[name].append(round_s(grids[name], num_nodes))
        if simulated.ledger.updates != num_nodes * (rounds + 1) or simulated.ledger.events:
            raise RuntimeError(f"updates are missing: {simulated.ledger.events}")
        wall, cpu = (
            {name: statistics.median(pair[i] for pair in pairs) for name, pairs in times.items()}
            for i in (0, 1)
        )
        return {
            "ratio": round(wall["simulated"] / wall["plain"], 3),
            "ratio_same_polling": round(wall["simulated"] / wall["eager"], 3),
            "quartiles": {
                name: np.quantile([w for w, _ in pairs], [0.25, 0.5, 0.75]).round(4).tolist()
                for name, pairs in times.items()
            },
            "cpu_s": {name: round(seconds, 4) for name, seconds in cpu.items()},
        }

    return simulate(echo_app(), num_nodes, main)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--rounds", type=int, default=7)
    chosen = parser.parse_args()
    by_nodes = {str(nodes): measure(nodes, chosen.rounds) for nodes in chosen.nodes}
    worst = max(result["ratio"] for result in by_nodes.values())
    summary = {
        "benchmark": "grid_overhead",
        "ratio": worst,
        "bar": BAR,
        "passed": worst <= BAR,
        "model_mb": LAYERS * WIDTH * WIDTH * 4 / 1e6,
        "rounds": chosen.rounds,
        "nodes": by_nodes,
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
