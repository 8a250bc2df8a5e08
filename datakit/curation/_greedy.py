"""Greedy choice by gains that only fall, exact, with few of them worked out.

Source: lazy evaluation (Minoux 1978): a gain that was true once bounds the gain of today. Here in
    pools, so that what is worked out is a matrix product and no loop: the rows of the highest
    bounds are brought up to date together, and rows are taken from among them for as long as the
    best of them beats every bound outside.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from datakit.curation._room import Floats, Ints, Room


@dataclass(frozen=True)
class Taken:
    """Row numbers in the order in which they were taken, and the gain of each; both [k]."""

    rows: Ints
    gains: Floats


@dataclass(frozen=True)
class Blend:
    """What a row is taken by: share x gain / unit + bonus of the row [n]."""

    share: float = 1.0
    bonus: Floats | None = None

    def keys(self, gains: Floats, unit: float, rows: Ints) -> Floats:
        """The keys of `rows` with `gains`; both [m]. Equal rows have equal keys."""
        keys = gains if self.share == 1 and unit == 1 else gains * (self.share / unit)
        if self.bonus is not None:
            keys = keys + self.bonus[rows]
        return np.round(keys, 12)


class Way(Protocol):
    """How a method values rows; `rows` are row numbers, keys are higher for better rows."""

    def bounds(self, rows: Ints) -> Floats:
        """Upper bounds of the keys of `rows`, quick."""
        ...

    def exact(self, rows: Ints) -> Floats:
        """The keys of `rows`."""
        ...

    def enter(self, rows: Ints) -> Floats:
        """Make `rows` the pool; their keys."""
        ...

    def take(self, place: int) -> tuple[float, Floats]:
        """Take the row at `place` of the pool: its gain, and the keys of the pool after it."""
        ...


def greedy(way: Way, room: Room, first: Ints, pool: int = 512, chunk: int = 4096) -> Taken:
    """Take `first`, then the row with the highest key again and again while there is room.

    Ties go to the lower row number. Gives what a loop over all rows would give. pool: rows that
    are kept up to date; chunk: rows that are brought up to date together.
    """
    rows: list[int] = []
    gains: list[float] = []

    def take(row: int, place: int) -> Floats:
        gain, keys = way.take(place)
        rows.append(row)
        gains.append(gain)
        room.take(row)
        return keys

    for row in first.tolist():
        way.enter(np.array([row], np.int64))
        take(row, 0)
    upper = np.full(len(room.open), np.inf)
    while room.open.any():
        members = _pool(way, room, upper, pool, chunk)
        keys = way.enter(members)
        barrier = _barrier(room, upper, members)
        best = int(keys.argmax())
        if not _beats(float(keys[best]), int(members[best]), barrier):
            # Bounds that are not tight, and many rows within their slack of the best.
            out = np.setdiff1d(np.flatnonzero(room.open & (upper >= keys[best])), members)
            upper[out] = way.exact(out)
            upper[members] = keys
            barrier = _barrier(room, upper, members)
            if not _beats(float(keys[best]), int(members[best]), barrier):
                continue
        while True:
            inside = np.where(room.open[members], keys, -np.inf)
            best = int(inside.argmax())
            if not _beats(float(inside[best]), int(members[best]), barrier):
                break
            keys = take(int(members[best]), best)
        upper[members] = keys
    return Taken(np.array(rows, np.int64), np.array(gains, np.float64))


def _pool(way: Way, room: Room, upper: Floats, pool: int, chunk: int) -> Ints:
    """The best `pool` open rows by bounds that are of today, in row order."""
    rows = np.flatnonzero(room.open)
    ranked = rows[np.argsort(-upper[rows], kind="stable")]
    done = 0
    while done < len(ranked):
        some = ranked[done : done + chunk]
        upper[some] = np.minimum(upper[some], way.bounds(some))
        done += len(some)
        if done < len(ranked):
            above = np.count_nonzero(upper[ranked[:done]] > upper[ranked[done]])
            if above >= pool:
                break
    seen = ranked[:done]
    best = seen[np.lexsort((seen, -upper[seen]))][:pool]
    return np.sort(best)


def _barrier(room: Room, upper: Floats, members: Ints) -> tuple[float, int]:
    """The highest bound outside the pool and the lowest row number that has it."""
    outside = room.open.copy()
    outside[members] = False
    bounds = np.where(outside, upper, -np.inf)
    row = int(bounds.argmax())
    return float(bounds[row]), row


def _beats(key: float, row: int, barrier: tuple[float, int]) -> bool:
    return key > -np.inf and (key, -row) > (barrier[0], -barrier[1])
