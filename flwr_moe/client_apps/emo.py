"""Devices that send their tap layer's activations, and overlays that train on them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from contextlib import closing
from logging import WARNING
from pathlib import Path

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from flwr_moe.client_apps.node import (
    Access,
    ClientAppCallable,
    Mod,
    exchange_client,
    own_exchange,
    partition_of,
)
from flwr_moe.exchange import ExchangeClient, TensorStore
from flwr_moe.messages.exchange import ExchangeAccess
from flwr_moe.network.flower_adapter import log
from flwr_moe.network.nodes import EXCHANGE_URL
from flwr_moe.network.traffic import ACTIVATION_BYTES, EXCHANGES
from flwr_moe.overlay.block import at_tap, decode, encode
from flwr_moe.overlay.cache import ReplayCache
from flwr_moe.overlay.tails import check_tail
from flwr_moe.overlay.training import Recipe, Trainee
from flwr_moe.split.cut import split_model
from flwr_moe.training.samples import Samples

ACTIVATIONS = "activations"
"""Config record of a training message that asks for activations instead."""
OVERLAY_ACTION = "overlay"
OVERLAY_TYPE = f"train.{OVERLAY_ACTION}"
CONFIG, FRONT, TAIL = "config", "front", "tail"
CACHED, REFUSED, DAMAGED, CACHE_BYTES = "cached", "refused", "damaged", "cache-bytes"

SAMPLES_A_BLOCK = 1024
SAMPLES_A_PASS = 256
STATE = "trainee"

ModelFn = Callable[[Context], nn.Module]
DataFn = Callable[[Context], Samples]


def overlay_mod(model_of: ModelFn, data_of: DataFn) -> Mod:
    """Let a user's own ClientApp send activations to overlays.

    The user's functions are not touched: the mod answers training messages that ask for
    activations itself and hands on everything else. It comes before other mods.

    Parameters
    ----------
    model_of : callable
        Gives the small model for a node's context; its values do not matter.
    data_of : callable
        Gives the node's training samples.

    Returns
    -------
    Mod
        For ``ClientApp(mods=[...])``.

    Notes
    -----
    Source: ours. It is a training message because Flower's mods run around functions that the app
    has, and every app has one for training.
    """

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        if ACTIVATIONS not in message.content.config_records:
            return call_next(message, context)
        return send_activations(message, context, model_of(context), data_of(context))

    return mod


def send_activations(
    message: Message, context: Context, model: nn.Module, data: Samples
) -> Message:
    """Run the front of a model over a device's samples, and send what it gives to an overlay.

    Parameters
    ----------
    message : Message
        Asks for activations: the tensors of the front, and where to send to.
    context : Context
        Of the device.
    model : nn.Module
        The small model; the front gets the message's tensors.
    data : Samples
        The device's own.

    Returns
    -------
    Message
        Metrics alone: ``num-examples``, the bytes that travelled, and the compute seconds.

    Raises
    ------
    ValueError
        If there is no such layer, or the tensors do not fit.
    ExchangeError
        If the overlay cannot be reached.
    """
    config = message.content.config_records[ACTIVATIONS]
    front = split_model(model, str(config["tap"]), data.x[:1]).client
    front.load_state_dict(message.content.array_records[FRONT].to_torch_state_dict())
    asked = ExchangeAccess.from_record(config)
    partition, version = partition_of(context), _whole(config, "version")
    seed = _whole(config, "seed") * 1_000_003 + version * 1009 + partition
    generator = torch.Generator().manual_seed(seed % 2**63)
    client = exchange_client(str(config[EXCHANGE_URL]), Access.of(context, asked))
    mailbox, sent = str(config["mailbox"]), 0
    for part, begin in enumerate(range(0, len(data), SAMPLES_A_BLOCK)):
        end = min(begin + SAMPLES_A_BLOCK, len(data))
        tapped = tap_output(front, data.x[begin:end])
        block = encode(tapped, torch.arange(begin, end), data.y[begin:end], generator)
        name = f"{mailbox}d{partition}.v{version}.b{part}"
        client.put(name, block.tensors(), block.metadata(str(config["fingerprint"])))
        sent += block.num_bytes
    metrics = MetricRecord(
        {
            "num-examples": len(data),
            ACTIVATION_BYTES: sent,
            EXCHANGES: 1,
            # A pass forward costs about a third of a training step; the front less than that.
            "compute-seconds": len(data) * _number(config, "seconds-per-sample") / 3,
        }
    )
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


@torch.no_grad()
def tap_output(front: nn.Module, x: Tensor) -> Tensor:
    """Return what the front gives at the tap, in evaluation mode."""
    front.eval()
    return torch.cat([at_tap(front(piece)) for piece in x.split(SAMPLES_A_PASS)])


def register_overlay(app: ClientApp, tail_of: ModelFn) -> ClientApp:
    """Make ``app`` train a tail on a replay cache where the node is an overlay.

    The node config may name a folder for the cache as ``overlay-cache``; what is in it survives a
    restart. The overlay's exchange is that of ``exchange-url``.

    Parameters
    ----------
    app : ClientApp
        The app to extend; answers ``train.overlay``.
    tail_of : callable
        Gives the tail, any module from activations to logits, for a node's context.

    Returns
    -------
    ClientApp
        The same app.

    Notes
    -----
    Source: ours.
    """

    @app.train(OVERLAY_ACTION)
    def train_overlay(message: Message, context: Context) -> Message:
        torch.set_num_threads(1)
        return train_tail(message, context, tail_of(context))

    return app


def train_tail(message: Message, context: Context, tail: nn.Module) -> Message:
    """Take in new activations, train the tail from the cache, and tell how it went.

    Parameters
    ----------
    message : Message
        Of the type ``train.overlay``.
    context : Context
        Of the overlay.
    tail : nn.Module
        Trained further from where the overlay's folder, or the message, has it.

    Raises
    ------
    ValueError
        If the tail does not fit the activations, the folder is of another run or model, or there
        are no activations at all.
    ExchangeError
        If the overlay's own exchange does not answer.
    """
    config = message.content.config_records[CONFIG]
    shape, num_classes = _wholes(config, "shape"), _whole(config, "num-classes")
    check_tail(tail, shape, num_classes)
    folder = cache_folder(context, config)
    mark = str(config["fingerprint"])
    cache = ReplayCache(
        folder / "activations",
        fingerprint=mark,
        shape=shape,
        num_classes=num_classes,
        devices=_wholes(config, "devices"),
        ram_bytes=_whole(config, "ram-bytes"),
        disk_bytes=_whole(config, "disk-bytes") or None,
        versions=_whole(config, "versions") or None,
    )
    asked = ExchangeAccess.from_record(config)
    cache.latest = max(cache.latest, _whole(config, "latest"))
    with closing(cache), closing(TensorStore(folder / "tail", durable=False)) as store:
        client = exchange_client(own_exchange(context, asked), Access.of(context, asked))
        told = dict(zip(_wholes(config, "devices"), _wholes(config, "told"), strict=True))
        refused = take_in(cache, client, str(config["mailbox"]), told)
        trainee = Trainee(tail, recipe_of(config))
        if STATE in store and store.metadata(STATE).get("fingerprint") == mark:
            trainee.load(store.get(STATE))
        if TAIL in message.content.array_records:
            tail.load_state_dict(message.content.array_records[TAIL].to_torch_state_dict())
        steps = _whole(config, "step-budget" if "step-budget" in config else "local-steps")
        seed = _whole(config, "seed") * 1_000_003 + partition_of(context)
        loss = trainee.train(cache.draw, steps, seed)
        store.put(STATE, trainee.state(), {"fingerprint": mark})
        held = cache.stats()
    metrics = MetricRecord(
        {
            "num-examples": held["activations"],
            "steps": steps,
            "train-loss": loss,
            CACHED: held["activations"],
            CACHE_BYTES: held["bytes"],
            DAMAGED: held["damaged"],
            REFUSED: refused,
        }
    )
    content = RecordDict({"metrics": metrics})
    if config.get("report", False):
        content["trained-tail"] = ArrayRecord(tail.state_dict())
    return Message(content, reply_to=message)


def take_in(
    cache: ReplayCache, client: ExchangeClient, mailbox: str, told: Mapping[int, int]
) -> int:
    """Move what devices have put into the overlay's mailbox to its cache.

    Parameters
    ----------
    cache : ReplayCache
        Where it goes.
    client : ExchangeClient
        Of the overlay's own exchange.
    mailbox : str
        How the names of what is for this overlay begin.
    told : mapping of int to int
        Newest version that each device has reported as sent. What is newer still stays for the
        next time, so that a run does not depend on how fast its processes are.

    Returns
    -------
    int
        How many blocks were refused: of an unknown device, version or shape, or of another run.
        They are removed all the same.
    """
    refused = 0
    for name in client.names(mailbox):
        try:
            device, version, part = _numbers_of(name.removeprefix(mailbox))
            if device in told and version > told[device]:
                continue
            tensors, metadata = client.get_with_metadata(name)
            if metadata.get("fingerprint") != cache.fingerprint:
                raise ValueError(
                    f"activations of another run or model ({metadata.get('fingerprint')}), "
                    f"expected {cache.fingerprint}"
                )
            block = decode(tensors, metadata, cache.shape, cache.num_classes)
            cache.put(device, version, block, part)
        except ValueError as error:
            refused += 1
            log(WARNING, "%s refused: %s", name, error)
        client.delete(name)
    return refused


def cache_folder(context: Context, config: ConfigRecord) -> Path:
    """Return the overlay's folder: its node config's, the message's, or a temporary one."""
    named = str(context.node_config.get("overlay-cache") or "")
    if named:
        return Path(named)
    base = str(config.get("cache-folder") or "") or tempfile.gettempdir()
    return Path(base) / f"flwr-moe-overlay-{context.run_id}-{partition_of(context)}"


