"""Exact duplicates: one row stays of all that say the same.

Source: the usual first pass of any curation; texts are compared after folding case, width,
    punctuation and white space (`datakit.text.normalise`).
Takes: any kind.
Gives: the same kind.
Measures: `cluster_size` (rows that say the same, of the one that stays; at least 1).
Drops: `exact_duplicate`, naming the row that stays or that stands in `against`, similarity 1.
"""

from dataclasses import dataclass
from typing import Generic

import numpy as np
import polars as pl
from numpy.typing import NDArray

from datakit.clusters import Ints
from datakit.curation._duplicates import NO_PAIRS, Duplicates
from datakit.curation._texts import text_column
from datakit.kit import Kit
from datakit.neighbours import Pairs
from datakit.step import In
from datakit.text import digest, normalise


@dataclass(frozen=True)
class _Equal:
    """Rows are the same, or nothing to each other."""

    codes: NDArray[np.generic]

    def pairs(self, rows: Ints, rank: Ints) -> Pairs:
        del rows, rank
        return NO_PAIRS

    def similarity(self, rows: Ints, others: Ints) -> NDArray[np.float64]:
        del others
        return np.ones(len(rows))


class Exact(Duplicates[In], Generic[In]):
    """Keep one of each group of equal rows.

    over: what is compared. keep, by, sources: who stays: `first` of the source, `longest` text
    before folding, `highest` measure `by`, or by `source` in the order of `sources`. against: a
    version (`name`, `name@x.y.z`, a folder) or a file whose rows stay, and whose copies go.
    Equality needs no linkage: whatever chains join is equal.
    """

    prepared_by = frozenset({"over"})

    def prepare(self, frame: pl.DataFrame, kit: Kit) -> pl.DataFrame:
        """`folded`: hash of the normalised text; `length`: characters of the text."""
        texts = text_column(frame, self.over)
        return frame.select("id").with_columns(
            pl.Series("folded", [digest(normalise(text)) for text in texts], pl.String()),
            texts.str.len_chars().cast(pl.Int64).alias("length"),
        )

    def comparison(self, rows: pl.LazyFrame, reference: pl.DataFrame) -> _Equal:
        folded = rows.select("folded").collect()["folded"]
        if reference.height:
            folded = pl.concat([folded, reference["folded"]])
        return _Equal(folded.rank("dense").to_numpy())

    @property
    def reason(self) -> str:
        return "exact_duplicate"

    def detail(self) -> pl.Expr:
        return pl.format("same {} as {}", pl.lit(self.over), pl.col("whose"))
