"""FedMoE-DA: every client its own experts, mixed with similar experts of others."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from logging import INFO
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray

from flwr_moe.arrays import Arrays, arrays_of, record_of, unlike, weighted_mean
from flwr_moe.checks import check_numbers
from flwr_moe.experts import ExpertLayout
from flwr_moe.experts.mixing import Ingredient, mixing_plans
from flwr_moe.messages.base import metrics_of, read_value
from flwr_moe.messages.fedmoe_da import (
    EXPERTS,
    GATE,
    GATES,
    TRAINED_SHARED,
    PeerFigures,
    PeerOrder,
    PersonalOrder,
)
from flwr_moe.network import MESSAGE_TTL_S, ClockGrid
from flwr_moe.network.flower_adapter import log
from flwr_moe.network.nodes import NodeProfile
from flwr_moe.network.wire_dtype import check_wire_dtype
from flwr_moe.strategies.base import RoundStrategy, sample
from flwr_moe.strategies.fedmoe_da.relay import relay_experts


class FedMoEDA(RoundStrategy):
    """Personalised experts that travel from peer to peer (FedMoE-DA).

    Every client trains a model of its own. The server averages what all share, sees the gates'
    vectors, works out which experts are alike, and tells every client which experts of whom to mix
    into its own. Clients need :func:`~flwr_moe.client_apps.personal_mod` and, unless ``relay`` is
    set, a tensor exchange each. The arrays of the result hold the shared tensors as averaged last;
    experts, and what else is personal, are as they started: the trained ones are with the clients.

    Takes the arguments of Flower's FedAvg, and:

    Parameters
    ----------
    layout : ExpertLayout
        Of the model.
    p : int
        Similar experts each expert is mixed with, besides itself; 0 for none.
    tau : float
        Temperature of the mixing weights.
    interval : int
        Rounds between refreshes of the mixing matrix.
    gate : str
        ``"mixed"``: gate rows are mixed as their experts are; ``"local"``: they stay as trained;
        ``"average"``: they are shared like any other tensor.
    personal : sequence of str
        Name prefixes of tensors that stay with each client, such as ``("head.",)``.
    relay : bool
        Send experts through the server, which mixes them, instead of from peer to peer.
    exchange_url, exchange_token : str
        Exchange of nodes whose node config names none, and the token for all exchanges.
    exchange_timeout_s : float
        Wall seconds after which a peer counts as silent.
    peer_dtype : str
        Dtype in which float32 experts travel between peers: ``"float32"``, ``"bfloat16"`` or
        ``"float16"``. What a client has trained itself keeps its precision.
    seed : int
        For sampling clients where ``fraction_train`` is below 1.

    Raises
    ------
    ValueError
        If a number is out of range or the gate's treatment unknown.

    Notes
    -----
    Source: FedMoE-DA, Eqs. 8 to 11; peers that do not answer, gates and relay are ours. The matrix
    is first worked out in round 2, from what clients trained in round 1. Keyword arguments only
    after ``layout``. ``min_available_nodes`` are waited for before the first round; later rounds
    go on with the nodes that are left, and with those that have joined.
    """

    def __init__(
        self,
        layout: ExpertLayout,
        *,
        p: int = 3,
        tau: float = 1.0,
        interval: int = 5,
        gate: str = "mixed",
        personal: Sequence[str] = (),
        relay: bool = False,
        exchange_url: str = "",
        exchange_token: str = "",
        exchange_timeout_s: float = 5.0,
        peer_dtype: str = "float32",
        seed: int = 0,
        fraction_evaluate: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(fraction_evaluate=fraction_evaluate, **kwargs)
        check_numbers(least=0, p=p)
        check_numbers(above=0, tau=tau)
        check_numbers(least=1, interval=interval)
        if gate not in GATES:
            raise ValueError(f"gate is {gate!r}, expected one of {', '.join(GATES)}")
        self.layout = layout
        self.p, self.tau, self.interval = p, tau, interval
        self.gate, self.personal, self.relay = gate, list(personal), relay
        self.exchange_url, self.exchange_token = exchange_url, exchange_token
        self.exchange_timeout_s = exchange_timeout_s
        check_wire_dtype(peer_dtype, "peer_dtype")
        self.peer_dtype = peer_dtype
        self.seed = seed
        self.client_metrics: dict[int, dict[str, float]] = {}
        self._run: _Run | None = None

    def summary(self) -> None:
        """Log the settings."""
        log(
            INFO,
            "\t├──> FedMoE-DA: P %d, tau %g, refreshed every %d rounds, gate %s, %s",
            self.p,
            self.tau,
            self.interval,
            self.gate,
            "through the server" if self.relay else "peer to peer",
        )
        super().summary()

    @contextmanager
    def running(
        self, grid: ClockGrid, arrays: ArrayRecord, num_rounds: int, train_config: ConfigRecord
    ) -> Iterator[ClockGrid]:
        """Begin a run: a second one of the same strategy gives what the first one gave."""
        self._run = _Run(grid, arrays_of(arrays), random.Random(self.seed))
        self.client_metrics = {}
        yield grid

    # --- the hooks of a round ----------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Write every sampled client's order: what it mixes, and whether it reports its gate."""
        run = self._running
        nodes = run.meet(self.min_available_nodes if server_round == 1 else 1, self.exchange_url)
        if self.p and (server_round - 2) % self.interval == 0:
            run.plans = mixing_plans(run.gate_vectors(self.layout), self.p, self.tau)
        relayed = (
            relay_experts(self.layout, run.plans, run.experts, run.rows, self.gate == "mixed")
            if self.relay
            else {}
        )
        run.sent = {}
        for node in sample(nodes, self.fraction_train, self.min_train_nodes, run.rng):
            content = self._order(server_round, node, config)
            experts, rows = relayed.get(node.partition_id, ({}, {}))
            if experts:
                content[EXPERTS] = record_of(experts)
                if self.gate == "local" and node.node_id not in run.informed:
                    rows = dict(run.rows[node.partition_id])
            if rows:
                content[GATE] = record_of(rows)
            run.sent[node.node_id] = content
        return [
            Message(content, node_id, MessageType.TRAIN, ttl=MESSAGE_TTL_S)
            for node_id, content in run.sent.items()
        ]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average what is shared, and note gates, versions and clients' own figures."""
        run = self._running
        shared: list[Arrays] = []
        weights: list[float] = []
        heard: dict[int, int] = {}
        for client, reply in run.in_order(replies):
            node_id = reply.metadata.src_node_id
            if not self._usable(reply):
                continue
            heard[node_id] = client
            metrics = metrics_of(reply.content)
            told = {k: float(v) for k, v in metrics.items() if isinstance(v, int | float)}
            self.client_metrics[client] = told
            if lost := PeerFigures.from_record(metrics).peer_lost:
                run.network.ledger.event("peer-lost", lost)
            run.versions[client] = server_round
            records = reply.content.array_records
            if GATE in records:
                run.rows[client] = arrays_of(records[GATE])
            if self.relay:
                run.experts[client] = arrays_of(records[EXPERTS])
            if TRAINED_SHARED in records:
                shared.append(arrays_of(records[TRAINED_SHARED]))
                weights.append(told[self.weighted_by_key])
        # Who failed may have lost what it had been sent: it is told everything again.
        run.informed = (run.informed - run.sent.keys()) | heard.keys()
        if shared and sum(weights) > 0:
            run.state |= weighted_mean(shared, weights, run.state)
        return record_of(run.state), self._mean_metrics(sorted(heard.values()))

    # --- inside ------------------------------------------------------------------

    @property
    def _running(self) -> _Run:
        if self._run is None:
            raise ValueError("FedMoEDA runs by start(), which has not been called")
        return self._run

    def _order(self, server_round: int, node: NodeProfile, config: ConfigRecord) -> RecordDict:
        """Write one client's order, and the tensors it may lack."""
        run, client = self._running, node.partition_id
        full = node.node_id not in run.informed
        order = PersonalOrder(
            personal=self.personal,
            server_round=server_round,
            version=run.versions.get(client, 0),
            full=full,
            gate=self.gate,
            relay=self.relay,
            # In the round before a refresh; always, where it may not be drawn for that round.
            report_gates=(server_round - 1) % self.interval == 0 or self.fraction_train < 1,
            extra=dict(config),
        ).to_dict()
        if not self.relay:
            plan = run.plans.get(client, [])
            peers = sorted({share.peer for share in plan} - {client})
            order |= PeerOrder(
                **PeerOrder.columns_of(plan),
                peers=peers,
                peer_urls=[run.urls[peer] for peer in peers],
                peer_versions=[run.versions[peer] for peer in peers],
                peer_dtype=self.peer_dtype,
                exchange_url=self.exchange_url,
                exchange_token=self.exchange_token,
                exchange_timeout_s=self.exchange_timeout_s,
            ).to_dict()
        arrays = run.state if full else {key: run.state[key] for key in self._shared_keys()}
        return RecordDict(
            {self.arrayrecord_key: record_of(arrays), self.configrecord_key: ConfigRecord(order)}
        )

    def _shared_keys(self) -> list[str]:
        kept = self.layout.gate_keys if self.gate != "average" else ()
        shared = self.layout.shared(self._running.state)
        return [k for k in shared if not (k in kept or k.startswith(tuple(self.personal)))]

    def _usable(self, reply: Message) -> bool:
        """Whether a reply can be used; logs and counts it if not."""
        if reply.has_content() and (reason := self._reason_against(reply)) is not None:
            self._running.network.reject(reply, reason)
        return reply.has_content()

    def _reason_against(self, reply: Message) -> str | None:
        """Say why a reply cannot be used, None if it can."""
        run, content = self._running, reply.content
        sent = run.sent[reply.metadata.src_node_id]
        expected = {TRAINED_SHARED: self._shared_keys()}
        config = sent.config_records[self.configrecord_key]
        if PersonalOrder.from_record(config).report_gates or self.relay:
            expected[GATE] = list(self.layout.gate_keys)
        tensors: dict[str, Mapping[str, Any]]
        tensors = {name: {k: run.state[k] for k in keys} for name, keys in expected.items()}
        if self.relay:
            tensors[EXPERTS] = self.layout.part_specs(self.layout.all_experts)
        records = content.array_records
        for record_key, specs in tensors.items():
            if specs and (reason := unlike(records.get(record_key), specs, record_key)):
                return f"{reason} (is personal_mod in the ClientApp?)"
        try:
            figures = metrics_of(content)
            PeerFigures.from_record(figures)
            read_value(figures, self.weighted_by_key, float, place=PeerFigures.place, least=0)
        except ValueError as error:
            return str(error)
        return None

    def _mean_metrics(self, clients: Sequence[int]) -> MetricRecord | None:
        """Plain means over clients: each counts once, whatever its number of examples."""
        told = [self.client_metrics[client] for client in clients]
        if not told:
            return None
        keys = sorted(set.intersection(*(set(metrics) for metrics in told)))
        return MetricRecord({key: float(np.mean([m[key] for m in told])) for key in keys})


