"""Time of a step of split training over the tensor exchange, and of the client's part of it.

Three measurements, printed as one JSON line:

`ratio`: a step of VGG-19 whose server half is in another process, reached over the loopback
exchange, over the same step of the whole model in one process, both on one thread; to be at most
`bar`. Steps take turns. `exchange_s` is a round trip of the same bytes without any work.

`times_faster_than_messages`: the same bytes there and back as one Flower message a batch in
Flower's simulation engine (`message_s`), over `exchange_s`; `step_times_faster` compares whole
steps.

`client_ratio`: the client's wall time of a step of FedSL over that of SplitFed, by prune rate, with
waiting for the server taken off; a small VGG with batch norm, 8 bits and dropout at the cut as in
README's run, to be at most `client_bar`. `client_ratio_pruning_only` is without codecs.
"""

import argparse
import copy
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from multiprocessing.connection import Connection

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from torch import Tensor, nn
from torch.nn import functional

from flwr_moe.client_apps.split.link import CutLink
from flwr_moe.engines.flower import simulate
from flwr_moe.exchange import ExchangeClient, ExchangeServer, TensorStore
from flwr_moe.split.codecs import CodecKey, cut_codecs
from flwr_moe.split.cut import split_model
from flwr_moe.split.protocol import HANDLER, agreement
from flwr_moe.split.prune import choose_kept, shrink
from flwr_moe.split.prune_groups import find_groups
from flwr_moe.split.session import SplitSession
from flwr_moe.split.step import adam, quick_layout
from flwr_moe.tasks.vgg import VGG

BAR, CLIENT_BAR = 1.25, 0.7
RATES = (0.25, 0.4, 0.5)
TOKEN = "benchmark"
STEPS_OF_A_ROUND = 10_000


def session_of(model: nn.Module, at: str, codec: dict[str, object] | None = None) -> SplitSession:
    split = split_model(copy.deepcopy(model), at)
    codecs = cut_codecs(**(codec or {}))
    groups = find_groups(split.client, prune_output=True)
    session = SplitSession(
        split.server,
        codecs,
        agreement(model.state_dict(), at, codecs),
        output=next((group for group in groups if group.output_dim is not None), None),
    )
    session.begin_round(1, STEPS_OF_A_ROUND, [0], 0.001)
    return session


def serve(told: Connection, name: str, at: str) -> None:
    """Be the server's process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    handlers = {
        HANDLER: session_of(VGG(name), at).handle,
        "echo": lambda tensors, metadata: ({"a": tensors["a"]}, {}),
    }
    with closing(TensorStore()) as store, ExchangeServer(store, TOKEN, handlers) as server:
        told.send(server.url)
        told.recv()


class InProcess:
    """An exchange without a network: calls the session, and tells how long it took."""

    def __init__(self, session: SplitSession) -> None:
        self._session, self.waited_s = session, 0.0

    def call(
        self, handler: str, tensors: dict[str, Tensor], metadata: dict[str, str]
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Run the session's handler."""
        began = time.perf_counter()
        answer = self._session.handle(tensors, metadata)
        self.waited_s += time.perf_counter() - began
        return answer


def client_step(half: nn.Module, link: CutLink, x: Tensor, y: Tensor) -> Callable[[], None]:
    """Return a step of the client half."""
    quick_layout(half).train()
    optimiser = adam(half, 0.001)

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        activation, *context = half(x)
        gradient, _ = link.send(activation.detach(), context, y)
        activation.backward(gradient)
        optimiser.step()

    return step


def busy_s(step: Callable[[], None], exchange: InProcess) -> float:
    """Run a step, and return the seconds that the client itself was busy."""
    waited = exchange.waited_s
    return seconds(step) - (exchange.waited_s - waited)


def link_to(
    exchange: ExchangeClient | InProcess,
    model: nn.Module,
    at: str,
    codec: dict[str, object] | None = None,
    kept: tuple[int, ...] | None = None,
) -> CutLink:
    codecs = cut_codecs(**(codec or {}))
    agreed = agreement(model.state_dict(), at, codecs)
    return CutLink(exchange, codecs, CodecKey(0, 1, 0, 0, "activation"), agreed, 1, kept)  # type: ignore[arg-type]


