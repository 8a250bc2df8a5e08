"""Near duplicates: one row stays of each cluster of rows with similar embeddings.

Source: semantic deduplication as in SemDeDup (2303.09540) and Magpie (2406.08464, whose 0.05 of
    squared L2 is a cosine of 0.975), but exact, and with a representative for every cluster.
Takes: any kind.
Gives: the same kind.
Measures: `cluster_size` (rows, of those that stay).
Drops: `near_duplicate`, naming the row that stays and the cosine similarity to it.
"""

from typing import Generic, Self

import numpy as np
import polars as pl
from pydantic import Field, model_validator

from datakit.clusters import Linkage, representatives
from datakit.curation._texts import Keep, Over, embedded, priority, row_texts, vectors_of
from datakit.kit import Kit
from datakit.neighbours import pairs_over
from datakit.step import EmbedRole, In, Split, TableStep


class Near(TableStep[In, In], Generic[In]):
    """Keep one of each cluster of neighbours.

    threshold: cosine similarity in 0..1 from which two rows are neighbours. linkage: `components`
    joins chains of neighbours, `star` drops a row only for a kept neighbour. keep: who stays;
    `highest` goes by the measure named in `by`. A new threshold embeds nothing again.
    """

    incremental = "against"
    prepared_by = frozenset({"over", "embedder"})

    threshold: float = Field(default=0.9, gt=0, le=1)  # 0.9: Deita (2312.15685), as a similarity
    over: Over = "prompt"
    linkage: Linkage = "components"
    keep: Keep = "first"
    by: str | None = None
    embedder: EmbedRole = "embedder"

    @model_validator(mode="after")
    def _highest_of_what(self) -> Self:
        if (self.keep == "highest") != (self.by is not None):
            raise ValueError("`keep: highest` and `by: <measure>` go together")
        return self

    def prepare(self, frame: pl.DataFrame, kit: Kit) -> pl.DataFrame:
        """`vector`: float32 [d] of unit length; `length`: characters of the text."""
        lengths = [len(text) for text in row_texts(frame, self.over)]
        return embedded(frame, self.over, self.embedder, kit).with_columns(
            pl.Series("length", lengths, pl.Int64())
        )

    def apply(self, table: pl.LazyFrame, kit: Kit) -> Split:
        rows = table.select("id", "vector").collect()
        vectors = vectors_of(rows)
        pairs = pairs_over(vectors, self.threshold)
        order = priority(table, self.keep, self.by, pl.col("length"))
        stands, similarity = representatives(vectors, pairs, order, self.linkage)
        sizes = np.bincount(stands, minlength=len(stands))
        marked = rows.select("id").with_columns(
            pl.Series("related", rows["id"].to_numpy()[stands], pl.String()),
            pl.Series("similarity", similarity, pl.Float64()),
            pl.Series("measure.cluster_size", sizes, pl.Float64()),
        )
        stays = pl.col("id") == pl.col("related")
        dropped = marked.filter(~stays).select(
            "id",
            "related",
            "similarity",
            reason=pl.lit("near_duplicate"),
            detail=pl.format(
                "cosine {} to a row that stays", pl.col("similarity").round(4).cast(pl.String)
            ),
        )
        return Split(marked.filter(stays).select("id", "measure.cluster_size"), dropped)
