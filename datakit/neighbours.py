"""Cosine neighbours: exact by a proven bound, with memory bounded by the block size.

Vectors are float32 [n, d] of unit length (a row of zeros is allowed: its cosine to everything is
0), so that a dot product is a cosine similarity. Never a distance.

All pairs above a threshold are found in two passes: candidates by a cheap bound that no true pair
can fail (`neighbours_sketch` on the CPU, `neighbours_gpu` in half precision) or by an inverted
file that may miss some (`neighbours_ivf`), then the exact cosine of each candidate.

Results do not depend on the block, on the order of the rows or on the sketch: every similarity is
the same float32 sum over the same two rows (`dots`), and that sum alone decides at the threshold.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from datakit.errors import InputError
from datakit.models.embed import Vectors
from datakit.neighbours_gpu import Device, accelerator
from datakit.neighbours_gpu import candidates as gpu_candidates
from datakit.neighbours_ivf import IVF
from datakit.neighbours_ivf import candidates as ivf_candidates
from datakit.neighbours_sketch import candidates as sketch_candidates
from datakit.neighbours_sketch import slack

Ints = NDArray[np.int64]
_ROUNDING = 1e-6
"""The cosine of two equal vectors is 1 give or take this, in float32."""

_LENGTH = 1.001
"""Rows may be this long; a little more than 1 for rounding in whoever scaled them."""


@dataclass(frozen=True)
class Pairs:
    """Neighbours: row numbers `first` and `second` and their cosine `similarity`, all [m].

    Sorted by first, then second. Within one set first < second. recall: share of the true pairs
    that were found, measured on sampled rows where the search is approximate; 1 where it is exact.
    """

    first: Ints
    second: Ints
    similarity: NDArray[np.float32]
    recall: float = 1.0


def pairs_over(
    vectors: Vectors,
    threshold: float,
    block: int = 512,
    *,
    limit: int = 50_000_000,
    device: Device = "cpu",
    approximate: IVF | None = None,
) -> Pairs:
    """Every pair of rows i < j with a cosine of at least `threshold`.

    Rounding counts for the pair: equal rows are neighbours at a threshold of 1. block: rows that
    are compared at a time with 4 x block others. Beside the input, memory is n x 64 to n x 192
    floats of sketch, the tile and 20 bytes a pair (twice that for a moment at the end).

    Raises InputError for more than `limit` pairs, and for vectors that are not finite, not [n, d]
    or longer than 1.
    """
    rows = _checked(vectors)
    if len(rows) < 2:
        return _none()
    if approximate is not None:
        return _inverted_pairs(rows, threshold, limit, approximate)
    return _exact_pairs(rows, None, threshold, block, limit, device)


def pairs_between(
    vectors: Vectors,
    others: Vectors,
    threshold: float,
    block: int = 512,
    *,
    limit: int = 50_000_000,
    device: Device = "cpu",
) -> Pairs:
    """Every row of `vectors` (first) and row of `others` (second) with a cosine >= `threshold`.

    Memory, rounding and errors as in `pairs_over`; also InputError for two widths.
    """
    left, right = _checked_two(vectors, others)
    if not len(left) or not len(right):
        return _none()
    return _exact_pairs(left, right, threshold, block, limit, device)


def k_nearest(
    vectors: Vectors, others: Vectors, k: int, *, exclude_self: bool = False, block: int = 512
) -> tuple[Ints, NDArray[np.float32]]:
    """The k rows of `others` with the highest cosine to each row of `vectors`, exactly.

    Row numbers int64 [n, k] and cosines float32 [n, k], the highest first; of equal cosines the
    lower row number comes first. exclude_self: `others` are the same rows in the same order, and
    none is its own neighbour. Memory is a tile of block x max(8 block, 4 k) floats and, if
    `others` holds more than k copies of a row, a second `others` without the last of them.

    Raises InputError where `others` has fewer than k rows to give, and as `pairs_between`.
    """
    left, right = _checked_two(vectors, others)
    if exclude_self and len(left) != len(right):
        raise InputError(
            f"exclude_self needs the same rows twice, but there are {len(left)} vectors and "
            f"{len(right)} others"
        )
    if not 1 <= k <= max(len(right) - exclude_self, 0) and len(left):
        raise InputError(
            f"k is {k}, but each row has {max(len(right) - exclude_self, 0)} others to choose "
            f"from; take k between 1 and that"
        )
    index = np.zeros((len(left), k), np.int64)
    similarity = np.zeros((len(left), k), np.float32)
    if not len(left):
        return index, similarity
    # Of equal rows only the first k (+ 1 for self) can be among the nearest of anything.
    kept = _few_copies(right, k + exclude_self)
    right = right if len(kept) == len(right) else right[kept]
    tile = min(max(8 * block, 4 * k), len(right))
    space = np.empty(min(block, len(left)) * tile, np.float32)
    itself = np.full(len(left), -1)
    if exclude_self:
        itself[kept] = np.arange(len(kept))
    for start in range(0, len(left), block):
        part = slice(start, start + block)
        own = itself[part] if exclude_self else None
        best, similarity[part] = _best(left[part], right, k, own, tile, space)
        index[part] = kept[best]
    return index, similarity


def nearest(
    vectors: Vectors, others: Vectors, block: int = 512
) -> tuple[Ints, NDArray[np.float32]]:
    """For each row of `vectors` its nearest row of `others` and their cosine, both [n].

    Of equally near rows the first. Errors as in `k_nearest`.
    """
    index, similarity = k_nearest(vectors, others, 1, block=block)
    return index[:, 0], similarity[:, 0]


def dots(one: Vectors, other: Vectors, rows: Ints, columns: Ints) -> NDArray[np.float32]:
    """Cosine of one[rows[i]] and other[columns[i]] for each i; at most 1."""
    found = np.empty(len(rows), np.float32)
    # So few rows at a time that their copies stay in the cache.
    step = max(1, 400_000 // max(one.shape[1], 1))
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        np.einsum("nd,nd->n", one[rows[part]], other[columns[part]], out=found[part])
    return np.minimum(found, 1, out=found)


# ------------------------------------------------------------------------------- exact, all pairs


def _exact_pairs(
    left: Vectors, right: Vectors | None, threshold: float, block: int, limit: int, device: Device
) -> Pairs:
    """The pairs of one set (right None) or of two."""
    accelerated = accelerator(device)
    # What `dots` itself may be off by comes on top of whatever the candidates are off by.
    floor = threshold - _ROUNDING - slack(left.shape[1])
    if accelerated:
        found = gpu_candidates(left, right, floor, accelerated)
    else:
        found = sketch_candidates(left, right, floor, block)
    return _decided(left, left if right is None else right, found, threshold, limit)


def _decided(
    left: Vectors,
    right: Vectors,
    found: Iterator[tuple[Ints, Ints]],
    threshold: float,
    limit: int,
    times: int = 1,
) -> Pairs:
    """Of the candidates those at the threshold, with their cosines, sorted.

    times: how often a pair may come, at most.
    """
    parts: list[tuple[Ints, Ints, NDArray[np.float32]]] = []
    total = 0
    for rows, columns in found:
        for start in range(0, len(rows), 1_000_000):
            first, second = rows[start : start + 1_000_000], columns[start : start + 1_000_000]
            similarity = dots(left, right, first, second)
            near = similarity >= np.float32(threshold - _ROUNDING)
            parts.append((first[near], second[near], similarity[near]))
            total += len(parts[-1][0])
            if total > times * limit:
                raise _too_many(limit, threshold, len(left), len(right))
    if not total:
        return _none()
    first = np.concatenate([part[0] for part in parts])
    second = np.concatenate([part[1] for part in parts])
    similarity = np.concatenate([part[2] for part in parts])
    parts.clear()
    order = np.argsort(first * len(right) + second, kind="stable")
    return Pairs(first[order], second[order], similarity[order])


def _none() -> Pairs:
    return Pairs(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))


# ---------------------------------------------------------------------------------------- nearest


def _best(
    rows: Vectors, others: Vectors, k: int, own: Ints | None, tile: int, space: Vectors
) -> tuple[Ints, NDArray[np.float32]]:
    """The k nearest of some rows, tile by tile, by exact cosines in the end.

    own: of each row the number in `others` that it does not get, -1 for none. space: flat memory
    for a tile, since a fresh one for each costs page faults.
    """
    # Whatever is among the k best by exact cosines is this near to the k-th best by products:
    # both may be off by the slack.
    margin = np.float32(2 * slack(rows.shape[1]))
    floor = np.full(len(rows), -np.inf, np.float32)
    near, column = np.zeros(0, np.int64), np.zeros(0, np.int64)
    value = np.zeros(0, np.float32)
    for start in range(0, len(others), tile):
        part = others[start : start + tile]
        width = len(part)
        products = space[: len(rows) * width].reshape(len(rows), width)
        np.matmul(rows, part.T, out=products)
        if own is not None:
            here = np.flatnonzero((own >= start) & (own < start + width))
            products[here, own[here] - start] = -np.inf
        if not start and width > k:
            floor = np.partition(products, width - k, axis=1)[:, width - k] - margin
        flat = np.flatnonzero(products >= floor[:, None])
        flat = flat[products.ravel()[flat] > -np.inf]
        if not len(flat):
            continue
        near = np.concatenate([near, flat // width])
        column = np.concatenate([column, flat % width + start])
        value = np.concatenate([value, products.ravel()[flat]])
        # By row, then the highest first, as one number, which sorts fastest.
        order = np.argsort(4.0 * near - value)
        near, column, value = near[order], column[order], value[order]
        counts = np.bincount(near, minlength=len(rows))
        full = np.flatnonzero(counts >= k)
        floor[full] = value[(np.cumsum(counts) - counts)[full] + k - 1] - margin
        stays = value >= floor[near]
        if np.count_nonzero(stays) > len(rows) * (4 * k + 256):
            # Too many all but equal: their exact cosines tell who goes.
            stays = _first_k(rows, others, near, column, k)[0]
        near, column, value = near[stays], column[stays], value[stays]
    order, similarity = _first_k(rows, others, near, column, k)
    return column[order].reshape(-1, k), similarity.reshape(-1, k)


def _first_k(
    rows: Vectors, others: Vectors, near: Ints, column: Ints, k: int
) -> tuple[Ints, NDArray[np.float32]]:
    """Which candidates are the k best of each row, sorted, and their cosines."""
    exact = dots(rows, others, near, column)
    order = np.lexsort((column, -exact, near))
    counts = np.bincount(near, minlength=len(rows))
    rank = np.arange(len(near)) - np.repeat(np.cumsum(counts) - counts, counts)
    order = order[rank < k]
    return order, exact[order]


def _few_copies(rows: Vectors, most: int) -> Ints:
    """Row numbers without the copies of a row that come after so many of it."""
    keys = rows.view(np.dtype((np.void, rows.itemsize * rows.shape[1]))).ravel()
    _, group, counts = np.unique(keys, return_inverse=True, return_counts=True)
    if counts.max() <= most:
        return np.arange(len(rows))
    order = np.argsort(group, kind="stable")
    rank = np.empty(len(rows), np.int64)
    rank[order] = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.flatnonzero(rank < most)


# ------------------------------------------------------------------------------------ approximate


def _inverted_pairs(vectors: Vectors, threshold: float, limit: int, ivf: IVF) -> Pairs:
    """Pairs by an inverted file, decided by their exact cosines; recall from sampled rows."""
    floor = threshold - _ROUNDING - 2 * slack(vectors.shape[1])
    # Most pairs are found from both ends.
    twice = _decided(vectors, vectors, ivf_candidates(vectors, floor, ivf), threshold, limit, 2)
    new = np.ones(len(twice.first), bool)
    new[1:] = (np.diff(twice.first) != 0) | (np.diff(twice.second) != 0)
    pairs = Pairs(twice.first[new], twice.second[new], twice.similarity[new])
    if len(pairs.first) > limit:
        raise _too_many(limit, threshold, len(vectors), len(vectors))
    return replace(pairs, recall=_recall(vectors, pairs, threshold, limit, ivf))


def _recall(vectors: Vectors, pairs: Pairs, threshold: float, limit: int, ivf: IVF) -> float:
    """Share of the true neighbours of sampled rows that are among the pairs; 1 without any."""
    draw = np.random.default_rng(ivf.seed)
    rows = np.sort(draw.choice(len(vectors), min(ivf.sample, len(vectors)), replace=False))
    exact = pairs_between(vectors[rows], vectors, threshold, limit=2 * limit + len(rows))
    first, second = rows[exact.first], exact.second
    true = np.unique(np.minimum(first, second) * len(vectors) + np.maximum(first, second))
    true = true[true // len(vectors) != true % len(vectors)]
    had = np.isin(true, pairs.first * len(vectors) + pairs.second)
    return float(had.mean()) if len(true) else 1.0


# ----------------------------------------------------------------------------------------- checks


def _checked(vectors: Vectors) -> Vectors:
    """The same rows as contiguous float32, if they are finite and of unit length."""
    if vectors.ndim != 2 or (len(vectors) and not vectors.shape[1]):
        raise InputError(
            f"vectors are [n, d] with d >= 1, but these have the shape {vectors.shape}"
        )
    rows = np.ascontiguousarray(vectors, np.float32)
    squares = np.einsum("nd,nd->n", rows, rows)
    wrong = ~(squares <= _LENGTH**2)
    if wrong.any():
        row = int(wrong.argmax())
        raise InputError(
            f"row {row} of the vectors has the length {float(np.sqrt(squares[row])):g}, but a "
            f"cosine needs at most 1; scale the rows to unit length"
        )
    return rows


def _checked_two(vectors: Vectors, others: Vectors) -> tuple[Vectors, Vectors]:
    left = _checked(vectors)
    right = left if others is vectors else _checked(others)
    if len(left) and len(right) and left.shape[1] != right.shape[1]:
        raise InputError(
            f"the vectors have {left.shape[1]} numbers and the others {right.shape[1]}; embed both "
            f"with the same embedder"
        )
    return left, right


def _too_many(limit: int, threshold: float, rows: int, columns: int) -> InputError:
    return InputError(
        f"more than {limit} pairs have a cosine of at least {threshold:g} among {rows} x {columns} "
        f"rows; raise the threshold, or merge equal rows first"
    )
