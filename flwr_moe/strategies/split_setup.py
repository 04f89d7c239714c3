"""What a run of split training needs before its first round: checks, server half, exchange."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager

from flwr.app import ConfigRecord
from torch import Tensor

from flwr_moe.exchange import ExchangeServer, TensorStore
from flwr_moe.exchange.app import Handler
from flwr_moe.split.codecs import Chain, Role
from flwr_moe.split.cut import Split, materialise
from flwr_moe.split.protocol import agreement
from flwr_moe.split.prune_choice import find_groups
from flwr_moe.split.session import SERVERS, LossFn, SplitSession

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


def open_session(
    split: Split,
    state: Mapping[str, Tensor],
    codecs: Mapping[Role, Chain],
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
    codecs, server, seed, clip, loss_fn
        See `SplitSession`.

    Raises
    ------
    ValueError
        If the state is not the model's.
    """
    own = {**split.client.state_dict(), **split.server.state_dict()}
    for key in sorted(own.keys() ^ state.keys()):
        where = "missing in the initial arrays" if key in own else "not of the model"
        raise ValueError(f"tensor {key!r} is {where}")
    materialise(split.server, {key: state[key] for key in split.server.state_dict()})
    groups = find_groups(split.client, prune_output=True)
    return SplitSession(
        split.server,
        codecs,
        agreement(own, split.at, codecs),
        server=server,
        seed=seed,
        clip=clip,
        loss_fn=loss_fn,
        output=next((g for g in groups if g.output_dim is not None), None),
    )


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
