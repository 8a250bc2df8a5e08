"""Lexical near duplicates: one row stays of each cluster of rows that share most of their words.

Source: MinHash with banding (Broder 1997), as in text-dedup and FineWeb (2406.17557), but the
    Jaccard similarity of every candidate pair is computed exactly: none is dropped by estimate.
Takes: any kind.
Gives: the same kind.
Measures: `cluster_size` (rows that one stands for, itself among them; at least 1).
Drops: `near_duplicate`, naming the row that stays or that stands in `against`, and the Jaccard
    similarity to it.
"""

from dataclasses import dataclass
from typing import Any, Generic, Self

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field, model_validator

from datakit.clusters import Ints, Linkage
from datakit.curation._duplicates import Duplicates
from datakit.curation._shingles import candidates, jaccard, sketch
from datakit.curation._texts import text_column
from datakit.kit import Kit
from datakit.neighbours import Pairs
from datakit.step import In

_ROWS = 1 << 17
"""Rows whose n-grams are read at a time."""


@dataclass(frozen=True)
class _Shingles:
    """The sketches of our rows, then the reference's; n-grams are read as needed."""

    codes: NDArray[np.generic]
    bands: NDArray[np.uint32]
    rows: pl.LazyFrame
    reference: pl.DataFrame
    ours: int
    threshold: float

    def pairs(self, rows: Ints, rank: Ints) -> Pairs:
        ours = int(np.searchsorted(rows, self.ours))
        first, second = candidates(self.bands[rows], rank[rows], ours)
        found = self._jaccard(rows[first], rows[second], self.threshold)
        near = found >= self.threshold
        return Pairs(first[near], second[near], found[near].astype(np.float32))

    def similarity(self, rows: Ints, others: Ints) -> NDArray[np.float64]:
        return self._jaccard(rows, others)

    def _jaccard(self, one: Ints, other: Ints, threshold: float = 0.0) -> NDArray[np.float64]:
        """Exact similarities; 0 for pairs whose sizes alone rule `threshold` out."""
        wanted = np.unique(np.concatenate([one, other]))
        grams, sizes = self._grams(wanted)
        one, other = np.searchsorted(wanted, one), np.searchsorted(wanted, other)
        least, most = np.minimum(sizes[one], sizes[other]), np.maximum(sizes[one], sizes[other])
        near = np.flatnonzero(least >= threshold * most)
        found = np.zeros(len(one))
        found[near] = jaccard(grams, sizes, one[near], other[near])
        return found

    def _grams(self, wanted: Ints) -> tuple[NDArray[np.uint64], Ints]:
        """The n-grams of some rows (ascending) after each other, and how many each has."""
        values = [np.zeros(0, np.uint64)]
        sizes = [np.zeros(0, np.int64)]
        for start in range(0, self.ours, _ROWS):
            some = wanted[(wanted >= start) & (wanted < min(start + _ROWS, self.ours))] - start
            if len(some):
                lists = self.rows.slice(start, _ROWS).select("grams").collect()["grams"]
                _append(lists.gather(some), values, sizes)
        some = wanted[wanted >= self.ours] - self.ours
        if len(some):
            _append(self.reference["grams"].gather(some), values, sizes)
        return np.concatenate(values), np.concatenate(sizes)


def _append(lists: pl.Series, values: list[NDArray[np.uint64]], sizes: list[Ints]) -> None:
    values.append(lists.explode().to_numpy())
    sizes.append(lists.list.len().to_numpy().astype(np.int64))


class Minhash(Duplicates[In], Generic[In]):
    """Keep one of each cluster of rows with mostly the same words.

    ngram: words that make one n-gram; a text of fewer words has one n-gram, of all of them.
    threshold: Jaccard similarity of the sets of n-grams, in 0..1, from which two rows are
    neighbours. permutations, bands: rows are compared where all permutations / bands minimal
    hashes of a band are equal, which a pair of similarity s escapes with probability
    (1 - s^(permutations / bands))^bands; what is compared is compared exactly. Where more than 32
    different rows share a band, each is compared with the best and some others of them. linkage:
    `components` joins chains of neighbours, `star` drops a row only for a kept neighbour. keep,
    by, sources: who stays: `first` of the source, `longest` text, `highest` measure `by`, or by
    `source` in the order of `sources`. against: a version (`name`, `name@x.y.z`, a folder) or a
    file whose rows stay, and whose duplicates go. A new threshold computes no hash again.
    """

    prepared_by = frozenset({"over", "ngram", "permutations", "bands"})

    ngram: int = Field(default=2, ge=1, le=32)
    threshold: float = Field(default=0.5, gt=0, le=1)
    permutations: int = Field(default=128, ge=1, le=4096)
    bands: int = Field(default=32, ge=1, le=4096)
    linkage: Linkage = "components"

    @model_validator(mode="after")
    def _bands_are_even(self) -> Self:
        if self.permutations % self.bands:
            raise ValueError(
                f"permutations must be a multiple of bands, and {self.permutations} is none of "
                f"{self.bands}"
            )
        return self

    def prepare(self, frame: pl.DataFrame, kit: Kit) -> pl.DataFrame:
        """`grams`, `whole` and `bands` as `sketch` makes them; `length`: characters of the text."""
        texts = text_column(frame, self.over)
        found = sketch(texts, self.ngram, self.permutations, self.bands)
        return frame.select("id").with_columns(
            *found.get_columns(), texts.str.len_chars().cast(pl.Int64).alias("length")
        )

    def comparison(self, rows: pl.LazyFrame, reference: pl.DataFrame) -> _Shingles:
        found = rows.select("whole", "bands").collect()
        ours = found.height
        if reference.height:
            found = pl.concat([found, reference.select("whole", "bands")])
        bands: Any = found["bands"].to_numpy() if found.height else np.zeros((0, 1), np.uint32)
        whole = found["whole"].to_numpy()
        return _Shingles(whole, bands, rows, reference, ours, self.threshold)

    @property
    def linked(self) -> Linkage:
        return self.linkage

    def detail(self) -> pl.Expr:
        share = pl.col("similarity").round(4).cast(pl.String)
        said = pl.lit(f"Jaccard similarity of {self.ngram}-grams")
        return pl.format("{} {} to {}", said, share, pl.col("whose"))
