"""What the parts of a run say about each other: roots, duplicates, the funnel, the rejects."""

from collections import Counter
from collections.abc import Iterator, Sequence

import polars as pl

from datakit.recipe import PlacedStep
from datakit.records import ID_BYTES, Record
from datakit.step import DROPPED
from datakit.store import Chunk, Done, Store
from datakit.text import digest, normalise
from datakit.versions import StepCount

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


def rejects(store: Store, markers: Sequence[Sequence[Done]]) -> Iterator[pl.DataFrame]:
    """Every dropped row of every step, part by part, in REJECTS."""
    for dones in markers:
        for done in dones:
            if done.dropped_rows:
                yield store.dropped(done).select(pl.lit(done.alias).alias("step"), *DROPPED)


def chunks(dones: Sequence[Done]) -> list[Chunk]:
    """The kept files of a step, in order."""
    return [chunk for done in dones for chunk in done.chunks]


def source_roots(store: Store, kind: type[Record], source: Sequence[Done]) -> pl.DataFrame:
    """`root`, `key` (hash of the first user turn) and `declared` split of each source row."""
    found = [
        pl.DataFrame(schema={"root": pl.String(), "key": pl.String(), "declared": pl.String()})
    ]
    for chunk in chunks(source):
        frame = store.read(chunk)
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


def _first_turns(kind: type[Record], frame: pl.DataFrame) -> list[str]:
    """The first user turn of each row; for rows without one, all that they say."""
    for name in ("messages", "prompt", "context"):
        if name in kind.own and kind.table_schema()[name] != pl.String():
            turn = pl.element()
            users = turn.filter(turn.struct.field("role") == "user").struct.field("content")
            first = pl.col(name).list.eval(users).list.first()
            texts = frame.select(text=first)["text"].to_list()
            return [
                row_id if text is None else text
                for row_id, text in zip(frame["id"], texts, strict=True)
            ]
    return frame["id"].to_list()
