"""Duplicate clusters from pairs of neighbours, and the one row that stays of each."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from datakit.neighbours import Pairs

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

Linkage = Literal["components", "star"]
"""components: everything that a chain of neighbours joins is one cluster. star: a row is dropped
only for a kept row that is itself a neighbour, so that no chain drifts."""

_ROUNDS = 32
"""Rounds over all edges before the rest, which can only be long chains, is walked one by one."""


def components(size: int, pairs: Pairs) -> Ints:
    """Label [size] of each row's connected component: its smallest row number."""
    labels = np.arange(size)
    while True:
        low = np.minimum(labels[pairs.first], labels[pairs.second])
        joined = labels.copy()
        np.minimum.at(joined, pairs.first, low)
        np.minimum.at(joined, pairs.second, low)
        # Also pull the old root along, or two roots joined by a leaf would stay apart.
        np.minimum.at(joined, labels[pairs.first], low)
        np.minimum.at(joined, labels[pairs.second], low)
        joined = joined[joined]
        if np.array_equal(joined, labels):
            return labels
        labels = joined


def heads(codes: NDArray[np.generic], priority: Sequence[int] | Ints) -> tuple[Ints, Ints]:
    """Rows that are the same need one comparison: the best row of each distinct code.

    codes [n]: equal for rows that are the same. Returns the row numbers of the heads, ascending
    [h], and for each row the place of its head among them [n].
    """
    order = np.asarray(priority, np.int64)
    _, first, group = np.unique(codes[order], return_index=True, return_inverse=True)
    best = order[first]
    ascending = np.argsort(best)
    place = np.empty(len(best), np.int64)
    place[ascending] = np.arange(len(best))
    of_row = np.empty(len(order), np.int64)
    of_row[order] = place[group]
    return best[ascending], of_row


def representatives(
    size: int,
    pairs: Pairs,
    priority: Sequence[int] | Ints,
    linkage: Linkage,
    fixed: Bools | None = None,
) -> Ints:
    """The row that stands for each row [size]: itself where it stays.

    priority: row numbers, the best first; it alone decides who stays, so the order of the input
    does not. fixed [size]: rows that stay whatever their neighbours, and that stand before all
    others in `priority`; a row with fixed neighbours is dropped for the nearest of them.
    """
    order = np.asarray(priority, np.int64)
    rank = np.empty(size, np.int64)
    rank[order] = np.arange(size)
    stays = np.zeros(size, np.bool_) if fixed is None else fixed
    ahead = rank[pairs.first] < rank[pairs.second]
    better = np.where(ahead, pairs.first, pairs.second)
    worse = np.where(ahead, pairs.second, pairs.first)
    loses = ~stays[worse]
    better, worse, similarity = better[loses], worse[loses], pairs.similarity[loses]
    if linkage == "components":
        labels = components(size, pairs)
        best = np.full(size, size, np.int64)
        np.minimum.at(best, labels, rank)
        stands = order[best[labels]]
        stands[stays] = np.flatnonzero(stays)
        counts = stays[better]
    else:
        stands = np.arange(size)
        counts = ~_lost(size, better, worse, rank)[better]
    better, worse, similarity = better[counts], worse[counts], similarity[counts]
    # Equally near, give or take the rounding of float32, is a tie.
    nearest = np.lexsort((rank[better], -np.round(similarity.astype(np.float64), 6), worse))
    rows, first = np.unique(worse[nearest], return_index=True)
    stands[rows] = better[nearest][first]
    return stands


def _lost(size: int, better: Ints, worse: Ints, rank: Ints) -> Bools:
    """Rows [size] with a better neighbour that is not lost itself."""
    lost = np.zeros(size, np.bool_)
    waits = np.zeros(size, np.bool_)
    for _ in range(_ROUNDS):
        if not len(better):
            return lost
        # Whoever has no better neighbour left stays, and its neighbours are lost.
        waits[worse] = True
        lost[worse[~waits[better]]] = True
        waits[worse] = False
        open_still = ~lost[worse] & ~lost[better]
        better, worse = better[open_still], worse[open_still]
    order = np.argsort(rank[worse], kind="stable")
    for one, other in zip(better[order].tolist(), worse[order].tolist(), strict=True):
        if not lost[one]:
            lost[other] = True
    return lost
