"""Ways to share samples out over clients: pure functions of labels, sizes and seeds."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

PARTITIONS = ("iid", "dirichlet")

Indices = NDArray[np.int64]


def check_shares(
    num_samples: int, num_clients: int, partition: str, dirichlet_alpha: float, min_samples: int
) -> None:
    """Check, without drawing, that :func:`share_out` can share samples out.

    Raises
    ------
    ValueError
        If the partition is unknown, alpha is not above 0, or there are too few samples.
    """
    if partition not in PARTITIONS:
        raise ValueError(f"partition is {partition!r}, expected one of {', '.join(PARTITIONS)}")
    check_alpha(partition, dirichlet_alpha)
    most = num_samples // min_samples
    if not 1 <= num_clients <= most:
        raise ValueError(
            f"num-clients is {num_clients}, expected 1 to {most}: {num_samples} samples are "
            f"shared out and every client needs {min_samples}"
        )


def check_alpha(partition: str, dirichlet_alpha: float) -> None:
    """Raise ValueError unless the partition does without alpha, or it is above 0."""
    if partition == "dirichlet" and not 0 < dirichlet_alpha < np.inf:
        raise ValueError(f"dirichlet-alpha is {dirichlet_alpha}, expected a finite number above 0")


def check_size(key: str, value: int, most: int) -> None:
    """Raise ValueError where more samples are asked for than there are."""
    if value > max(most, 0):
        raise ValueError(f"{key} is {value}, expected at most {max(most, 0)} with this data")


def share_out(
    labels: NDArray[np.int64],
    num_clients: int,
    partition: str,
    dirichlet_alpha: float,
    seed: int,
    min_samples: int = 1,
) -> list[Indices]:
    """Share samples out over clients.

    Parameters
    ----------
    labels : array (N,) of int
        Class of every sample.
    num_clients : int
        At least 1.
    partition : str
        ``iid``: even shares of shuffled samples. ``dirichlet``: every class is dealt to the
        clients in proportions drawn for it, so that clients differ in their mix of classes and
        in how much they have.
    dirichlet_alpha : float
        Concentration: small values give clients of few classes. Unused with ``iid``.
    seed : int
        Same seed, same shares, in any process.
    min_samples : int
        Every client gets at least that many. A client that a draw leaves with fewer is filled
        up with samples of the largest shares, so that every alpha works.

    Returns
    -------
    list of arrays of int
        Sorted indices into ``labels`` of every client: disjoint, together complete.

    Raises
    ------
    ValueError
        As :func:`check_shares`.

    Notes
    -----
    Source: ``IidPartitioner`` and ``DirichletPartitioner``, without self-balancing, of
    flwr-datasets; Dirichlet draws by Yurochkin et al. 2019. Filling up is ours: drawing again
    until all shares are large enough fails at the small alphas and many clients that are common.
    """
    check_shares(len(labels), num_clients, partition, dirichlet_alpha, min_samples)
    rng = np.random.default_rng([seed, 6])
    order = rng.permutation(len(labels))
    drawn = _partitions(labels[order], num_clients, partition, dirichlet_alpha, seed)
    return _filled_up([np.sort(order[part]) for part in drawn], min_samples, rng)


def balanced_draw(
    labels: NDArray[np.int64], size: int, num_classes: int, rng: np.random.Generator
) -> Indices:
    """Draw samples without replacement, as many of each class as can be.

    Parameters
    ----------
    labels : array (N,) of int
        Class of every sample, 0 to ``num_classes`` - 1.
    size : int
        How many to draw, at most N.
    num_classes : int
        Classes; what does not divide evenly goes to the first classes.
    rng : numpy.random.Generator
        Draws.

    Returns
    -------
    array (size,) of int
        Sorted indices. A class with too few samples gives all, and the others make up for it.
    """
    order = rng.permutation(len(labels))
    ranks = np.empty(len(labels), dtype=np.int64)
    for c in range(num_classes):
        members = order[labels[order] == c]
        ranks[members] = np.arange(len(members))
    # The first of every class come before the second of any.
    return np.sort(np.lexsort((labels, ranks))[:size])


def matching_draw(
    labels: NDArray[np.int64],
    wanted_labels: NDArray[np.int64],
    size: int,
    num_classes: int,
    rng: np.random.Generator,
) -> Indices:
    """Draw samples without replacement whose classes are mixed as in ``wanted_labels``.

    Parameters
    ----------
    labels : array (N,) of int
        Class of every sample that can be drawn.
    wanted_labels : array (M,) of int
        Sets the mix; M at least 1.
    size : int
        How many to draw, less the rounding down of every class.
    num_classes : int
        Classes.
    rng : numpy.random.Generator
        Draws.

    Returns
    -------
    array of int
        Sorted indices. Where a class has too few samples all counts shrink alike, so that the mix
        stays. Every class of the mix that has samples is drawn at least once.
    """
    mix = np.bincount(wanted_labels, minlength=num_classes) / len(wanted_labels)
    held = np.bincount(labels, minlength=num_classes)
    present = (mix > 0) & (held > 0)
    total = np.min(held[present] / mix[present], initial=float(size))
    counts = np.where(present, np.maximum(1, np.floor(total * mix + 1e-9)), 0)
    counts = np.minimum(counts, held).astype(np.int64)
    order = rng.permutation(len(labels))
    picks = [order[labels[order] == c][: counts[c]] for c in range(num_classes)]
    return np.sort(np.concatenate(picks))


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


def hold_out(share: Indices, seed: int) -> tuple[Indices, Indices]:
    """Split one client's share into three quarters for training and one for testing.

    Parameters
    ----------
    share : ndarray
        (n,) indices, at least two.
    seed : int
        Of the choice.

    Returns
    -------
    train, test : ndarray
        Indices; n // 4 of them, at least one, are held out.
    """
    mixed = np.random.default_rng([seed, 4]).permutation(share)
    held_out = max(len(mixed) // 4, 1)
    return mixed[held_out:], mixed[:held_out]


def class_names(num_groups: int, num_classes: int, seed: int) -> NDArray[np.int64]:
    """Give every group of clients names of its own for the classes.

    The classes stand in a circle in an order drawn from the seed; group g calls each by the name
    of the one g places on. Group 0 thus uses the true names, and no two groups agree on any.

    Parameters
    ----------
    num_groups, num_classes : int
        How many there are of each.
    seed : int
        Of the order in the circle.

    Returns
    -------
    ndarray
        (groups, classes) int64: the name that group g gives to class c.

    Raises
    ------
    ValueError
        If there is no group or more groups than classes.
    """
    if not 1 <= num_groups <= num_classes:
        raise ValueError(
            f"num-groups is {num_groups}, expected 1 to {num_classes}, the number of classes"
        )
    circle = np.random.default_rng([seed, 5]).permutation(num_classes)
    names = np.empty((num_groups, num_classes), np.int64)
    for group in range(num_groups):
        names[group, circle] = np.roll(circle, -group)
    return names


def _partitions(
    labels: NDArray[np.int64], num_clients: int, partition: str, alpha: float, seed: int
) -> list[Indices]:
    # Imported late: they take seconds, and only tasks that partition need them.
    from datasets import Dataset
    from flwr_datasets.partitioner import DirichletPartitioner, IidPartitioner, Partitioner

    partitioner: Partitioner
    if partition == "iid":
        partitioner = IidPartitioner(num_clients)
    else:
        partitioner = DirichletPartitioner(
            num_clients,
            partition_by="label",
            alpha=alpha,
            min_partition_size=0,
            self_balancing=False,
            shuffle=False,
            seed=seed,
        )
    partitioner.dataset = Dataset.from_dict({"label": labels, "row": np.arange(len(labels))})
    logger = logging.getLogger("flwr_datasets")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        parts = [partitioner.load_partition(k).with_format("numpy") for k in range(num_clients)]
    finally:
        logger.setLevel(level)
    return [np.asarray(part["row"][:], dtype=np.int64) for part in parts]


def _filled_up(shares: list[Indices], least: int, rng: np.random.Generator) -> list[Indices]:
    for k in range(len(shares)):
        while len(shares[k]) < least:
            largest = int(np.argmax([len(other) for other in shares]))
            spare = min(least - len(shares[k]), max(1, (len(shares[largest]) - least) // 2))
            given = rng.choice(len(shares[largest]), size=spare, replace=False)
            shares[k] = np.sort(np.concatenate([shares[k], shares[largest][given]]))
            shares[largest] = np.delete(shares[largest], given)
    return shares


def _tournament(n: int) -> list[tuple[int, int]]:
    """All pairs of n players; each of the first n // 2 is of players that have not met."""
    players = list(range(n)) if n % 2 == 0 else [*range(n), -1]
    pairs = []
    for _ in range(len(players) - 1):
        meeting = zip(players[: len(players) // 2], reversed(players), strict=False)
        pairs += [(min(a, b), max(a, b)) for a, b in meeting if -1 not in (a, b)]
        players = [players[0], players[-1], *players[1:-1]]
    return pairs
