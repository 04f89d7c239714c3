"""What a run of split training needs before its first round: checks, server half, exchange."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from typing import Any

from flwr.app import ConfigRecord
from torch import Tensor, nn
from torch.nn import functional

from flwr_moe.exchange import ExchangeServer, TensorStore
from flwr_moe.exchange.app import Handler
from flwr_moe.split.codecs import Chain, Role
from flwr_moe.split.cut import Split, UShape, materialise, split_in_three, split_model
from flwr_moe.split.meta import ExampleInputs
from flwr_moe.split.protocol import agreement, top_agreement
from flwr_moe.split.prune_groups import find_groups
from flwr_moe.split.session import SERVERS, LossFn, SplitSession
from flwr_moe.split.session_ushape import UShapeSession

LABELS = ("server", "client")
"""Where labels may be."""
NO_SCHEDULE = {"prune-start": 1, "prune-ramp": 0, "prune-every": 1}


def check_settings(
    interval: int,
    server: str,
    learning_rate: float,
    clip: float,
    server_speedup: float,
    exchange_timeout_s: float,
) -> None:
    """Raise ValueError if a setting of `SplitFed` is out of range."""
    if interval < 1:
        raise ValueError(f"interval is {interval}, expected at least 1 round")
    if server not in SERVERS:
        raise ValueError(f"server is {server!r}, expected one of {', '.join(SERVERS)}")
    if not learning_rate > 0:
        raise ValueError(f"learning_rate is {learning_rate}, expected above 0")
    if not clip >= 0:
        raise ValueError(f"clip is {clip}, expected 0 (off) or more")
    if not server_speedup > 0:
        raise ValueError(f"server_speedup is {server_speedup}, expected above 0")
    if not exchange_timeout_s > 0:
        raise ValueError(f"exchange_timeout_s is {exchange_timeout_s}, expected above 0")


def cut_for(
    labels: str,
    model: nn.Module,
    at: str,
    top_cut: str,
    example_inputs: ExampleInputs | None,
    loss_fn: LossFn,
) -> Split:
    """Cut a model in two, or in three if labels are the client's; ValueError if that cannot be."""
    if labels not in LABELS:
        raise ValueError(f"labels is {labels!r}, expected one of {', '.join(LABELS)}")
    if labels == "server" and top_cut:
        raise ValueError(f"top_cut is {top_cut!r}, expected none unless labels is 'client'")
    if labels == "client" and loss_fn is not functional.cross_entropy:
        raise ValueError("loss_fn is the clients' with labels 'client': give it to train_half")
    if labels == "client":
        return split_in_three(model, at, top_cut, example_inputs)
    return split_model(model, at, example_inputs)


def open_session(
    split: Split,
    state: Mapping[str, Tensor],
    codecs: Mapping[Role, Chain],
    top_codecs: Mapping[Role, Chain],
    *,
    server: str,
    seed: int,
    clip: float,
    loss_fn: LossFn,
) -> SplitSession:
    """Give the server half its values and make the session that trains it.

    Parameters
    ----------
    split : Split
        The session keeps its server half as its own.
    state : mapping of str to Tensor
        Of the whole model.
    codecs, top_codecs, server, seed, clip, loss_fn
        See `SplitSession`, and `UShapeSession` for the second, which only a `UShape` needs.

    Raises
    ------
    ValueError
        If the state is not the model's.
    """
    own = {**split.client_state_dict(), **split.server.state_dict()}
    for key in sorted(own.keys() ^ state.keys()):
        where = "missing in the initial arrays" if key in own else "not of the model"
        raise ValueError(f"tensor {key!r} is {where}")
    materialise(split.server, {key: state[key] for key in split.server.state_dict()})
    groups = find_groups(split.client, prune_output=True)
    agreed = agreement(own, split.at, codecs)
    settings: dict[str, Any] = {
        "server": server,
        "seed": seed,
        "clip": clip,
        "output": next((g for g in groups if g.output_dim is not None), None),
    }
    if isinstance(split, UShape):
        agreed |= top_agreement(split.top_cut, top_codecs)
        return UShapeSession(split.server, codecs, agreed, top_codecs=top_codecs, **settings)
    return SplitSession(split.server, codecs, agreed, loss_fn=loss_fn, **settings)


@contextmanager
def local_exchange(handlers: Mapping[str, Handler]) -> Iterator[tuple[str, str]]:
    """Serve handlers on the loopback address; the URL and the token."""
    token = secrets.token_urlsafe(24)
    with closing(TensorStore()) as store, ExchangeServer(store, token, handlers) as server:
        yield server.url, token


def local_steps(config: ConfigRecord) -> int:
    """Read the number of batches of a round; ValueError if it is none."""
    steps = config.get("local-steps")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(
            f"'local-steps' is {steps!r} in the train_config, expected a whole number from 1"
        )
    return steps


def number(config: ConfigRecord, key: str, default: float) -> float:
    """Read a number from 0; ValueError if it is none."""
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        raise ValueError(f"{key!r} is {value!r} in the train_config, expected a number from 0")
    return value