def recipe_of(config: ConfigRecord) -> Recipe:
    """Read a `Recipe` from a message; `recipe_config` undoes it."""
    return Recipe(
        learning_rate=_number(config, "learning-rate"),
        total_steps=_whole(config, "total-steps"),
        batch_size=_whole(config, "batch-size"),
        weight_decay=_number(config, "weight-decay"),
        label_smoothing=_number(config, "label-smoothing"),
        mixup=_number(config, "mixup"),
        augment=bool(config.get("augment", True)),
        balance=str(config.get("balance", "class")),
    )


def recipe_config(recipe: Recipe) -> dict[str, str | int | float | bool]:
    """Write a `Recipe` for a message."""
    return {name.replace("_", "-"): value for name, value in vars(recipe).items()}


def _numbers_of(name: str) -> list[int]:
    parts = name.split(".")
    if [part[:1] for part in parts] != ["d", "v", "b"]:
        raise ValueError(f"{name!r} is no name of activations")
    return [int(part[1:]) for part in parts]


def _whole(config: ConfigRecord, key: str) -> int:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"'{key}' is {value!r} in the message, expected a whole number from 0")
    return value


def _wholes(config: ConfigRecord, key: str) -> list[int]:
    value = config.get(key)
    if not isinstance(value, list) or not value or not all(isinstance(v, int) for v in value):
        raise ValueError(f"'{key}' is {value!r} in the message, expected whole numbers")
    return [int(v) for v in value]


def _number(config: ConfigRecord, key: str) -> float:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"'{key}' is {value!r} in the message, expected a number")
    return float(value)
