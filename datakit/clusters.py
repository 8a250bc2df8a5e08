"""Duplicate clusters from pairs of neighbours, and the one row that stays of each."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from datakit.models.embed import Vectors
from datakit.neighbours import Pairs, dots

Ints = NDArray[np.int64]

Linkage = Literal["components", "star"]
"""components: everything that a chain of neighbours joins is one cluster. star: a row is dropped
only for a kept row that is itself a neighbour, so that no chain drifts."""


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


def representatives(
    vectors: Vectors, pairs: Pairs, priority: Sequence[int], linkage: Linkage
) -> tuple[Ints, NDArray[np.float32]]:
    """For each row the row that stands for it (itself where it stays), and their similarity.

    priority: row numbers, the best first; it alone decides who stays, so the order of the input
    does not. Similarities are cosines to the representative, 1 for rows that stay.
    """
    size = len(vectors)
    rank = np.empty(size, np.int64)
    rank[np.asarray(priority, np.int64)] = np.arange(size)
    if linkage == "components":
        labels = components(size, pairs)
        best = np.full(size, size, np.int64)
        np.minimum.at(best, labels, rank)
        stands = np.asarray(priority, np.int64)[best[labels]]
    else:
        stands = _stars(size, pairs, rank, priority)
    similarity = dots(vectors, vectors, np.arange(size), stands)
    return stands, np.where(stands == np.arange(size), np.float32(1), similarity)


def _stars(size: int, pairs: Pairs, rank: Ints, priority: Sequence[int]) -> Ints:
    """Best first, a row stays unless a row that stays is its neighbour; the nearest counts."""
    better: list[list[tuple[float, int]]] = [[] for _ in range(size)]
    rows = zip(pairs.first.tolist(), pairs.second.tolist(), pairs.similarity.tolist(), strict=True)
    for one, other, similarity in rows:
        low, high = (one, other) if rank[one] < rank[other] else (other, one)
        better[high].append((similarity, low))
    stands = np.arange(size)
    for row in priority:
        kept = [
            (similarity, -rank[low], low) for similarity, low in better[row] if stands[low] == low
        ]
        if kept:
            stands[row] = max(kept)[2]
    return stands
