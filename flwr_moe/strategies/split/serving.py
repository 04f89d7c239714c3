"""What a strategy of split training needs all along: its server half, its nodes, their replies."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping
from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp.strategy import FedAvg
from torch import Tensor

from flwr_moe.client_apps.split.visit import SPLIT_STEPS
from flwr_moe.exchange.app import Handler
from flwr_moe.exchange.request import Refused
from flwr_moe.network import MeteredGrid, SimulatedGrid
from flwr_moe.network.nodes import EXCHANGE_URL, NodeProfile
from flwr_moe.split.codecs import Chain, Role
from flwr_moe.split.cut import Split, UShape
from flwr_moe.split.protocol import HANDLER
from flwr_moe.split.session import LossFn, SplitSession
from flwr_moe.strategies.split.replies import why_unusable
from flwr_moe.strategies.split.setup import NO_SCHEDULE, number, open_session


class SplitServing(FedAvg):
    """Base of `SplitFed`, which sets these attributes and says what they are."""

    split: Split
    at: str
    codecs: dict[Role, Chain]
    top_codecs: dict[Role, Chain]
    server: str
    interval: int
    learning_rate: float
    clip: float
    server_speedup: float
    exchange_timeout_s: float
    loss_fn: LossFn
    seed: int
    _rng: random.Random
    _grid: SimulatedGrid | MeteredGrid | None
    _session: SplitSession | None
    _address: tuple[str, str]
    _version: int
    _met: set[int]
    _last_round: int
    _steps: int
    _half: dict[str, Any]
    _sent: dict[int, RecordDict]

    @property
    def handlers(self) -> Mapping[str, Handler]:
        """What the exchange at ``exchange_url`` answers calls with."""
        return {HANDLER: self._answer}

    @property
    def _network(self) -> SimulatedGrid | MeteredGrid:
        if self._grid is None:
            raise ValueError(f"{type(self).__name__} runs by start(), which has not been called")
        return self._grid

    @property
    def _running(self) -> SplitSession:
        if self._session is None:
            raise ValueError(f"{type(self).__name__} runs by start(), which has not been called")
        return self._session

    def _answer(
        self, tensors: dict[str, Tensor], metadata: dict[str, str]
    ) -> tuple[Mapping[str, Tensor], dict[str, str]]:
        if self._session is None:
            raise Refused("no run has been started", 409)
        return self._session.handle(tensors, metadata)

    def _open_session(
        self, state: Mapping[str, Tensor], config: ConfigRecord | None
    ) -> SplitSession:
        return open_session(
            copy.deepcopy(self.split),
            state,
            self.codecs,
            self.top_codecs,
            server=self.server,
            seed=int(number(config or ConfigRecord(), "seed", self.seed)),
            clip=self.clip,
            loss_fn=self.loss_fn,
        )

    def _order(self, server_round: int, node: NodeProfile, config: ConfigRecord) -> dict[str, Any]:
        # Not local-steps: the network would charge the node for steps of the whole model.
        passed = {k: v for k, v in config.items() if k not in ("local-steps", "max-local-steps")}
        return {
            "seed": self.seed,
            "learning-rate": self.learning_rate,
            "batch-size": 32,
            **passed,
            "server-round": server_round,
            SPLIT_STEPS: self._steps,
            "cut": self.at,
            **({"top-cut": self.split.top_cut} if isinstance(self.split, UShape) else {}),
            "clip": self.clip,
            "send-half": self._averages(server_round),
            "keep-half": self.interval > 1,
            "half-version": self._version,
            "fresh": node.node_id not in self._met,
            "seconds-per-step": 1 / node.steps_per_second,
            "server-speedup": self.server_speedup,
            EXCHANGE_URL: self._address[0],
            "exchange-token": self._address[1],
            "exchange-timeout-s": self.exchange_timeout_s,
            **self._lightening(node),
        }

    def _lightening(self, node: NodeProfile) -> dict[str, int | float]:
        """Say how the client half and the cut are made lighter."""
        return {"dropout": 0.0, "bits": 0, "prune": 0.0, **NO_SCHEDULE}

    def _averages(self, server_round: int) -> bool:
        return server_round % self.interval == 0 or server_round == self._last_round

    def _why_unusable(self, reply: Message) -> str | None:
        """Say why a reply cannot be used, None if it can."""
        if reply.has_error():
            return reply.error.reason
        sent = self._sent.get(reply.metadata.src_node_id)
        if sent is None:
            return "the reply answers nothing"
        sends_half = sent.config_records[self.configrecord_key]["send-half"]
        return why_unusable(
            sent, reply.content, self._steps, self.weighted_by_key, self._half if sends_half else {}
        )
