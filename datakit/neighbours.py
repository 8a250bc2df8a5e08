"""Cosine neighbours, exact, with memory bounded by the block size.

Vectors are float32 [n, d] of unit length, so that a dot product is a cosine similarity. Never a
distance.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from datakit.models.embed import Vectors

Ints = NDArray[np.int64]

_ROUNDING = 1e-6
"""The cosine of two equal vectors is 1 give or take this, in float32."""


@dataclass(frozen=True)
class Pairs:
    """Neighbours: row numbers `first` < `second` and their cosine `similarity`, all [m]."""

    first: Ints
    second: Ints
    similarity: NDArray[np.float32]


def pairs_over(vectors: Vectors, threshold: float, block: int = 2048) -> Pairs:
    """Every pair of rows with a cosine of at least `threshold`; memory is block x n floats.

    Rounding counts for the pair: equal rows are neighbours at a threshold of 1.
    """
    first: list[Ints] = []
    second: list[Ints] = []
    similarity: list[NDArray[np.float32]] = []
    for start in range(0, len(vectors), block):
        cosines = vectors[start : start + block] @ vectors[start:].T
        rows, columns = np.nonzero(cosines >= threshold - _ROUNDING)
        above = columns > rows
        first.append(rows[above] + start)
        second.append(columns[above] + start)
        similarity.append(np.minimum(cosines[rows[above], columns[above]], 1))
    if not first:
        none = np.zeros(0, np.int64)
        return Pairs(none, none, np.zeros(0, np.float32))
    return Pairs(np.concatenate(first), np.concatenate(second), np.concatenate(similarity))


def nearest(
    vectors: Vectors, others: Vectors, block: int = 2048
) -> tuple[Ints, NDArray[np.float32]]:
    """For each row of `vectors` its nearest row of `others` and their cosine, both [n]."""
    index = np.zeros(len(vectors), np.int64)
    similarity = np.zeros(len(vectors), np.float32)
    for start in range(0, len(vectors), block):
        cosines = vectors[start : start + block] @ others.T
        best = cosines.argmax(axis=1)
        index[start : start + block] = best
        similarity[start : start + block] = np.minimum(cosines[np.arange(len(best)), best], 1)
    return index, similarity


def dots(one: Vectors, other: Vectors, rows: Ints, columns: Ints) -> NDArray[np.float32]:
    """Cosine of one[rows[i]] and other[columns[i]] for each i."""
    return np.minimum(np.einsum("nd,nd->n", one[rows], other[columns]), 1)
