"""Facility location: rows such that every row of the table has a similar one among them.

Source: facility location (Cornuéjols et al. 1977) as a choice of training data, greedily (Lin and
    Bilmes 2009; Wei et al. 2015), on the graph of nearest neighbours where the table is large.
    The graph is found cluster by cluster, as an inverted file would (Jégou et al. 2011).
"""

import numpy as np
from numpy.typing import NDArray

from datakit.curation._greedy import Blend, Taken
from datakit.curation._room import Floats, Ints, Room
from datakit.models.embed import Vectors
from datakit.neighbours import dots, k_nearest

DENSE = 4096
"""Tables of up to so many rows use all similarities."""

EXACT_GRAPH = 20_000
"""Tables of up to so many rows have an exact graph."""

REACH = 0.6
"""The share of a larger table that each row is compared with."""

_ONE = 1 << 30
"""Similarities are whole numbers of 1/_ONE: their sums are exact, whatever their order."""

_CLOSED = -(1 << 62)


def facility(
    vectors: Vectors,
    room: Room,
    first: Ints,
    neighbours: int = 32,
    blend: Blend | None = None,
    dense: int = DENSE,
) -> Taken:
    """Rows taken, in order, and what each adds to the sum over all rows of the best cosine.

    vectors: float32 [n, d] of unit length. Over `dense` rows, a row is served by its `neighbours`
    nearest rows only, and what it gains counts from the cosine of the last of them, since
    something of that cosine serves it anyway. Greedy: within 1 - 1/e of the best on that graph.
    """
    blend = blend or Blend()
    unit = len(vectors) / max(room.most, 1) if blend.bonus is not None else 1.0
    if len(vectors) <= max(dense, neighbours + 1):
        table: _Dense | _Graph = _Dense(vectors)
    else:
        index, similarity = neighbour_graph(vectors, neighbours)
        table = _Graph(index, similarity)
    every = np.arange(len(vectors))
    rows: list[int] = []
    gains: list[int] = []
    forced = first.tolist()
    while len(rows) < len(forced) or room.open.any():
        if len(rows) < len(forced):
            best = forced[len(rows)]
        elif blend.bonus is None:
            best = int(table.gains.argmax())
            if not room.open[best]:
                # Rows that were closed before the first was taken.
                table.gains[~room.open] = _CLOSED
                continue
        else:
            keys = blend.keys(table.gains / _ONE, unit, every)
            best = int(np.where(room.open, keys, -np.inf).argmax())
        rows.append(best)
        gains.append(int(table.gains[best]))
        table.serve(best)
        table.gains[best] = _CLOSED
        if room.take(best):
            table.gains[~room.open] = _CLOSED
    return Taken(np.array(rows, np.int64), np.maximum(np.array(gains, np.float64), 0) / _ONE)


class _Dense:
    """The gain of every row, kept up to date over all similarities."""

    def __init__(self, vectors: Vectors) -> None:
        exact = vectors.astype(np.float64)
        self._similarity = _whole(exact @ exact.T)
        self._served = np.zeros(len(vectors), np.int64)
        self.gains = np.maximum(self._similarity, 0).sum(axis=0, dtype=np.int64)

    def serve(self, row: int) -> None:
        better = np.flatnonzero(self._similarity[row] > self._served)
        old = self._served[better]
        new = self._similarity[row][better].astype(np.int64)
        for start in range(0, len(better), 256):
            part = slice(start, start + 256)
            others = self._similarity[better[part]]
            change = np.maximum(others, new[part, None]) - np.maximum(others, old[part, None])
            self.gains += (change - (new[part] - old[part])[:, None]).sum(axis=0)
        self._served[better] = new