def seconds(step: Callable[[], object]) -> float:
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def message_s(activation: Tensor, messages: int) -> float:
    """Seconds that the engine takes for a gradient down and an activation up."""
    data = activation.numpy()

    def app() -> ClientApp:
        # Imported in here so that the app pickles by value.
        from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict

        made = ClientApp()

        @made.train()
        def train(message, context):
            arrays = ArrayRecord(dict(message.content["arrays"].items()))
            content = {"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})}
            return Message(RecordDict(content), reply_to=message)

        return made

    def main(grid: Grid) -> float:
        while not list(grid.get_node_ids()):
            time.sleep(0.1)
        node = next(iter(grid.get_node_ids()))
        times = []
        for _ in range(messages + 1):
            content = RecordDict(
                {"arrays": ArrayRecord({"a": Array(data)}), "config": ConfigRecord({"a": 1})}
            )
            message = Message(content, node, "train")
            times.append(seconds(lambda message=message: list(grid.send_and_receive([message]))))
        return statistics.median(times[1:])

    result: float = simulate(app(), 1, main)
    return result


def measure_step(name: str, at: str, batch: int, steps: int) -> dict[str, float]:
    torch.manual_seed(0)
    model = VGG(name)
    x, y = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,), dtype=torch.uint8)
    whole = quick_layout(copy.deepcopy(model)).train()
    optimiser = adam(whole, 0.001)

    def whole_step() -> None:
        optimiser.zero_grad(set_to_none=True)
        functional.cross_entropy(whole(x), y.long()).backward()
        optimiser.step()

    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, name, at))
    process.start()
    try:
        exchange = ExchangeClient(mine.recv(), TOKEN, timeout_s=600)
        split = split_model(copy.deepcopy(model), at)
        step = client_step(split.client, link_to(exchange, model, at), x, y)
        activation = split.client(x)[0].detach()
        turns = {
            "one_process_s": whole_step,
            "split_s": step,
            "exchange_s": lambda: exchange.call("echo", {"a": activation}),
        }
        times: dict[str, list[float]] = {key: [] for key in turns}
        for number in range(steps + 2):  # two warm up
            for key in list(turns)[:: -1 if number % 2 else 1]:
                times[key].append(seconds(turns[key]))
        mine.send("stop")
    finally:
        process.join(30)
        process.kill()
    found = {key: statistics.median(values[2:]) for key, values in times.items()}
    return {**found, "message_s": message_s(activation, 5), "bytes": activation.nbytes}


def measure_client(
    at: str, batch: int, steps: int, width: float, dropout: float
) -> dict[str, dict[str, float]]:
    torch.manual_seed(0)
    model = VGG("vgg-small", width=width, norm="batch")
    x, y = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,), dtype=torch.uint8)
    light: dict[str, object] = {"bits": 8, "dropout": dropout}
    runs = {
        "splitfed": (0.0, {}),
        **{f"prune {rate}": (rate, {}) for rate in RATES},
        **{f"fedsl {rate}": (rate, light) for rate in (0.0, *RATES)},
    }
    turns = {}
    for key, (rate, codec) in runs.items():
        half, units = split_model(copy.deepcopy(model), at).client, None
        if rate:
            kept = choose_kept(half, rate, prune_output=True)
            half = shrink(half, kept)
            units = kept.indices[kept.output.name] if kept.output else None
        exchange = InProcess(session_of(model, at, codec))
        step = client_step(half, link_to(exchange, model, at, codec, units), x, y)
        turns[key] = partial(busy_s, step, exchange)
    times: dict[str, list[float]] = {key: [] for key in turns}
    for number in range(steps + 2):
        for key in list(turns)[:: -1 if number % 2 else 1]:
            times[key].append(turns[key]())
    busy = {key: statistics.median(values[2:]) for key, values in times.items()}
    plain = busy["splitfed"]
    return {
        "client_s": {key: round(value, 4) for key, value in busy.items()},
        "client_ratio": {
            str(rate): round(busy[f"fedsl {rate}"] / plain, 3) for rate in (0.0, *RATES)
        },
        "client_ratio_pruning_only": {
            str(rate): round(busy[f"prune {rate}"] / plain, 3) for rate in RATES
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vgg19")
    parser.add_argument("--at", default="features.1")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--width", type=float, default=1.0, help="of the client's small VGG")
    parser.add_argument("--client-batch-size", type=int, default=32)
    parser.add_argument("--dropout", type=float, default=0.46, help="at the client's cut")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    client = measure_client(
        chosen.at, chosen.client_batch_size, 10 * chosen.steps, chosen.width, chosen.dropout
    )
    found = measure_step(chosen.model, chosen.at, chosen.batch_size, chosen.steps)
    ratio = found["split_s"] / found["one_process_s"]
    summary = {
        "benchmark": "split",
        "ratio": round(ratio, 3),
        "bar": BAR,
        "passed": ratio <= BAR,
        "times_faster_than_messages": round(found["message_s"] / found["exchange_s"], 1),
        "step_times_faster": round(
            (found["one_process_s"] + found["message_s"]) / found["split_s"], 2
        ),
        **{key: round(value, 4) for key, value in found.items()},
        "model": chosen.model,
        "at": chosen.at,
        "batch_size": chosen.batch_size,
        "client_bar": CLIENT_BAR,
        "client": f"vgg-small at width {chosen.width:g}, batch {chosen.client_batch_size}",
        **client,
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
