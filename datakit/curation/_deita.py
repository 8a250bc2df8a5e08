"""Score first, then distance to what is kept.

Source: Deita (2312.15685), as its code has it: rows by falling score; a row is left out where its
    cosine similarity to a kept row is over 0.9 (papers call the same number a distance).
"""

import numpy as np
from numpy.typing import NDArray

from datakit.curation._greedy import Taken
from datakit.curation._room import Floats, Ints, Room
from datakit.models.embed import Vectors

_SLACK = 1e-5
_BLOCK = 1024


def score_first(
    vectors: Vectors,
    score: Floats,
    room: Room,
    first: Ints,
    threshold: float = 0.9,  # 0.9: Deita
) -> Taken:
    """Rows taken, in order, and the score of each; ties go to the lower row number.

    vectors: float32 [n, d] of unit length; score: [n]. The rows of the published loop, compared a
    block at a time; a cosine that float32 cannot tell from the threshold is worked out in float64.
    """
    kept = np.zeros((room.most, vectors.shape[1]), np.float32)
    rows: list[int] = []
    for row in first.tolist():
        kept[len(rows)] = vectors[row]
        rows.append(row)
        room.take(row)
    order = np.flatnonzero(room.open)
    order = order[np.argsort(-score[order], kind="stable")]
    for start in range(0, len(order), _BLOCK):
        if not room.open.any():
            break
        block = order[start : start + _BLOCK]
        block = block[room.open[block]]
        block = block[~_close(vectors[block], kept[: len(rows)], threshold)]
        exact = vectors[block].astype(np.float64)
        close = exact @ exact.T > threshold
        out = np.zeros(len(block), bool)
        for place, row in enumerate(block.tolist()):
            if out[place] or not room.open[row]:
                continue
            kept[len(rows)] = vectors[row]
            rows.append(row)
            room.take(row)
            out |= close[place]
    taken = np.array(rows, np.int64)
    return Taken(taken, score[taken])


def _close(vectors: Vectors, kept: Vectors, threshold: float) -> NDArray[np.bool_]:
    """Which rows have a cosine over `threshold` to a kept one [n]."""
    close = np.zeros(len(vectors), bool)
    for start in range(0, len(kept), _BLOCK):
        cosines = vectors @ kept[start : start + _BLOCK].T
        close |= (cosines > threshold + _SLACK).any(axis=1)
        unsure = np.abs(cosines - threshold) <= _SLACK
        unsure[close] = False
        here, there = np.nonzero(unsure)
        if len(here):
            one = vectors[here].astype(np.float64)
            other = kept[start + there].astype(np.float64)
            close[here[np.einsum("nd,nd->n", one, other) > threshold]] = True
    return close
