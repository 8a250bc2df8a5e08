"""Exact duplicates: one row stays of all that say the same.

Source: the usual first pass of any curation; texts are compared after folding case, width,
    punctuation and white space (`datakit.text.normalise`).
Takes: any kind.
Gives: the same kind.
Measures: none.
Drops: `exact_duplicate`, naming the row that stays, similarity 1.
"""

from typing import Generic, Literal

import polars as pl

from datakit.curation._texts import Over, priority, row_texts
from datakit.kit import Kit
from datakit.step import In, Split, TableStep
from datakit.text import digest, normalise


class Exact(TableStep[In, In], Generic[In]):
    """Keep one of each group of equal rows.

    over: what is compared. keep: the first row of the source, or the longest text before folding.
    """

    prepared_by = frozenset({"over"})

    over: Over = "prompt"
    keep: Literal["first", "longest"] = "first"

    def prepare(self, frame: pl.DataFrame, kit: Kit) -> pl.DataFrame:
        """`folded`: hash of the normalised text; `length`: characters of the text."""
        texts = row_texts(frame, self.over)
        return frame.select("id").with_columns(
            pl.Series("folded", [digest(normalise(text)) for text in texts], pl.String()),
            pl.Series("length", [len(text) for text in texts], pl.Int64()),
        )

    def apply(self, table: pl.LazyFrame, kit: Kit) -> Split:
        order = priority(table, self.keep, None, pl.col("length"))
        rows = table.select("id", "folded").collect()[order]
        marked = rows.with_columns(related=pl.col("id").first().over("folded"))
        stays = pl.col("id") == pl.col("related")
        dropped = marked.filter(~stays).select(
            "id",
            "related",
            reason=pl.lit("exact_duplicate"),
            detail=pl.format("same {} as a row that stays", pl.lit(self.over)),
            similarity=pl.lit(1.0),
        )
        return Split(marked.filter(stays).select("id"), dropped)
