"""Near duplicates: one row stays of each cluster of rows with similar embeddings.

Source: semantic deduplication as in SemDeDup (2303.09540) and Magpie (2406.08464, whose 0.05 of
    squared L2 is a cosine of 0.975), but exact, and with a representative for every cluster.
Takes: any kind.
Gives: the same kind.
Measures: `cluster_size` (rows that one stands for, itself among them; at least 1).
Drops: `near_duplicate`, naming the row that stays or that stands in `against`, and the cosine
    similarity to it.
"""

from dataclasses import dataclass
from typing import Generic

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field

from datakit.clusters import Ints, Linkage
from datakit.curation._duplicates import Duplicates
from datakit.curation._texts import embedded, text_column, vectors_of
from datakit.kit import Kit
from datakit.models.embed import Vectors
from datakit.neighbours import Pairs, dots, pairs_between, pairs_over
from datakit.step import EmbedRole, In


@dataclass(frozen=True)
class _Cosines:
    """The vectors of our rows, then those of the reference."""

    vectors: Vectors
    ours: int
    threshold: float

    @property
    def codes(self) -> NDArray[np.generic]:
        """Equal vectors have equal hashes; one without any text is like no other."""
        bits = self.vectors.view(np.uint32)
        rng = np.random.default_rng(0)
        factors = rng.integers(1 << 63, size=bits.shape[1], dtype=np.uint64) * 2 + 1
        hashes = np.zeros(len(bits), np.uint64)
        for start in range(0, len(bits), 4096):
            hashes[start : start + 4096] = (bits[start : start + 4096] * factors).sum(axis=1)
        _, codes = np.unique(hashes, return_inverse=True)
        empty = np.flatnonzero(~self.vectors.any(axis=1))
        codes[empty] = len(codes) + empty
        return codes

    def pairs(self, rows: Ints, rank: Ints) -> Pairs:
        del rank
        own = rows[rows < self.ours]
        found = pairs_over(self.vectors[own], self.threshold)
        if len(own) == len(rows):
            return found
        others = self.vectors[rows[len(own) :]]
        across = pairs_between(self.vectors[own], others, self.threshold)
        return Pairs(
            np.concatenate([found.first, across.first]),
            np.concatenate([found.second, across.second + len(own)]),
            np.concatenate([found.similarity, across.similarity]),
        )

    def similarity(self, rows: Ints, others: Ints) -> NDArray[np.float64]:
        return dots(self.vectors, self.vectors, rows, others).astype(np.float64)


class Near(Duplicates[In], Generic[In]):
    """Keep one of each cluster of neighbours.

    threshold: cosine similarity in 0..1 from which two rows are neighbours. linkage: `components`
    joins chains of neighbours, `star` drops a row only for a kept neighbour. keep, by, sources:
    who stays: `first` of the source, `longest` text, `highest` measure `by`, or by `source` in the
    order of `sources`. against: a version (`name`, `name@x.y.z`, a folder) or a file whose rows
    stay, and whose duplicates go. A new threshold embeds nothing again.
    """

    prepared_by = frozenset({"over", "embedder"})

    threshold: float = Field(default=0.9, gt=0, le=1)  # 0.9: Deita (2312.15685), as a similarity
    linkage: Linkage = "components"
    embedder: EmbedRole = "embedder"

    def prepare(self, frame: pl.DataFrame, kit: Kit) -> pl.DataFrame:
        """`vector`: float32 [d] of unit length; `length`: characters of the text."""
        lengths = text_column(frame, self.over).str.len_chars().cast(pl.Int64)
        return embedded(frame, self.over, self.embedder, kit).with_columns(lengths.alias("length"))

    def comparison(self, rows: pl.LazyFrame, reference: pl.DataFrame) -> _Cosines:
        vectors = vectors_of(rows.select("vector").collect())
        ours = len(vectors)
        if reference.height:
            theirs = vectors_of(reference)
            vectors = np.concatenate([vectors, theirs]) if ours else theirs
        return _Cosines(vectors, ours, self.threshold)

    @property
    def linked(self) -> Linkage:
        return self.linkage

    def detail(self) -> pl.Expr:
        cosine = pl.col("similarity").round(4).cast(pl.String)
        return pl.format("cosine {} to {}", cosine, pl.col("whose"))
