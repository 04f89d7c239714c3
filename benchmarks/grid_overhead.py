"""Wall time of a round of FedAvg on SimulatedGrid against the same round on Flower's own Grid.

For each number of nodes, one start of Flower's simulation engine runs both. A round is training and
evaluation of all nodes with a model of 1 MB, and the nodes only add to it and send it back: there
is no training that would hide what the Grid costs. One round of each warms up (workers start, the
roll call is made); then they alternate, each going first every other time. Prints one JSON line;
`ratio` is the median round on SimulatedGrid over the median round on the plain Grid, to be at most
`bar`; `quartiles` are those of the rounds' times in seconds. The plain Grid of the engine looks for
replies every 0.1 s and ours every 0.005 s, so a ratio below 1 is possible with few nodes.
"""

import argparse
import json
import os
import statistics
import time

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from flwr_moe.app.engine import simulate
from flwr_moe.network import FixedLinks, SimulatedGrid

BAR = 1.1
LAYERS, WIDTH = 4, 250  # 4 x 250 x 250 numbers of 4 bytes are 1 MB
RATE_BPS, DELAY_S = 8e6, 0.05


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


def round_s(grid: Grid, num_nodes: int) -> float:
    """Wall seconds of one round; it must have averaged the answers of all nodes."""
    model = {f"layer-{i}": Array(np.zeros((WIDTH, WIDTH), np.float32)) for i in range(LAYERS)}
    strategy = FedAvg(
        min_train_nodes=num_nodes, min_evaluate_nodes=num_nodes, min_available_nodes=num_nodes
    )
    start = time.perf_counter()
    result = strategy.start(grid, ArrayRecord(model), num_rounds=1, timeout=1e6)
    seconds = time.perf_counter() - start
    if not all((array.numpy() == 1).all() for array in result.arrays.values()):
        raise RuntimeError("the round did not average the nodes' models")
    return seconds


def measure(num_nodes: int, rounds: int) -> dict[str, object]:
    def main(plain: Grid) -> dict[str, object]:
        simulated = SimulatedGrid(plain, FixedLinks(RATE_BPS, DELAY_S))
        grids = {"plain": plain, "simulated": simulated}
        times: dict[str, list[float]] = {name: [] for name in grids}
        for grid in grids.values():
            round_s(grid, num_nodes)
        for number in range(rounds):
            for name in sorted(grids, reverse=number % 2 == 1):
                times[name].append(round_s(grids[name], num_nodes))
        if simulated.ledger.updates != num_nodes * (rounds + 1) or simulated.ledger.events:
            raise RuntimeError(f"updates are missing: {simulated.ledger.events}")
        middle = {name: statistics.median(values) for name, values in times.items()}
        return {
            "ratio": round(middle["simulated"] / middle["plain"], 3),
            "quartiles": {
                name: [round(q, 4) for q in np.quantile(values, [0.25, 0.5, 0.75]).tolist()]
                for name, values in times.items()
            },
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
