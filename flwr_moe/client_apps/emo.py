"""Devices that send their tap layer's activations, and overlays that train on them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from contextlib import closing
from logging import WARNING
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from flwr_moe.client_apps.node import (
    Access,
    ClientAppCallable,
    Mod,
    exchange_client,
    own_exchange,
    partition_of,
)
from flwr_moe.exchange import ExchangeClient, TensorStore
from flwr_moe.messages.base import config_of
from flwr_moe.messages.emo import (
    ACTIVATIONS,
    FRONT,
    OVERLAY_ACTION,
    TAIL,
    TRAINED_TAIL,
    ActivationFigures,
    ActivationOrder,
    TailFigures,
    TailOrder,
)
from flwr_moe.messages.training import METRICS
from flwr_moe.network.flower_adapter import log
from flwr_moe.overlay.block import decode, encode, tap_output
from flwr_moe.overlay.cache import BlockName, ReplayCache
from flwr_moe.overlay.tails import check_tail
from flwr_moe.overlay.training import Trainee
from flwr_moe.split.cut import split_model
from flwr_moe.training.samples import Samples
from flwr_moe.training.threads import one_thread_if_simulated

SAMPLES_A_BLOCK = 1024
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
    order = ActivationOrder.from_record(message.content.config_records[ACTIVATIONS])
    front = split_model(model, order.tap, data.x[:1]).client
    front.load_state_dict(message.content.array_records[FRONT].to_torch_state_dict())
    partition = partition_of(context)
    seed = order.seed * 1_000_003 + order.version * 1009 + partition
    generator = torch.Generator().manual_seed(seed % 2**63)
    client = exchange_client(order.exchange_url, Access.of(context, order))
    sent = 0
    for part, begin in enumerate(range(0, len(data), SAMPLES_A_BLOCK)):
        end = min(begin + SAMPLES_A_BLOCK, len(data))
        tapped = tap_output(front, data.x[begin:end])
        block = encode(tapped, torch.arange(begin, end), data.y[begin:end], generator)
        name = order.mailbox + str(BlockName(order.version, partition, part))
        client.put(name, block.tensors(), block.metadata(order.fingerprint))
        sent += block.num_bytes
    # A pass forward costs about a third of a training step; the front less than that.
    seconds = len(data) * order.seconds_per_sample / 3
    figures = ActivationFigures(len(data), sent, compute_seconds=seconds)
    return Message(RecordDict({METRICS: figures.to_record()}), reply_to=message)


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
        one_thread_if_simulated()
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
    order = TailOrder.from_record(config_of(message.content))
    if not order.devices:
        raise ValueError("'devices' is [] in the message, expected at least one partition id")
    check_tail(tail, order.shape, order.num_classes)
    folder, mark = cache_folder(context, order), order.fingerprint
    cache = ReplayCache(
        folder / "activations",
        fingerprint=mark,
        shape=order.shape,
        num_classes=order.num_classes,
        devices=order.devices,
        ram_bytes=order.ram_bytes,
        disk_bytes=order.disk_bytes or None,
        versions=order.versions or None,
    )
    cache.latest = max(cache.latest, order.latest)
    with closing(cache), closing(TensorStore(folder / "tail", durable=False)) as store:
        client = exchange_client(own_exchange(context, order), Access.of(context, order))
        told = dict(zip(order.devices, order.told, strict=True))
        refused = take_in(cache, client, order.mailbox, told)
        trainee = Trainee(tail, order.recipe)
        if STATE in store and store.metadata(STATE).get("fingerprint") == mark:
            trainee.load(store.get(STATE))
        if TAIL in message.content.array_records:
            tail.load_state_dict(message.content.array_records[TAIL].to_torch_state_dict())
        steps = order.local_steps if order.step_budget is None else order.step_budget
        loss = trainee.train(cache.draw, steps, order.seed * 1_000_003 + partition_of(context))
        store.put(STATE, trainee.state(), {"fingerprint": mark})
        held = cache.stats()
    figures = TailFigures(
        num_examples=held["activations"],
        steps=steps,
        train_loss=loss,
        cached=held["activations"],
        cache_bytes=held["bytes"],
        damaged=held["damaged"],
        refused=refused,
    )
    content = RecordDict({METRICS: figures.to_record()})
    if order.report:
        content[TRAINED_TAIL] = ArrayRecord(tail.state_dict())
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
            place = BlockName.of(name.removeprefix(mailbox))
            if place.version > told.get(place.device, place.version):
                continue
            tensors, metadata = client.get_with_metadata(name)
            if metadata.get("fingerprint") != cache.fingerprint:
                raise ValueError(
                    f"activations of another run or model ({metadata.get('fingerprint')}), "
                    f"expected {cache.fingerprint}"
                )
            block = decode(tensors, metadata, cache.shape, cache.num_classes)
            cache.put(place.device, place.version, block, place.part)
        except ValueError as error:
            refused += 1
            log(WARNING, "%s refused: %s", name, error)
        client.delete(name)
    return refused


def cache_folder(context: Context, order: TailOrder) -> Path:
    """Return the overlay's folder: its node config's, the message's, or a temporary one."""
    named = str(context.node_config.get("overlay-cache") or "")
    if named:
        return Path(named)
    base = Path(order.cache_folder or tempfile.gettempdir())
    return base / f"flwr-moe-overlay-{context.run_id}-{partition_of(context)}"
