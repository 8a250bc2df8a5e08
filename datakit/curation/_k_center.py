"""Greedy k-centre: the row that is farthest from all that were taken, again and again.

Source: Gonzalez 1985 (within twice the smallest radius there is); as a choice of training data,
    Sener and Savarese (1708.00489).
"""

import numpy as np
from numpy.typing import NDArray

from datakit.curation._greedy import Blend, Taken, greedy
from datakit.curation._room import Floats, Ints, Room
from datakit.models.embed import Vectors

_SLACK = 4e-6
"""More than what float32 rounds a cosine by."""

_CENTRES = 1024


def k_center(vectors: Vectors, room: Room, first: Ints, blend: Blend | None = None) -> Taken:
    """Rows taken, in order, and the cosine distance (0..2) of each to those taken before.

    The gain of the first row is 2, the greatest there is. Without `first`, the first row is the
    one of the highest bonus, or else the one nearest to the mean. vectors: float32 [n, d] of unit
    length. The same rows as the plain loop in float64: a row is compared again only when its last
    distance is beyond the radius, and then by a matrix product over all centres that it missed.
    """
    blend = blend or Blend()
    if not len(first) and room.open.any():
        first = np.array([_start(vectors, room, blend)], np.int64)
    return greedy(_Farthest(vectors, room.most, blend), room, first, pool=1024)


def _start(vectors: Vectors, room: Room, blend: Blend) -> int:
    rows = np.flatnonzero(room.open)
    if blend.bonus is not None:
        rows = rows[blend.bonus[rows] == blend.bonus[rows].max()]
    mean = vectors.mean(axis=0, dtype=np.float64)
    return int(rows[np.round(vectors[rows].astype(np.float64) @ mean, 12).argmax()])


class _Farthest:
    """Each row's nearest centre in float32 as of its last comparison; the pool in float64."""

    def __init__(self, vectors: Vectors, most: int, blend: Blend) -> None:
        self._vectors = vectors
        self._blend = blend
        self._centres = np.zeros((most, vectors.shape[1]), np.float32)
        self._count = 0
        self._best = np.full(len(vectors), -1, np.float32)
        self._seen = np.zeros(len(vectors), np.int64)
        self._rows = np.zeros(0, np.int64)
        self._gram = np.zeros((0, 0))
        self._near = np.zeros(0)

    def bounds(self, rows: Ints) -> Floats:
        for seen in np.unique(self._seen[rows]).tolist():
            behind = rows[self._seen[rows] == seen]
            vectors = self._vectors[behind]
            best = self._best[behind]
            for start in range(seen, self._count, _CENTRES):
                centres = self._centres[start : min(start + _CENTRES, self._count)]
                np.maximum(best, (vectors @ centres.T).max(axis=1), out=best)
            self._best[behind] = best
            self._seen[behind] = self._count
        return self._keys(self._best[rows].astype(np.float64) - _SLACK, rows)

    def exact(self, rows: Ints) -> Floats:
        return self._keys(self._nearest(rows), rows)

    def enter(self, rows: Ints) -> Floats:
        self._rows = rows
        self._near = self._nearest(rows)
        vectors = self._vectors[rows].astype(np.float64)
        self._gram = np.round(vectors @ vectors.T, 12)
        return self._keys(self._near, rows)

    def take(self, place: int) -> tuple[float, Floats]:
        gain = max(1 - float(self._near[place]), 0.0)
        self._centres[self._count] = self._vectors[self._rows[place]]
        self._count += 1
        np.maximum(self._near, self._gram[place], out=self._near)
        return gain, self._keys(self._near, self._rows)

    def _nearest(self, rows: Ints) -> Floats:
        """The cosine of each row to its nearest centre, -1 where there is none."""
        best = np.full(len(rows), -1.0)
        for block in range(0, len(rows), _CENTRES):
            vectors = self._vectors[rows[block : block + _CENTRES]].astype(np.float64)
            some = best[block : block + _CENTRES]
            for start in range(0, self._count, _CENTRES):
                centres = self._centres[start : min(start + _CENTRES, self._count)]
                cosines = vectors @ centres.astype(np.float64).T
                np.maximum(some, cosines.max(axis=1), out=some)
        np.round(best, 12, out=best)
        return best

    def _keys(self, cosines: Floats, rows: Ints) -> Floats:
        return self._blend.keys(1 - cosines, 1.0, rows)


def farthest(vectors: Vectors, taken: Ints) -> NDArray[np.float64]:
    """The cosine distance of each row to the nearest one taken [n]: its largest is the radius."""
    best = np.full(len(vectors), -1.0)
    for start in range(0, len(vectors), 4096):
        some = vectors[start : start + 4096] @ vectors[taken].T
        best[start : start + 4096] = some.max(axis=1)
    return 1 - best
