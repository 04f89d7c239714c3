"""FedMoE-DA: every client its own experts, mixed with similar experts of others."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from logging import INFO, WARNING
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result
from numpy.typing import NDArray

from flwr_moe.client_apps.fedmoe_da.mod import PEER_LOST, PERSONAL, TRAINED_SHARED
from flwr_moe.experts import ExpertLayout
from flwr_moe.experts.layout import part_name
from flwr_moe.experts.mixing import Ingredient, mixing_plans, plan_to_config
from flwr_moe.network import (
    MESSAGE_TTL_S,
    MeteredGrid,
    SimulatedGrid,
    check_reply,
)
from flwr_moe.network.flower_adapter import log
from flwr_moe.network.nodes import EXCHANGE_URL, NodeProfile
from flwr_moe.network.wire_dtype import check_wire_dtype
from flwr_moe.strategies.averaging import Arrays, to_arrays, to_record, weighted_mean
from flwr_moe.strategies.fedmoe_da.relay import relay_experts
from flwr_moe.strategies.nodes import sample, wait_for, with_clock

GATES = ("mixed", "local", "average")
EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]


class FedMoEDA(FedAvg):
    """Personalised experts that travel from peer to peer (FedMoE-DA).

    Every client trains a model of its own. The server averages what all share, sees the gates'
    vectors, works out which experts are alike, and tells every client which experts of whom to mix
    into its own. Clients need :func:`~flwr_moe.client_apps.personal_mod` and, unless ``relay`` is
    set, a tensor exchange each.

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
        if p < 0:
            raise ValueError(f"p is {p}, expected 0 or more")
        if not tau > 0:
            raise ValueError(f"tau is {tau}, expected above 0")
        if interval < 1:
            raise ValueError(f"interval is {interval}, expected at least 1 round")
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
        self.reset()

    def reset(self) -> None:
        """Start anew: a second run of the same strategy gives what the first one gave."""
        self._rng = random.Random(self.seed)
        self._grid: SimulatedGrid | MeteredGrid | None = None
        self._state: dict[str, NDArray[Any]] = {}
        self._gates: dict[int, list[NDArray[Any]]] = {}
        self._rows: dict[int, Arrays] = {}
        self._experts: dict[int, Arrays] = {}
        self._versions: dict[int, int] = {}
        self._informed: set[int] = set()
        self._plans: dict[int, list[Ingredient]] = {}
        self._sent: dict[int, RecordDict] = {}
        self._clients: dict[int, int] = {}
        self._urls: dict[int, str] = {}
        self.client_metrics: dict[int, dict[str, float]] = {}

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

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: EvaluateFn | None = None,
    ) -> Result:
        """Run ``num_rounds`` rounds; parameters and result are those of Flower's ``start``.

        The arrays of the result hold the shared tensors as averaged last; experts, and what else
        is personal, are as they started: the trained ones are with the clients.
        """
        self.reset()
        self._grid = grid = with_clock(grid, timeout)
        self._state = to_arrays(initial_arrays)
        return super().start(
            grid, initial_arrays, num_rounds, timeout, train_config, evaluate_config, evaluate_fn
        )

    # --- the hooks of a round ----------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Write every sampled client's order: what it mixes, and whether it reports its gate."""
        profiles = wait_for(self._network, self.min_available_nodes if server_round == 1 else 1)
        self._clients = {node_id: node.partition_id for node_id, node in profiles.items()}
        # Kept for clients that leave: their exchanges may well be there still.
        self._urls |= {
            n.partition_id: n.exchange_url or self.exchange_url for n in profiles.values()
        }
        if self.p and (server_round - 2) % self.interval == 0:
            here = self._gates.keys() & self._clients.values()
            self._plans = mixing_plans({c: self._gates[c] for c in here}, self.p, self.tau)
        relayed = (
            relay_experts(self.layout, self._plans, self._experts, self._rows, self.gate == "mixed")
            if self.relay
            else {}
        )
        self._sent = {}
        messages = []
        nodes = list(profiles.values())
        for node in sample(nodes, self.fraction_train, self.min_train_nodes, self._rng):
            content = self._order(server_round, node, config)
            experts, rows = relayed.get(node.partition_id, ({}, {}))
            if experts:
                content["experts"] = to_record(experts)
                if self.gate == "local" and node.node_id not in self._informed:
                    rows = dict(self._rows[node.partition_id])
            if rows:
                content["gate"] = to_record(rows)
            self._sent[node.node_id] = content
            messages.append(Message(content, node.node_id, MessageType.TRAIN, ttl=MESSAGE_TTL_S))
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average what is shared, and note gates, versions and clients' own figures."""
        network = self._network
        partitions = self._clients
        order = [m for m in replies if m.metadata.src_node_id in partitions]
        order.sort(key=lambda m: partitions[m.metadata.src_node_id])
        shared: list[Arrays] = []
        weights: list[float] = []
        heard = set()
        for reply in order:
            node_id = reply.metadata.src_node_id
            reason = reply.error.reason if reply.has_error() else self._unusable(node_id, reply)
            if reason is not None:
                # A simulated Grid has counted and logged errors itself.
                if not (reply.has_error() and isinstance(network, SimulatedGrid)):
                    log(WARNING, "node %d: %s", partitions[node_id], reason)
                if not reply.has_error():
                    network.ledger.event("rejected")
                continue
            heard.add(node_id)
            client = partitions[node_id]
            metrics = next(iter(reply.content.metric_records.values()))
            self.client_metrics[client] = {
                k: float(v) for k, v in metrics.items() if isinstance(v, int | float)
            }
            lost = int(self.client_metrics[client].get(PEER_LOST, 0))
            if lost:
                network.ledger.event("peer-lost", lost)
            self._versions[client] = server_round
            self._take_records(client, reply.content)
            if TRAINED_SHARED in reply.content.array_records:
                shared.append(to_arrays(reply.content.array_records[TRAINED_SHARED]))
                weights.append(self.client_metrics[client][self.weighted_by_key])
        self._informed |= heard
        # Who failed may have lost what it had been sent: it is told everything again.
        self._informed -= self._sent.keys() - heard
        if shared and sum(weights) > 0:
            self._state |= weighted_mean(shared, weights)
        return to_record(self._state), self._mean_metrics(
            [partitions[node_id] for node_id in heard]
        )

    # --- inside ------------------------------------------------------------------

    @property
    def _network(self) -> SimulatedGrid | MeteredGrid:
        if self._grid is None:
            raise ValueError("FedMoEDA runs by start(), which has not been called")
        return self._grid

    def _order(self, server_round: int, node: NodeProfile, config: ConfigRecord) -> RecordDict:
        client = node.partition_id
        full = node.node_id not in self._informed
        plan = self._plans.get(client, [])
        peers = sorted({share.peer for share in plan} - {client})
        order: dict[str, Any] = {
            **config,
            "server-round": server_round,
            PERSONAL: self.personal,
            "full": full,
            "gate": self.gate,
            "relay": self.relay,
            "version": self._versions.get(client, 0),
            # In the round before a refresh; always, where it may not be drawn for that round.
            "report-gates": (server_round - 1) % self.interval == 0 or self.fraction_train < 1,
        }
        if not self.relay:
            order |= plan_to_config(plan)
            order |= {
                "peers": peers,
                "peer-urls": [self._urls[peer] for peer in peers],
                "peer-versions": [self._versions[peer] for peer in peers],
                EXCHANGE_URL: self.exchange_url,
                "exchange-token": self.exchange_token,
                "exchange-timeout-s": self.exchange_timeout_s,
                "peer-dtype": self.peer_dtype,
            }
        arrays = self._state if full else {k: self._state[k] for k in self._shared_keys()}
        return RecordDict(
            {
                self.arrayrecord_key: to_record(arrays),
                self.configrecord_key: ConfigRecord(order),
            }
        )

    def _shared_keys(self) -> list[str]:
        gates = {key for keys in self.layout.gate_rows for key in keys}
        return [
            key
            for key in self.layout.shared(self._state)
            if not key.startswith(tuple(self.personal))
            and (key not in gates or self.gate == "average")
        ]

    def _take_records(self, client: int, content: RecordDict) -> None:
        if "gate" in content.array_records:
            self._rows[client] = to_arrays(content.array_records["gate"])
            self._gates[client] = [self._rows[client][key] for key in self._vector_keys()]
        if self.relay:
            self._experts[client] = to_arrays(content.array_records["experts"])

    def _vector_keys(self) -> list[str]:
        """Per layer the gate's weight: one vector an expert."""
        return [
            next(key for key in keys if len(self.layout.shared_specs[key].shape) == 2)
            for keys in self.layout.gate_rows
        ]

    def _unusable(self, node_id: int, reply: Message) -> str | None:
        """Say why a reply cannot be used, None if it can."""
        content = reply.content
        reason = check_reply(self._sent[node_id], content)
        if reason is not None:
            return reason
        config = self._sent[node_id].config_records[self.configrecord_key]
        expected = {TRAINED_SHARED: {k: self._state[k].shape for k in self._shared_keys()}}
        gates = [key for keys in self.layout.gate_rows for key in keys]
        if config["report-gates"] or self.relay:
            expected["gate"] = {k: self._state[k].shape for k in gates}
        if self.relay:
            expected["experts"] = {
                part_name(layer, e, name): spec.shape
                for layer, moe in enumerate(self.layout.moe_layers)
                for e in range(moe.num_experts)
                for name, spec in moe.parts.items()
            }
        for name, shapes in expected.items():
            if not shapes:
                continue
            record = content.array_records.get(name)
            came = {} if record is None else {k: tuple(a.shape) for k, a in record.items()}
            for key in sorted(came.keys() | shapes.keys()):
                if came.get(key) != shapes.get(key):
                    return (
                        f"array '{name}/{key}' has shape {came.get(key)}, "
                        f"expected {shapes.get(key)} (is personal_mod in the ClientApp?)"
                    )
        if not content.metric_records:
            return "the reply has no MetricRecord"
        weight = next(iter(content.metric_records.values())).get(self.weighted_by_key)
        if not isinstance(weight, int | float) or weight < 0:
            return f"metric '{self.weighted_by_key}' is {weight!r}, expected a number from 0"
        return None

    def _mean_metrics(self, clients: Sequence[int]) -> MetricRecord | None:
        """Plain means over clients: each counts once, whatever its number of examples."""
        told = [self.client_metrics[client] for client in sorted(clients)]
        if not told:
            return None
        keys = sorted(set.intersection(*(set(metrics) for metrics in told)))
        return MetricRecord({key: float(np.mean([m[key] for m in told])) for key in keys})
