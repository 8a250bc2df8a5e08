"""Published filters as orders of rows, weights of rows, and where a gain curve flattens.

Source: Magpie (2406.08464, its notebook): instructions that do not end in a colon, a reward over a
    floor, then the longest responses. `lowest` by a measure: BLEUBERI (2505.11080), which takes
    the rows with the lowest BLEU. The knee of a curve: Satopää et al. 2011 (Kneedle).
"""

import numpy as np
from numpy.typing import ArrayLike

from datakit.curation._greedy import Taken
from datakit.curation._room import Floats, Ints, Room


def in_order(worth: Floats, room: Room, first: Ints) -> Taken:
    """Rows by falling worth while there is room, and the worth of each; worth: [n].

    Ties go to the lower row number.
    """
    rows: list[int] = []
    for row in first.tolist():
        rows.append(row)
        room.take(row)
    if room.open.any():
        for row in np.argsort(-worth, kind="stable").tolist():
            if room.open[row]:
                rows.append(row)
                # Only a row that closes others can have closed the last.
                if room.take(row) and not room.open.any():
                    break
    taken = np.array(rows, np.int64)
    return Taken(taken, worth[taken])


def percentiles(values: Floats) -> Floats:
    """Each value's place among all, 0..1; equal values share theirs; NaN is below all. [n]."""
    if len(values) < 2:
        return np.ones(len(values))
    known = np.where(np.isnan(values), -np.inf, values)
    _, place, counts = np.unique(known, return_inverse=True, return_counts=True)
    below = np.cumsum(counts) - counts
    return (below + (counts - 1) / 2)[place] / (len(values) - 1)


def flattens_at(gains: ArrayLike) -> int:
    """How many rows lie before the knee of a gain curve: the sum of gains over the rows taken.

    gains: of each row, in the order taken [k]. The knee is where the curve is farthest above the
    line from its start to its end; k where it has none, as when all gains are equal.
    """
    values = np.asarray(gains, np.float64)
    total = float(values.sum())
    if len(values) < 2 or total <= 0:
        return len(values)
    above = np.cumsum(values) / total - np.arange(1, len(values) + 1) / len(values)
    return int(above.argmax()) + 1 if above.max() > 1e-9 else len(values)