class _Graph:
    """The same over the neighbours of each row: index and similarity [n, k]."""

    def __init__(self, index: NDArray[np.int32], similarity: NDArray[np.float32]) -> None:
        rows, width = index.shape
        self._index = index
        self._similarity = _whole(similarity)
        self._served = np.maximum(self._similarity[:, -1], 0).astype(np.int64)
        self.gains = np.zeros(rows, np.int64)
        above = np.maximum(self._similarity - self._served[:, None], 0)
        np.add.at(self.gains, index.ravel(), above.ravel())
        # Whom a row serves: the graph the other way round.
        flat = index.ravel()
        order = np.argsort(flat, kind="stable")
        self._who = (order // width).astype(np.int32)
        self._how = self._similarity.ravel()[order]
        self._start = np.zeros(rows + 1, np.int64)
        np.cumsum(np.bincount(flat, minlength=rows), out=self._start[1:])

    def serve(self, row: int) -> None:
        reach = slice(self._start[row], self._start[row + 1])
        who, how = self._who[reach], self._how[reach].astype(np.int64)
        better = how > self._served[who]
        who, new = who[better], how[better]
        old = self._served[who]
        others = self._similarity[who]
        change = np.maximum(others, new[:, None]) - np.maximum(others, old[:, None])
        change -= (new - old)[:, None]
        np.add.at(self.gains, self._index[who].ravel(), change.ravel())
        self._served[who] = new


def _whole(similarity: NDArray[np.floating]) -> NDArray[np.int32]:
    return np.rint(np.minimum(similarity, 1) * _ONE).astype(np.int32)


def neighbour_graph(
    vectors: Vectors, neighbours: int, exact: int = EXACT_GRAPH
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """For each row itself and its nearest others, nearest first: rows and cosines [n, neighbours].

    Exact up to `exact` rows. Beyond, the rows of a cluster are compared with a share REACH of the
    table, in the clusters nearest to it, on the half of the axes that holds most of the vectors;
    what is best there is measured in full. Cosines are exact, a few neighbours are missed.
    """
    rows = len(vectors)
    if rows <= exact:
        others, cosines = k_nearest(vectors, vectors, neighbours - 1, exclude_self=True)
        index = np.concatenate([np.arange(rows)[:, None], others], axis=1, dtype=np.int32)
        itself = np.ones((rows, 1), np.float32)
        return index, np.concatenate([itself, cosines], axis=1)
    short = _main_axes(vectors)
    clusters = max(16, rows // 250)
    centres, home = _clusters(short, clusters)
    members = np.argsort(home, kind="stable")
    start = np.zeros(clusters + 1, np.int64)
    np.cumsum(np.bincount(home, minlength=clusters), out=start[1:])
    near = np.argsort(-(centres @ centres.T), axis=1, kind="stable")
    index = np.zeros((rows, neighbours), np.int32)
    similarity = np.zeros((rows, neighbours), np.float32)
    wanted = min(neighbours + neighbours // 4, rows)
    least = max(wanted, int(rows * REACH))
    for cluster in range(clusters):
        asking = members[start[cluster] : start[cluster + 1]]
        if not len(asking):
            continue
        sizes = np.cumsum(start[near[cluster] + 1] - start[near[cluster]])
        reach = near[cluster][: int(np.searchsorted(sizes, least)) + 1]
        among = np.concatenate([members[start[one] : start[one + 1]] for one in reach])
        row, column = _screened(short[asking], short[among], wanted)
        cosines = dots(vectors, vectors, asking[row], among[column])
        order = np.lexsort((-cosines, row))
        begin = np.searchsorted(row, np.arange(len(asking)))
        best = order[begin[:, None] + np.arange(neighbours)]
        index[asking] = among[column[best]]
        similarity[asking] = cosines[best]
    return _self_first(index, similarity)


def _main_axes(vectors: Vectors) -> Vectors:
    """The rows on the half of the principal axes that holds most of them; all where d is small."""
    width = vectors.shape[1]
    if width < 128:
        return vectors
    sample = vectors[np.linspace(0, len(vectors) - 1, min(len(vectors), 20_000), dtype=int)]
    _, axes = np.linalg.eigh(sample.T.astype(np.float64) @ sample)
    return vectors @ axes[:, : width // 2 - 1 : -1].astype(np.float32)


def _screened(left: Vectors, right: Vectors, count: int) -> tuple[Ints, Ints]:
    """The `count` best of `right` for each row of `left`, and a few more: sorted rows, and columns.

    The bound is the count-th best of the bests of groups of columns: no more than the count-th
    best of all, and found without sorting.
    """
    products = left @ right.T
    depth = max(1, products.shape[1] // (12 * count))
    groups = products.shape[1] // depth
    bests = products[:, : groups * depth].reshape(len(left), depth, groups).max(axis=1)
    bound = np.partition(bests, groups - count, axis=1)[:, groups - count]
    row, column = np.nonzero(products >= bound[:, None])
    return row, column


def _clusters(vectors: Vectors, clusters: int) -> tuple[Vectors, Ints]:
    """Spherical k-means over an even sample: unit centres [c, d], and the centre of each row."""
    import faiss

    sample = vectors[np.linspace(0, len(vectors) - 1, min(len(vectors), clusters * 100), dtype=int)]
    means = faiss.Kmeans(
        vectors.shape[1],
        clusters,
        niter=8,
        spherical=True,
        seed=1,
        max_points_per_centroid=len(sample),
        min_points_per_centroid=1,
    )
    means.train(sample)
    centres = np.asarray(means.centroids, np.float32)
    home = np.zeros(len(vectors), np.int64)
    for block in range(0, len(vectors), 8192):
        home[block : block + 8192] = (vectors[block : block + 8192] @ centres.T).argmax(axis=1)
    return centres, home


def _self_first(
    index: NDArray[np.int32], similarity: NDArray[np.float32]
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Each row before its neighbours, also where many rows equal it."""
    rows = np.arange(len(index), dtype=np.int32)
    found = index == rows[:, None]
    place = np.where(found.any(axis=1), found.argmax(axis=1), index.shape[1] - 1)
    index[rows, place] = index[:, 0]
    similarity[rows, place] = similarity[:, 0]
    index[:, 0] = rows
    similarity[:, 0] = 1
    return index, similarity


def coverage(vectors: Vectors, taken: Ints) -> Floats:
    """The best cosine of each row to a row taken, exact [n]; its mean is the objective."""
    best = np.zeros(len(vectors))
    for start in range(0, len(vectors), 4096):
        cosines = vectors[start : start + 4096] @ vectors[taken].T
        best[start : start + 4096] = cosines.max(axis=1)
    return best
