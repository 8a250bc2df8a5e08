"""The most informative subset: greedy maximum entropy over embeddings.

Source: greedy log-determinant maximisation (Nemhauser 1978; Chen et al., 1709.05135): each next
    row is the one that the kept ones predict least.
Takes: any kind.
Gives: the same kind.
Measures: `gain` (nats, >= 0: information that the row added when it was taken), `order` (0 =
    taken first). With `method: random` neither.
Drops: `not_selected`, naming the nearest row that stays and the cosine similarity to it.
"""

import random
from typing import Generic, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field, field_validator

from datakit.curation._texts import Over, embedded, vectors_of
from datakit.kit import Kit
from datakit.models.embed import Vectors
from datakit.neighbours import nearest
from datakit.step import EmbedRole, In, Split, TableStep

_WHY = {"entropy": "the rows that stay already say it", "random": "not drawn"}


class Select(TableStep[In, In], Generic[In]):
    """Keep a budget of rows.

    keep: how many rows (an integer), or which share of them (a fraction below 1). noise: the
    variance that is added to each row; the larger, the less the last details of a row count.
    """

    prepared_by = frozenset({"over", "embedder"})

    keep: int | float = Field(gt=0)
    method: Literal["entropy", "random"] = "entropy"
    over: Over = "prompt"
    noise: float = Field(default=0.1, gt=0)
    embedder: EmbedRole = "embedder"

    @field_validator("keep")
    @classmethod
    def _rows_or_share(cls, keep: int | float) -> int | float:
        if isinstance(keep, float) and keep >= 1:
            raise ValueError(f"{keep:g} is neither a number of rows nor a fraction below 1")
        return keep

    def prepare(self, frame: pl.DataFrame, kit: Kit) -> pl.DataFrame:
        """`vector`: float32 [d] of unit length."""
        return embedded(frame, self.over, self.embedder, kit)

    def apply(self, table: pl.LazyFrame, kit: Kit) -> Split:
        rows = table.select("id", "vector").collect()
        vectors = vectors_of(rows)
        budget = round(self.keep * rows.height) if self.keep < 1 else int(self.keep)
        budget = min(max(budget, 1), rows.height)
        ids = rows["id"].to_list()
        if self.method == "entropy":
            taken, gains = max_entropy(vectors, budget, self.noise)
        else:
            draw: random.Random = kit.rng("", "select")
            # Drawn over sorted ids, so that the order of the rows does not matter.
            chosen = set(draw.sample(sorted(ids), budget))
            taken = np.array([i for i, one in enumerate(ids) if one in chosen], np.int64)
            gains = None
        kept = rows[taken.tolist()].select("id")
        if gains is not None:
            kept = kept.with_columns(
                pl.Series("measure.gain", gains, pl.Float64()),
                pl.Series("measure.order", range(budget), pl.Float64()),
            )
        left = np.setdiff1d(np.arange(rows.height), taken)
        index, similarity = nearest(vectors[left], vectors[taken])
        dropped = rows[left.tolist()].select(
            "id",
            reason=pl.lit("not_selected"),
            detail=pl.lit(_WHY[self.method]),
            related=pl.Series(rows["id"].to_numpy()[taken][index], dtype=pl.String()),
            similarity=pl.Series(similarity, dtype=pl.Float64()),
        )
        return Split(kept, dropped)


def max_entropy(
    vectors: Vectors, budget: int, noise: float
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Rows taken, in order, and the information gain of each in nats; both [budget].

    The gain of a row is ½ log(1 + v/noise), v being the variance that the rows taken before leave
    of it under a linear kernel. O(budget n d) time, n x d memory.
    """
    rows = vectors.astype(np.float64)
    left = np.einsum("nd,nd->n", rows, rows)
    # Inverse of I + XᵀX/noise for the rows X taken so far, kept by rank-one updates.
    inverse = np.eye(rows.shape[1])
    taken = np.zeros(budget, np.int64)
    gains = np.zeros(budget)
    free = np.ones(len(rows), bool)
    for step in range(budget):
        best = int(np.where(free, left, -np.inf).argmax())
        variance = max(float(left[best]), 0.0)
        taken[step], gains[step] = best, 0.5 * np.log1p(variance / noise)
        free[best] = False
        direction = inverse @ rows[best]
        inverse -= np.outer(direction, direction) / (variance + noise)
        left -= (rows @ direction) ** 2 / (variance + noise)
    return taken, gains
