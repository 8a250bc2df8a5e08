"""What the parts of a run say about each other: roots, duplicates, the funnel, the rejects."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from datakit.errors import Rejected
from datakit.ids import ID_BYTES, Ids, packed
from datakit.recipe import PlacedStep
from datakit.records import Record
from datakit.splits import Codes, Names, Roots, Splits
from datakit.step import DROPPED
from datakit.store import Chunk, Done, Store
from datakit.tables import from_frame
from datakit.text import digest, normalise
from datakit.versions import StepCount, measure_names

REJECTS = pl.Schema({"step": pl.String(), **DROPPED})
"""A row of `rejects.parquet`: the alias of the step, then DROPPED."""


def funnel(
    steps: Sequence[PlacedStep], kinds: Sequence[type[Record]], markers: Sequence[Sequence[Done]]
) -> tuple[StepCount, ...]:
    """Rows in, kept and dropped by reason for each step, also for those that no row reached."""
    counts: list[StepCount] = []
    for placed, kind, dones in zip(steps, kinds, markers, strict=True):
        reasons: Counter[str] = Counter()
        for done in dones:
            reasons.update(done.reasons)
        counts.append(
            StepCount(
                alias=placed.alias,
                step=placed.name,
                kind=kind.__name__,
                rows_in=sum(done.rows_in for done in dones),
                kept=sum(done.rows for done in dones),
                dropped=sum(done.dropped_rows for done in dones),
                reasons=dict(sorted(reasons.items())),
                failed=sum(done.failed for done in dones),
                unanswered=sum(done.unanswered for done in dones),
            )
        )
    return tuple(counts)


@dataclass(frozen=True)
class Placed:
    """The rows of a step that have a split, read in runs: a version may outgrow memory.

    splits: the split of each row of the step, in order; 0 for one without.
    """

    store: Store
    kind: type[Record]
    dones: Sequence[Done]
    splits: Codes
    named: Names

    def frames(self, columns: Sequence[str] = ()) -> Iterator[pl.DataFrame]:
        """Record tables whose `split` is the assigned one, or only `id` and these columns."""
        wanted = ["id", *columns] if columns else self.kind.table_schema().names()
        read = [name for name in wanted if name != "split"]
        start = 0
        for run in self.store.runs(chunks(self.dones), read):
            codes = self.splits[start : start + run.height]
            start += run.height
            split = pl.Series("split", self.named.spelled(codes), dtype=pl.String())
            frame = run.with_columns(split).select(wanted)
            yield frame if codes.all() else frame.filter(pl.Series(codes != 0))

    def names(self) -> tuple[list[str], list[str]]:
        """The names of the measures and of the labels that occur, sorted."""
        measures: set[str] = set()
        labels: set[str] = set()
        for frame in self.frames(("measures", "labels")):
            measures.update(measure_names(frame))
            labels.update(measure_names(frame, "labels"))
        return sorted(measures), sorted(labels)

    def find(self, ids: Sequence[str]) -> pl.DataFrame:
        """The rows with these ids, in a record table."""
        wanted = pl.col("id").is_in(pl.Series(ids, dtype=pl.String()).implode())
        empty = pl.DataFrame(schema=self.kind.table_schema())
        splits = (frame.filter(wanted) for frame in self.frames(["split"]))
        split = pl.concat([empty.select("id", "split"), *splits])
        found = pl.concat([empty, *self.store.runs(chunks(self.dones), empty.columns, wanted)])
        return found.drop("split").join(split, on="id").select(empty.columns)


def rejects(store: Store, markers: Sequence[Sequence[Done]]) -> Iterator[pl.DataFrame]:
    """Every dropped row of every step, part by part, in REJECTS."""
    for dones in markers:
        for done in dones:
            if done.dropped_rows:
                step = pl.lit(done.alias).alias("step")
                yield _filled(store.dropped(done).select(step, *DROPPED))


def bridging_rejects(
    store: Store, kind: type[Record], dones: Sequence[Done], splits: Splits
) -> Iterator[pl.DataFrame]:
    """The rows of the last step that no split can take, part by part, in REJECTS."""
    start = 0
    for chunk in chunks(dones):
        bridging = splits.rows[start : start + chunk.rows] == 0
        start += chunk.rows
        if not bridging.any():
            continue
        rows = from_frame(kind, store.read(chunk).filter(pl.Series(bridging)))
        lost = [
            {
                "step": "splits",
                "id": row.id,
                "kind": Rejected.kind,
                "reason": "bridges_splits",
                "detail": "its prompt is near rows of two splits",
                "record": row.model_dump_json(),
            }
            for row in rows
        ]
        yield _filled(pl.DataFrame(lost, schema=REJECTS))


def _filled(frame: pl.DataFrame) -> pl.DataFrame:
    """A frame of REJECTS with empty text for what is not said."""
    return frame.with_columns(
        pl.col(pl.String).fill_null(""), pl.col("transient").fill_null(value=False)
    )


def chunks(dones: Sequence[Done]) -> list[Chunk]:
    """The kept files of a step, in order."""
    return [chunk for done in dones for chunk in done.chunks]


def source_roots(store: Store, kind: type[Record], source: Sequence[Done], names: Names) -> Roots:
    """The roots of the source rows, each with the split that the source declares."""
    columns = ["id", "roots", "split", *_opening(kind)]
    runs = store.runs(chunks(source), columns)
    return Roots.joined(_roots_of_rows(kind, frame, names) for frame in runs)


def _roots_of_rows(kind: type[Record], frame: pl.DataFrame, names: Names) -> Roots:
    keys = packed([digest(normalise(text), ID_BYTES) for text in _first_turns(kind, frame)])
    row = np.repeat(np.arange(frame.height), frame["roots"].list.len().to_numpy())
    roots = packed(frame["roots"].explode().drop_nulls().to_list())
    return Roots(roots, keys[row], names.codes(frame["split"].to_list())[row])


def row_roots(store: Store, dones: Sequence[Done]) -> Iterator[pl.Series]:
    """The roots of each row of a step, some parts at a time."""
    for frame in store.runs(chunks(dones), ["roots"]):
        yield frame["roots"]


def duplicate_roots(store: Store, markers: Sequence[Sequence[Done]]) -> tuple[Ids, Ids]:
    """Pairs of roots that some step found to be duplicates (reasons end in `duplicate`)."""
    edges = [pl.DataFrame(schema={"id": pl.String(), "related": pl.String()})]
    for dones in markers:
        for done in dones:
            if any(reason.endswith("duplicate") for reason in done.reasons):
                dropped = store.dropped(done).filter(pl.col("reason").str.ends_with("duplicate"))
                edges.append(dropped.select("id", "related"))
    pairs = pl.concat(edges)
    wanted = pl.concat([pairs["id"], pairs["related"]]).unique()
    known = _roots_of(store, markers, wanted) if wanted.len() else pl.DataFrame(schema=_KNOWN)
    found = (
        pairs.join(known, on="id")
        .join(known, left_on="related", right_on="id", suffix="_related")
        .filter(pl.col("root") != pl.col("root_related"))
    )
    return packed(found["root"].to_list()), packed(found["root_related"].to_list())


_KNOWN = pl.Schema({"id": pl.String(), "root": pl.String()})


def _roots_of(store: Store, markers: Sequence[Sequence[Done]], wanted: pl.Series) -> pl.DataFrame:
    """`id` and `root` of every wanted row, of whichever step; a line for each root."""
    found = [pl.DataFrame(schema=_KNOWN)]
    for dones in markers:
        for frame in store.runs(chunks(dones), ["id", "roots"]):
            near = frame.filter(pl.col("id").is_in(wanted.implode())).explode("roots")
            found.append(near.select("id", root="roots").drop_nulls())
    return pl.concat(found).unique()


def _opening(kind: type[Record]) -> list[str]:
    """The column that holds the first turns, where the kind has one."""
    names = ("messages", "prompt", "context")
    return [
        name for name in names if name in kind.own and kind.table_schema()[name] != pl.String()
    ][:1]


def _first_turns(kind: type[Record], frame: pl.DataFrame) -> list[str]:
    """The first user turn of each row; for rows without one, their id."""
    ids = frame["id"].to_list()
    for name in _opening(kind):
        turn = pl.element()
        users = turn.filter(turn.struct.field("role") == "user").struct.field("content")
        texts = frame.select(pl.col(name).list.eval(users).list.first()).to_series().to_list()
        return [row_id if text is None else text for row_id, text in zip(ids, texts, strict=True)]
    return ids
