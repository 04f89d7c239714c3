"""A node's experts on the tensor exchange: its own, and those of its peers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from logging import WARNING

from flwr.app import Context
from torch import Tensor

from flwr_moe.client_apps.node import Access, exchange_client, own_exchange
from flwr_moe.exchange import ExchangeClient, ExchangeError, Unreachable
from flwr_moe.messages.fedmoe_da import PeerOrder
from flwr_moe.network.flower_adapter import log
from flwr_moe.network.wire_dtype import halved

Expert = dict[str, Tensor]
FULL = ".full"


class PeerExchange:
    """Publishes a node's experts and fetches those of others.

    Blobs are named ``r{run}.c{partition}.v{version}.l{layer}.e{expert}``. A version is the round
    that published it, so that a client that is ahead takes nothing from under one that is behind.
    Where peers get half precision, the node keeps what it trained as ``….full``.

    Parameters
    ----------
    context : Context
        Of the node; ``exchange-url`` of its node config is the address of its own exchange,
        ``exchange-ca``, ``exchange-cert`` and ``exchange-key`` are files with certificates.
    order : PeerOrder
        What the message says of peers.
    partition_id : int
        Of the node.

    Raises
    ------
    ValueError
        If there is no exchange to publish to.

    Notes
    -----
    Source: ours.
    """

    def __init__(self, context: Context, order: PeerOrder, partition_id: int) -> None:
        self.partition_id = partition_id
        self.order = order
        self.run_id = context.run_id
        self._urls = dict(zip(order.peers, order.peer_urls, strict=True))
        self._versions = dict(zip(order.peers, order.peer_versions, strict=True))
        self._urls[partition_id] = own_exchange(context, order)
        self._access = Access.of(context, order)
        self._silent: set[str] = set()
        self.fetched_bytes = 0

    def fetch(self, peer: int, layer: int, expert: int) -> Expert | None:
        """Return a peer's expert, None if it cannot be had; a silent peer is asked once only."""
        url = self._urls.get(peer)
        if not url or url in self._silent:
            return None
        try:
            tensors = self._at(url).get(self._name(peer, self._versions[peer], layer, expert))
        except (ExchangeError, ValueError) as error:  # ValueError: the peer's address is none
            if isinstance(error, Unreachable):
                self._silent.add(url)
            log(WARNING, "node %d: expert of node %d: %s", self.partition_id, peer, error)
            return None
        self.fetched_bytes += sum(t.numel() * t.element_size() for t in tensors.values())
        return tensors

    def own(self, version: int, layer: int, expert: int) -> Expert:
        """Return the node's own expert as it was published in round ``version``.

        Raises
        ------
        ExchangeError
            If the node's exchange does not answer or has lost it.
        """
        name = self._name(self.partition_id, version, layer, expert)
        return self._mine.get(name if self.order.peer_dtype == "float32" else name + FULL)

    def publish(
        self, version: int, experts: Mapping[tuple[int, int], Mapping[str, Tensor]]
    ) -> None:
        """Store experts by (layer, expert) at the node's exchange; ExchangeError if it fails."""
        for (layer, expert), tensors in experts.items():
            name = self._name(self.partition_id, version, layer, expert)
            if self.order.peer_dtype != "float32":
                self._mine.put(name + FULL, dict(tensors))
            self._mine.put(name, halved(tensors, self.order.peer_dtype))

    def drop(self, keep: Sequence[int]) -> None:
        """Delete the node's own experts of this run except for some versions."""
        prefix = f"r{self.run_id}.c{self.partition_id}."
        kept = tuple(f"{prefix}v{version}." for version in keep)
        for name in self._mine.names(prefix):
            if not name.startswith(kept):
                self._mine.delete(name)

    @property
    def _mine(self) -> ExchangeClient:
        return self._at(self._urls[self.partition_id])

    def _at(self, url: str) -> ExchangeClient:
        return exchange_client(url, self._access)

    def _name(self, partition_id: int, version: int, layer: int, expert: int) -> str:
        return f"r{self.run_id}.c{partition_id}.v{version}.l{layer}.e{expert}"
