"""What the parts of a run say about each other: roots, duplicates, the funnel, the rejects."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import polars as pl

from datakit.errors import Rejected
from datakit.recipe import PlacedStep
from datakit.records import ID_BYTES, Record, from_frame
from datakit.step import DROPPED
from datakit.store import Chunk, Done, Store
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
    """The rows of a step that have a split, read part by part: a version may outgrow memory.

    splits: `id` and `split`, in the order of the rows.
    """

    store: Store
    kind: type[Record]
    dones: Sequence[Done]
    splits: pl.DataFrame

    def frames(self, columns: Sequence[str] = ()) -> Iterator[pl.DataFrame]:
        """Record tables whose `split` is the assigned one, or only `id` and these columns."""
        wanted = ["id", *columns] if columns else self.kind.table_schema().names()
        read = [name for name in wanted if name != "split"]
        start = 0
        for chunk in chunks(self.dones):
            # Both are in one order, so what belongs to this part is within its length.
            near = self.splits.slice(start, chunk.rows)
            frame = pl.read_parquet(self.store.path(chunk), columns=read)
            found = frame.join(near, on="id", how="inner", maintain_order="left")
            start += found.height
            yield found.select(wanted)

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
        none = pl.DataFrame(schema=self.kind.table_schema())
        found = [frame.filter(pl.col("id").is_in(ids)) for frame in self.frames()]
        return pl.concat([none, *found])


def rejects(store: Store, markers: Sequence[Sequence[Done]]) -> Iterator[pl.DataFrame]:
    """Every dropped row of every step, part by part, in REJECTS."""
    for dones in markers:
        for done in dones:
            if done.dropped_rows:
                step = pl.lit(done.alias).alias("step")
                yield _filled(store.dropped(done).select(step, *DROPPED))


def bridging_rejects(
    store: Store, kind: type[Record], dones: Sequence[Done], bridging: pl.DataFrame
) -> Iterator[pl.DataFrame]:
    """The rows of the last step that no split can take, part by part, in REJECTS."""
    for chunk in chunks(dones) if bridging.height else ():
        rows = from_frame(kind, store.read(chunk).join(bridging, on="id", how="semi"))
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


def source_roots(store: Store, kind: type[Record], source: Sequence[Done]) -> pl.DataFrame:
    """`root`, `key` (hash of the first user turn) and `declared` split of each source row."""
    found = [
        pl.DataFrame(schema={"root": pl.String(), "key": pl.String(), "declared": pl.String()})
    ]
    for chunk in chunks(source):
        columns = ["id", "roots", "split", *_opening(kind)]
        frame = pl.read_parquet(store.path(chunk), columns=columns)
        keys = [digest(normalise(text), ID_BYTES) for text in _first_turns(kind, frame)]
        named = frame.select("roots", declared="split").with_columns(
            key=pl.Series(keys, dtype=pl.String())
        )
        found.append(
            named.explode("roots")
            .select("key", "declared", root="roots")
            .select("root", "key", "declared")
        )
    return pl.concat(found).unique("root", keep="first", maintain_order=True)


def duplicate_roots(store: Store, markers: Sequence[Sequence[Done]]) -> pl.DataFrame:
    """`one`, `other`: roots that some step found to be duplicates (reasons end in `duplicate`)."""
    edges = [pl.DataFrame(schema={"id": pl.String(), "related": pl.String()})]
    for dones in markers:
        for done in dones:
            if any(reason.endswith("duplicate") for reason in done.reasons):
                dropped = store.dropped(done).filter(pl.col("reason").str.ends_with("duplicate"))
                edges.append(dropped.select("id", "related"))
    pairs = pl.concat(edges)
    wanted = pl.concat([pairs["id"], pairs["related"]]).unique()
    rows = [pl.DataFrame(schema={"id": pl.String(), "root": pl.String()})]
    for dones in markers if wanted.len() else ():
        scan = store.scan(
            chunks(dones), pl.Schema({"id": pl.String(), "roots": pl.List(pl.String())})
        )
        known = scan.select("id", "roots").filter(pl.col("id").is_in(wanted.implode())).collect()
        rows.append(known.explode("roots").select("id", root="roots"))
    roots = pl.concat(rows).unique()
    return (
        pairs.join(roots, on="id")
        .join(roots, left_on="related", right_on="id", suffix="_related")
        .select(one="root", other="root_related")
        .filter(pl.col("one") != pl.col("other"))
        .unique()
    )


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
