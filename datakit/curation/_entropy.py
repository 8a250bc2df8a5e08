"""Greedy maximum entropy (log-determinant) over embeddings.

Source: greedy maximisation of a submodular function (Nemhauser et al. 1978), lazily (Minoux 1978);
    the log-determinant under a linear kernel as in Bayesian experimental design; for the `rbf`
    kernel, the fast greedy MAP of Chen et al. (1709.05135).
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from datakit.curation._greedy import Blend, Taken, greedy
from datakit.curation._room import Floats, Ints, Room
from datakit.errors import InputError
from datakit.models.embed import Vectors

Kernel = Literal["linear", "rbf"]

RBF_CELLS = 200_000_000
"""Rows x budget of the rbf kernel, 4 bytes each."""


def entropy(
    vectors: Vectors, room: Room, first: Ints, noise: float, blend: Blend | None = None
) -> Taken:
    """Rows taken, in order, and the information gain of each in nats.

    The gain of a row is ½ log(1 + v/noise), v being the variance that the rows taken before leave
    of it under a linear kernel. vectors: [n, d]. The same rows as a dense greedy, at d² for each
    row that is looked at again instead of d for every row.
    """
    way = _Linear(vectors, room.most, noise, blend or Blend())
    return greedy(way, room, first)


class _Linear:
    """Keeps the inverse of I + XᵀX/noise for the rows X taken so far, in float64.

    Each row taken lessens the variance of x by (x · direction)²: a row that missed fewer than d of
    them is brought up to date by these, any other by the inverse.
    """

    def __init__(self, vectors: Vectors, most: int, noise: float, blend: Blend) -> None:
        width = vectors.shape[1]
        self._vectors = vectors
        self._noise = noise
        self._blend = blend
        self._unit = 0.5 * float(np.log1p(1 / noise)) if blend.bonus is not None else 1.0
        self._gram = np.eye(width)
        self._inverse = np.eye(width)
        self._new: list[Floats] = []
        self._directions = np.zeros((most, width))
        self._count = 0
        self._left = np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64)
        self._seen = np.zeros(len(vectors), np.int64)
        self._rows = np.zeros(0, np.int64)
        self._pool = np.zeros((0, width))
        self._now = np.zeros(0)

    def bounds(self, rows: Ints) -> Floats:
        for seen in np.unique(self._seen[rows]).tolist():
            behind = rows[self._seen[rows] == seen]
            if seen == self._count:
                continue
            vectors = self._vectors[behind].astype(np.float64)
            if self._count - seen < vectors.shape[1]:
                parts = vectors @ self._directions[seen : self._count].T
                self._left[behind] -= np.einsum("nk,nk->n", parts, parts)
            else:
                self._left[behind] = self._variance(vectors)
        self._seen[rows] = self._count
        return self._keys(self._left[rows], rows)

    exact = bounds

    def enter(self, rows: Ints) -> Floats:
        self._renew()
        self._rows = rows
        self._pool = self._vectors[rows].astype(np.float64)
        self._now = self._variance(self._pool)
        self._left[rows] = self._now
        self._seen[rows] = self._count
        return self._keys(self._now, rows)

    def take(self, place: int) -> tuple[float, Floats]:
        row = self._pool[place].copy()
        variance = max(float(self._now[place]), 0.0)
        direction = (self._inverse @ row) / np.sqrt(variance + self._noise)
        self._inverse -= np.multiply.outer(direction, direction)
        self._now -= (self._pool @ direction) ** 2
        self._directions[self._count] = direction
        self._count += 1
        self._new.append(row)
        return 0.5 * float(np.log1p(variance / self._noise)), self._keys(self._now, self._rows)

    def _variance(self, rows: Floats) -> Floats:
        return np.einsum("nd,nd->n", rows @ self._inverse, rows)

    def _keys(self, variance: Floats, rows: Ints) -> Floats:
        gains = 0.5 * np.log1p(np.maximum(variance, 0) / self._noise)
        return self._blend.keys(gains, self._unit, rows)

    def _renew(self) -> None:
        """The inverse from what was taken, so that no error of its updates adds up."""
        if len(self._new) >= self._vectors.shape[1]:
            added = np.array(self._new)
            self._gram += added.T @ added / self._noise
            self._inverse = np.linalg.inv(self._gram)
            self._inverse = (self._inverse + self._inverse.T) / 2
            self._new = []


def rbf_entropy(
    vectors: Vectors,
    room: Room,
    first: Ints,
    noise: float,
    width: float,
    blend: Blend | None = None,
) -> Taken:
    """As `entropy`, under the kernel exp((cosine - 1) / width²), which does not saturate at d rows.

    Every row is updated at every step: n (d + k) time each, n x k floats of memory. Raises
    InputError where that is over RBF_CELLS.
    """
    blend = blend or Blend()
    rows_in, most = len(vectors), room.most
    if rows_in * most > RBF_CELLS:
        raise InputError(
            f"`kernel: rbf` over {rows_in:,} rows with a budget of {most:,} needs "
            f"{rows_in * most * 4 / 1e9:.1f} GB; use `kernel: linear` or a lower budget"
        )
    unit = 0.5 * float(np.log1p(1 / noise)) if blend.bonus is not None else 1.0
    every = np.arange(rows_in)
    factor: NDArray[np.float32] = np.zeros((most, rows_in), np.float32)
    left = np.ones(rows_in)
    rows: list[int] = []
    gains: list[float] = []
    forced = first.tolist()
    while len(rows) < len(forced) or room.open.any():
        now = 0.5 * np.log1p(np.maximum(left, 0) / noise)
        if len(rows) < len(forced):
            best = forced[len(rows)]
        else:
            best = int(np.where(room.open, blend.keys(now, unit, every), -np.inf).argmax())
        count = len(rows)
        # Some BLAS kernels raise the flag for lanes that hold nothing.
        with np.errstate(invalid="ignore"):
            kernel = np.exp((vectors @ vectors[best] - 1) / width**2)
            known = factor[:count, best] @ factor[:count]
        column = (kernel - known) / np.sqrt(max(left[best], 0) + noise)
        factor[count] = column
        rows.append(best)
        gains.append(float(now[best]))
        left -= column.astype(np.float64) ** 2
        room.take(best)
    return Taken(np.array(rows, np.int64), np.array(gains))
