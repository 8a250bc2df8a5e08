"""Records as tables and back; `to_frame` and `from_frame` are the only conversions."""

from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any, TypeVar

import polars as pl

from datakit.records import Record
from datakit.values import small_schema, table_of_lines

BATCH = 1_000
"""Rows that are plain data at a time between tables and records, so that memory stays flat."""

BATCH_BYTES = 8_000_000
"""Text of such rows at a time, about."""

R = TypeVar("R", bound=Record)


def to_frame(kind: type[R], rows: Iterable[R]) -> pl.DataFrame:
    """Records as a table of `kind.table_schema()`, in order."""
    return pl.concat([pl.DataFrame(schema=kind.table_schema()), *frames(kind, rows)])


def frames(kind: type[R], rows: Iterable[R]) -> Iterator[pl.DataFrame]:
    """Records as tables of about BATCH rows, made as they come."""
    # As JSON lines and by way of pyarrow, which takes nested rows several times faster than
    # polars does. (`pyarrow.array` would do too, but loads all of pandas where it is installed.)
    schema = _arrow_schema(kind)
    lines: list[str] = []
    size = 0
    for row in rows:
        lines.append(row.model_dump_json(context="frame"))
        size += len(lines[-1])
        if len(lines) == BATCH or size > BATCH_BYTES:
            yield table_of_lines(lines, schema)
            lines, size = [], 0
    if lines:
        yield table_of_lines(lines, schema)


@cache
def _arrow_schema(kind: type[Record]) -> Any:
    """The table schema as pyarrow has it; its JSON reader knows no `large_` types."""
    return small_schema(pl.DataFrame(schema=kind.table_schema()).to_arrow().schema)


def from_frame(kind: type[R], frame: pl.DataFrame) -> list[R]:
    """A table of `kind.table_schema()` as records, in order."""
    return list(each_record(kind, frame))


def each_record(kind: type[R], frame: pl.DataFrame) -> Iterator[R]:
    """The records of a table, in order, made as they are taken."""
    for piece in pieces(frame):
        for row in piece.to_arrow().to_pylist():
            yield kind.model_validate(row)


def pieces(frame: pl.DataFrame) -> Iterator[pl.DataFrame]:
    """A table in slices of at most BATCH rows and about BATCH_BYTES, however long its rows are."""
    rows = BATCH_BYTES * frame.height // max(1, int(frame.estimated_size()))
    return frame.iter_slices(max(1, min(BATCH, rows)))


def measure(name: str) -> pl.Expr:
    """The measure `name` of each row of a record table, null where absent."""
    return (
        pl.col("measures")
        .list.eval(pl.element().filter(pl.element().struct.field("name") == name))
        .list.first()
        .struct.field("value")
    )
