"""What the duplicate steps share: who is compared with whom, who stays, and what is said."""

from typing import Generic, Protocol, Self

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field, model_validator

from datakit.clusters import Bools, Ints, Linkage, heads, representatives
from datakit.curation._against import (
    reference_fingerprint,
    reference_name,
    reference_rows,
    standing,
)
from datakit.curation._texts import Keep, Over, priority
from datakit.kit import Kit
from datakit.neighbours import Pairs
from datakit.step import In, Split, TableStep

NO_PAIRS = Pairs(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))


class Comparison(Protocol):
    """How the rows of a step, followed by those of its reference, compare with each other."""

    @property
    def codes(self) -> NDArray[np.generic]:
        """Equal for rows that are the same [n]."""
        ...

    def pairs(self, rows: Ints, rank: Ints) -> Pairs:
        """Neighbours among `rows` (ascending), by their places in it.

        rank: 0 for the row most worth keeping. Two rows of the reference need not be compared.
        """
        ...

    def similarity(self, rows: Ints, others: Ints) -> NDArray[np.float64]:
        """The similarity of rows[i] and others[i], in 0..1."""
        ...


class Duplicates(TableStep[In, In], Generic[In]):
    """Base of the duplicate steps: keeps one row of each cluster.

    over: what is compared. keep: who stays of a cluster: the first of the source, the longest
    text, the row with the highest measure `by`, or the one whose source stands first in `sources`;
    of equals the one with the smaller id. against: a version or a file (see `_against`) that
    stands already: those of its rows that are among ours stay whatever they are like, and what
    duplicates one of its rows is dropped.
    """

    incremental = "against"

    over: Over = "prompt"
    keep: Keep = "first"
    by: str | None = None
    sources: tuple[str, ...] = ()
    against: str | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _policy_is_whole(self) -> Self:
        if (self.keep == "highest") != (self.by is not None):
            raise ValueError("`keep: highest` and `by: <measure>` go together")
        if (self.keep == "source") != bool(self.sources):
            raise ValueError("`keep: source` and `sources: [<source>, ...]` go together")
        return self

    def fingerprint(self, kit: Kit) -> str:
        return "" if self.against is None else reference_fingerprint(self.against, kit)

    def prepared_fingerprint(self, kit: Kit) -> str:
        """Nothing: what a row's text is like has nothing to do with what stands already."""
        return ""

    def comparison(self, rows: pl.LazyFrame, reference: pl.DataFrame) -> Comparison:
        """Over the prepared columns of our rows and of the reference's; made by each step."""
        raise NotImplementedError

    @property
    def reason(self) -> str:
        """Why a row is dropped; ends in `duplicate`."""
        return "near_duplicate"

    @property
    def linked(self) -> Linkage:
        """How pairs make clusters."""
        return "components"

    def detail(self) -> pl.Expr:
        """What is said of a dropped row, of `similarity` and `whose` (`a row that stays`)."""
        raise NotImplementedError

    def apply(self, table: pl.LazyFrame, kit: Kit) -> Split:
        ids = table.select("id").collect()["id"]
        reference, published = self._reference(table, len(ids), kit)
        ours = len(ids)
        size = ours + reference.height
        fixed = np.concatenate([published, np.ones(reference.height, np.bool_)])
        order = self._order(table, reference, published)
        rank = np.empty(size, np.int64)
        rank[order] = np.arange(size)
        compared = self.comparison(table, reference)
        best, place = heads(compared.codes, order)
        pairs = compared.pairs(best, rank)
        stands = best[
            representatives(len(best), pairs, np.argsort(rank[best]), self.linked, fixed[best])
        ][place][:ours]
        stands = np.where(published, np.arange(ours), stands)
        lost = np.flatnonzero(stands != np.arange(ours))
        similarity = compared.similarity(lost, stands[lost])
        names = pl.concat([ids, reference["id"]])
        whose = np.where(stands[lost] < ours, "a row that stays", self._named(kit))
        dropped = pl.DataFrame(
            {
                "id": ids.gather(lost),
                "related": names.gather(stands[lost]),
                "similarity": pl.Series(similarity, dtype=pl.Float64),
                "whose": pl.Series(whose, dtype=pl.String),
            }
        )
        dropped = dropped.with_columns(reason=pl.lit(self.reason), detail=self.detail())
        stays = np.flatnonzero(stands == np.arange(ours))
        sizes = np.bincount(stands, minlength=size)[stays]
        kept = pl.DataFrame(
            {
                "id": ids.gather(stays),
                "measure.cluster_size": pl.Series(sizes, dtype=pl.Float64),
            }
        )
        return Split(kept, dropped.drop("whose"))

    def _reference(self, table: pl.LazyFrame, ours: int, kit: Kit) -> tuple[pl.DataFrame, Bools]:
        """Prepared columns of the reference's rows that are not ours; which of ours are its."""
        none = pl.DataFrame(schema={"id": pl.String()})
        if self.against is None:
            return none, np.zeros(ours, np.bool_)
        published, new = standing(table, self.against, kit)
        read = reference_rows(self.against, self.over, new, kit)
        frames = [self.prepare(frame, kit) for frame in read if frame.height]
        return pl.concat(frames) if frames else none, published.to_numpy()

    def _named(self, kit: Kit) -> str:
        return "" if self.against is None else f"a row of {reference_name(self.against, kit)}"

    def _order(self, table: pl.LazyFrame, reference: pl.DataFrame, published: Bools) -> Ints:
        """All rows, the best first: what stands already before whatever is new."""
        lengths = pl.col("length")
        own = np.array(priority(table, self.keep, self.by, self.sources, lengths), np.int64)
        theirs = reference["id"].arg_sort().to_numpy().astype(np.int64) + len(own)
        return np.concatenate([own[published[own]], theirs, own[~published[own]]])
