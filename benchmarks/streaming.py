"""Peak memory of a server that averages twenty large replies, against the size of one.

A fresh process runs one round of StreamingFedAvg with 20 nodes and a model of 64 equal tensors. The
Grid is this file's own: like a deployed ServerApp's it makes a reply only when it is fetched, and
keeps nothing. Memory is the peak resident size of the process, imports included; the caller does
not keep the model it starts from. `ratio` is the peak over the bytes of one reply, to be below
`bar`; `ratio_above_imports` leaves out what the process had after a round with a tiny model. The
mean is checked against its closed form. FedAvg's need for the same job is computed,
`fedavg_computed`: the old model, all replies, and the mean; `fedavg` is measured with smaller
replies. Prints one JSON line.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterable

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.task_identity import TaskIdentity

from flwr_moe.network import ROLL_CALL_TYPE
from flwr_moe.network.clock import WrappedGrid
from flwr_moe.strategies.streaming import StreamingFedAvg

BAR = 3.0
NODES, TENSORS = 20, 64
REPLY_MB, FEDAVG_MB = 500, 100


def peak_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def state(megabytes: float, value: float) -> ArrayRecord:
    """Tensors of one size that rise from ``value`` by 1 and start anew every 256 numbers."""
    numbers = int(megabytes * 1e6 / 4 / TENSORS)
    pattern = (np.arange(256) / 256 + value).astype(np.float32)
    return ArrayRecord({f"layer-{i}": Array(np.resize(pattern, numbers)) for i in range(TENSORS)})


class LazyGrid(WrappedGrid):
    """Node p answers with the state that starts at p, when it is asked for."""

    def __init__(self, megabytes: float) -> None:
        super().__init__(self)
        self.megabytes = megabytes
        self.open: dict[str, Message] = {}

    def get_node_ids(self) -> list[int]:
        """Nodes with their numbers as ids."""
        return list(range(1, NODES + 1))

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Note who is asked, and forget what was sent."""
        ids = []
        for message in messages:
            node_id = message.metadata.dst_node_id
            slim = Message(RecordDict(), node_id, message.metadata.message_type)
            message_id = f"{node_id}-{message.metadata.message_type}"
            slim.metadata.__dict__["_message_id"] = message_id
            self.open[message_id] = slim
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Make the replies that are fetched."""
        return [self._reply(self.open.pop(i)) for i in message_ids if i in self.open]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Fetch all replies at once."""
        return self.pull_messages(self.push_messages(messages))

    def _reply(self, order: Message) -> Message:
        partition = order.metadata.dst_node_id - 1
        if order.metadata.message_type == ROLL_CALL_TYPE:
            node = ConfigRecord({"partition-id": partition})
            return Message(RecordDict({"node": node}), reply_to=order)
        content = RecordDict({"arrays": state(self.megabytes, partition)})
        content["metrics"] = MetricRecord({"num-examples": partition + 1})
        return Message(content, reply_to=order)


def one_round(grid: Grid, strategy_class: type[FedAvg], megabytes: float) -> None:
    strategy = strategy_class(
        min_train_nodes=NODES, min_available_nodes=NODES, fraction_evaluate=0.0
    )
    result = strategy.start(grid, state(megabytes, 0.0), num_rounds=1, timeout=1e6)
    weights = np.arange(1, NODES + 1)
    expected = np.arange(256) / 256 + np.average(weights - 1, weights=weights)
    for array in result.arrays.values():
        if np.abs(array.numpy()[:256] - expected).max() > 1e-5:
            raise RuntimeError("the mean is wrong")


def measure(name: str, megabytes: float) -> dict[str, float]:
    TaskIdentity.task_id, TaskIdentity.run_id = 1, 1
    TaskIdentity.node_id = SUPERLINK_NODE_ID
    strategy_class = StreamingFedAvg if name == "streaming" else FedAvg
    one_round(LazyGrid(0.1), strategy_class, 0.1)
    imports = peak_bytes()
    began = time.perf_counter()
    one_round(LazyGrid(megabytes), strategy_class, megabytes)
    reply = sum(len(array.data) for array in state(megabytes, 0).values())
    return {
        "ratio": round(peak_bytes() / reply, 3),
        "ratio_above_imports": round((peak_bytes() - imports) / reply, 3),
        "reply_mb": round(reply / 1e6, 1),
        "imports_mb": round(imports / 1e6, 1),
        "seconds": round(time.perf_counter() - began, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streaming-mb", type=float, default=REPLY_MB, help="one reply's size")
    parser.add_argument("--fedavg-mb", type=float, default=FEDAVG_MB, help="the same, for FedAvg")
    parser.add_argument("--only", choices=["streaming", "fedavg"], help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    sizes = {"streaming": chosen.streaming_mb, "fedavg": chosen.fedavg_mb}
    if chosen.only:
        print(json.dumps(measure(chosen.only, sizes[chosen.only])))
        return
    results = {}
    for name, megabytes in sizes.items():
        command = [sys.executable, __file__, "--only", name, f"--{name}-mb", str(megabytes)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        results[name] = json.loads(done.stdout.splitlines()[-1])
    ratio = results["streaming"]["ratio"]
    summary = {
        "benchmark": "streaming",
        "ratio": ratio,
        "bar": BAR,
        "passed": ratio < BAR,
        "nodes": NODES,
        **{k: v for k, v in results["streaming"].items() if k != "ratio"},
        "fedavg_computed": NODES + 2.0,
        "fedavg": results["fedavg"],
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
