"""Which cluster sees which topics, and who gets which text; pure functions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


def topics_of_clusters(num_topics: int, num_clusters: int) -> list[tuple[int, ...]]:
    """Deal topics to clusters, two each where there are enough clusters.

    Every topic has a cluster. With as few clusters as half the topics, or fewer, the topics are
    dealt out to them in turn. Otherwise every cluster holds one pair, in the order of a
    tournament in which every topic meets every other: four topics and six clusters make all six
    pairs, more clusters begin again.

    Parameters
    ----------
    num_topics, num_clusters : int
        At least 1 of each.

    Notes
    -----
    Source: ours; pairs by the circle method.
    """
    if 2 * num_clusters <= num_topics or num_topics == 1:
        dealt = [tuple(range(k, num_topics, num_clusters)) for k in range(num_clusters)]
        return [topics or (0,) for topics in dealt]
    pairs = _tournament(num_topics)
    held = [pairs[k % len(pairs)] for k in range(num_clusters)]
    missing = set(range(num_topics)) - {topic for topics in held for topic in topics}
    return [tuple(sorted({*t, *missing})) if k == 0 else t for k, t in enumerate(held)]


def deal_by_topic(
    labels: NDArray[np.int64], holders: Sequence[Sequence[int]], seed: Sequence[int]
) -> list[Indices]:
    """Share texts out among those who hold their topics: each text to one of them.

    Parameters
    ----------
    labels : array (N,) of int
        Topic of every text.
    holders : sequence of sequence of int
        Topics of each of those who get texts.
    seed : sequence of int
        Of the draw.

    Returns
    -------
    list of arrays of int
        Sorted indices into ``labels`` for every holder: disjoint, and complete if every topic has
        a holder. Holders of one topic get evenly many texts of it.
    """
    parts: list[list[Indices]] = [[] for _ in holders]
    for topic in np.unique(labels):
        having = [i for i, topics in enumerate(holders) if topic in topics]
        rng = np.random.default_rng([*seed, int(topic)])
        members = rng.permutation(np.flatnonzero(labels == topic))
        for i, share in zip(having, np.array_split(members, max(len(having), 1)), strict=False):
            parts[i].append(share)
    none = np.empty(0, dtype=np.int64)
    return [np.sort(np.concatenate([none, *part])) for part in parts]


def _tournament(n: int) -> list[tuple[int, int]]:
    """All pairs of n players; each of the first n // 2 is of players that have not met."""
    players = list(range(n)) if n % 2 == 0 else [*range(n), -1]
    pairs = []
    for _ in range(len(players) - 1):
        meeting = zip(players[: len(players) // 2], reversed(players), strict=False)
        pairs += [(min(a, b), max(a, b)) for a, b in meeting if -1 not in (a, b)]
        players = [players[0], players[-1], *players[1:-1]]
    return pairs