@dataclass
class _Run:
    """What the server knows in one run; by partition id unless said otherwise.

    Attributes
    ----------
    network : Grid
        With a clock.
    state : dict
        Shared tensors as averaged last, and all others as they started.
    rng : Random
        Draws clients.
    partitions : dict
        Partition id of every node that was met, by node id.
    urls, versions : dict
        Clients' exchanges, and the round of the experts that lie there.
    rows, experts : dict
        Gate tensors, and in relay mode experts, as reported last.
    plans : dict
        What every client mixes until the next refresh.
    informed : set of int
        Nodes (by node id) that have what they were sent.
    sent : dict
        This round's orders by node id.
    """

    network: ClockGrid
    state: dict[str, NDArray[Any]]
    rng: random.Random
    partitions: dict[int, int] = field(default_factory=dict)
    urls: dict[int, str] = field(default_factory=dict)
    versions: dict[int, int] = field(default_factory=dict)
    rows: dict[int, Arrays] = field(default_factory=dict)
    experts: dict[int, Arrays] = field(default_factory=dict)
    plans: dict[int, list[Ingredient]] = field(default_factory=dict)
    informed: set[int] = field(default_factory=set)
    sent: dict[int, RecordDict] = field(default_factory=dict)

    def meet(self, least: int, default_url: str) -> list[NodeProfile]:
        """Wait until ``least`` nodes are there, and note who they are."""
        nodes = list(self.network.wait_for_nodes(least).values())
        self.partitions = {node.node_id: node.partition_id for node in nodes}
        # Kept for clients that leave: their exchanges may well be there still.
        self.urls |= {node.partition_id: node.exchange_url or default_url for node in nodes}
        return nodes

    def gate_vectors(self, layout: ExpertLayout) -> dict[int, list[NDArray[Any]]]:
        """Return the gate vectors of the clients that are here: one an expert, layer by layer."""
        weights = [
            next(key for key in keys if len(layout.shared_specs[key].shape) == 2)
            for keys in layout.gate_rows
        ]
        here = self.rows.keys() & self.partitions.values()
        return {client: [self.rows[client][key] for key in weights] for client in here}

    def in_order(self, replies: Iterable[Message]) -> list[tuple[int, Message]]:
        """Return replies of known nodes with their partition ids, in order of these."""
        known = ((self.partitions.get(m.metadata.src_node_id), m) for m in replies)
        pairs = [(client, m) for client, m in known if client is not None]
        return sorted(pairs, key=lambda pair: pair[0])
