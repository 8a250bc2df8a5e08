"""Candidates for neighbours by a bound from a few directions: exact, for any vectors.

Each row x is written as p + r: p in the leading m principal directions, r across them. By Cauchy
and Schwarz

    <x, y> = <p, p'> + <r, r'> <= <p, p'> + |r| |r'|

and the right side is itself the dot product of the sketches [p, |r|] and [p', |r'|], m + 1 numbers
each: one small matrix product bounds every pair, and what it does not rule out is a candidate. m is
chosen by what a sample of the rows would cost, up to no sketch at all. The bound holds for any
orthonormal directions, so a bad sample costs time, never a pair.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from datakit.models.embed import Vectors

Ints = NDArray[np.int64]

_EPS = float(np.finfo(np.float32).eps)

_SKETCHES = (15, 31, 47, 63, 95, 127, 191)
"""Directions to choose from; with |r| a multiple of 16 numbers, which matrix products like."""

_SMALL = 10_000_000
"""Up to so many pairs no sketch pays for itself."""

# Nanoseconds a pair on one core; only their ratios matter, and only for the time taken.
_TILE_NS, _TILE_NS_PER_NUMBER, _CHECK_NS = 0.6, 0.02, 500.0


def candidates(
    left: Vectors, right: Vectors | None, floor: float, block: int
) -> Iterator[tuple[Ints, Ints]]:
    """Row numbers of all pairs whose cosine may be `floor` or more; i < j where right is None.

    Tile by tile of block x 4 block, the rows in turn; memory is the tile and the sketch.
    """
    other = left if right is None else right
    width = left.shape[1]
    full_floor = floor - slack(width)
    directions = _directions(left, right, floor)
    if directions is None:
        sketch, sketch_other, sketch_floor = left, other, full_floor
    else:
        sketch = _sketch(left, directions)
        sketch_other = sketch if right is None else _sketch(other, directions)
        sketch_floor = floor - slack(sketch.shape[1])
    # From so many candidates in a tile on, all of it in full is cheaper than one by one.
    crowded = _tile_ns(width) / _CHECK_NS
    product = _Product(min(block, len(left)) * min(4 * block, len(other)))
    for start in range(0, len(left), block):
        rows = slice(start, min(start + block, len(left)))
        for column in range(start if right is None else 0, len(other), 4 * block):
            columns = slice(column, min(column + 4 * block, len(other)))
            flat = product.at_least(sketch[rows], sketch_other[columns], sketch_floor)
            size = (rows.stop - start) * (columns.stop - column)
            if directions is not None and len(flat) > crowded * size:
                flat = product.at_least(left[rows], other[columns], full_floor)
            first, second = np.divmod(flat, columns.stop - column)
            first += start
            second += column
            if right is None and column < rows.stop:
                above = first < second
                first, second = first[above], second[above]
            yield first, second


class _Product:
    """Matrix products into the same memory again and again: a fresh tile costs page faults."""

    def __init__(self, size: int) -> None:
        self._values = np.empty(size, np.float32)
        self._marks = np.empty(size, bool)

    def at_least(self, rows: Vectors, columns: Vectors, floor: float) -> Ints:
        """Flat positions in rows x columns whose product is at least `floor`."""
        shape = (len(rows), len(columns))
        size = shape[0] * shape[1]
        values = np.matmul(rows, columns.T, out=self._values[:size].reshape(shape))
        marks = np.greater_equal(values, np.float32(floor), out=self._marks[:size].reshape(shape))
        return np.flatnonzero(marks)


def slack(numbers: int) -> float:
    """What float32 may add to or take from a dot product of so many numbers.

    n eps/2 |x| |y| is the bound of Higham (2002, section 3.1) for any order of the sum; the rest
    covers sketches rounded to float32 and rows a little longer than 1.
    """
    return (numbers + 8) * _EPS


def _tile_ns(numbers: int) -> float:
    return _TILE_NS + _TILE_NS_PER_NUMBER * numbers


def _directions(left: Vectors, right: Vectors | None, floor: float) -> NDArray[np.float64] | None:
    """Orthonormal [d, m], m by what a sample would cost; None where sketches do not pay."""
    other = left if right is None else right
    width = left.shape[1]
    choices = [count for count in _SKETCHES if 2 * count < width]
    if len(left) * len(other) <= _SMALL or not choices:
        return None
    some, some_other = _strided(left, 2048), _strided(other, 2048)
    both = _strided(left, 4096) if right is None else np.concatenate([some, some_other])
    directions = _principal(both.astype(np.float64), max(choices))
    # Rows that are sampled twice say nothing about pairs.
    same = min(len(some), len(some_other)) if right is None else 0
    costs = {0: _tile_ns(width)}
    for count in choices:
        one, two = (_sketch(rows, directions[:, :count]) for rows in (some, some_other))
        bound = one @ two.T
        if same:
            np.fill_diagonal(bound, -np.inf)
        share = np.count_nonzero(bound >= floor) / bound.size
        costs[count] = _tile_ns(count + 1) + min(share * _CHECK_NS, _tile_ns(width))
    best = min(costs, key=lambda count: costs[count])
    return np.ascontiguousarray(directions[:, :best]) if best else None


def _strided(rows: Vectors, most: int) -> Vectors:
    """At most so many rows, evenly spaced."""
    return rows[:: -(-len(rows) // most)]


def _principal(sample: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """The leading directions of a sample, orthonormal [d, count], the strongest first.

    Subspace iteration (Halko, Martinsson and Tropp, 2011): some steps are enough, since nothing
    but speed hangs on how well they fit.
    """
    start = np.random.default_rng(0).normal(size=(sample.shape[1], count))
    basis = np.linalg.qr(start)[0]
    for _ in range(4):
        basis = np.linalg.qr(sample.T @ (sample @ basis))[0]
    inside = sample @ basis
    turn = np.linalg.eigh(inside.T @ inside)[1][:, ::-1]
    return np.linalg.qr(basis @ turn)[0]


def _sketch(rows: Vectors, directions: NDArray[np.float64]) -> Vectors:
    """[p, |r|] of each row, float32 [n, m + 1]; in float64 until the last rounding."""
    count = directions.shape[1]
    sketch = np.empty((len(rows), count + 1), np.float32)
    for start in range(0, len(rows), 4096):
        part = rows[start : start + 4096].astype(np.float64)
        inside = part @ directions
        left = np.einsum("nd,nd->n", part, part) - np.einsum("nm,nm->n", inside, inside)
        sketch[start : start + 4096, :count] = inside
        sketch[start : start + 4096, count] = np.sqrt(np.maximum(left, 0))
    return sketch
