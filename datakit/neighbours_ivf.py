"""Candidates for neighbours by an inverted file: approximate, for sets too large for all pairs.

Training the cells costs more than it saves on a hundred thousand rows, where the exact search is
faster; all pairs grow with the square of the rows, cells with less.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datakit.errors import InputError
from datakit.models.embed import Vectors

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class IVF:
    """Approximate search in an inverted file (Sivic and Zisserman, 2003; faiss `IndexIVFFlat`).

    lists: k-means cells, None for 4 √n. probes: cells that are searched for each row. sample:
    rows whose neighbours are also computed in full, for `Pairs.recall`.
    """

    lists: int | None = None
    probes: int = 8
    sample: int = 1000
    seed: int = 0


def candidates(vectors: Vectors, floor: float, ivf: IVF) -> Iterator[tuple[Ints, Ints]]:
    """Rows i < j that share a cell and have a cosine of at least `floor`; a pair may come twice.

    Raises InputError for cells, probes or a sample that the rows do not allow.
    """
    import faiss  # pyright: ignore[reportMissingTypeStubs]

    size, width = vectors.shape
    lists = ivf.lists if ivf.lists is not None else min(round(4 * size**0.5), size)
    if not 1 <= lists <= size or ivf.probes < 1 or ivf.sample < 1:
        raise InputError(
            f"IVF(lists={lists}, probes={ivf.probes}, sample={ivf.sample}) over {size} rows: take "
            f"between 1 and {size} lists, and at least one probe and one sampled row"
        )
    # Named, since the index only borrows it.
    quantizer = faiss.IndexFlatIP(width)
    index: Any = faiss.IndexIVFFlat(quantizer, width, lists, faiss.METRIC_INNER_PRODUCT)
    index.cp.seed, index.cp.spherical = ivf.seed, True
    index.cp.min_points_per_centroid = 1
    index.train(vectors)
    index.add(vectors)
    index.nprobe = min(ivf.probes, lists)
    for start in range(0, size, 4096):
        offsets, _, labels = index.range_search(vectors[start : start + 4096], floor)
        counts = np.diff(offsets.astype(np.int64))
        rows = np.repeat(np.arange(start, start + len(counts)), counts)
        # A row may find another whose own probes miss it: both ways count.
        first, second = np.minimum(rows, labels), np.maximum(rows, labels)
        yield first[first < second], second[first < second]
