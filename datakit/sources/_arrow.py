"""Rows and column types of pyarrow tables, which the Parquet and the Hub source read."""

from collections.abc import Iterator
from typing import Any

from datakit.errors import Rejected
from datakit.sources._layouts import Layout, Row
from datakit.sources._table import reject
from datakit.step import Reject
from datakit.tables import BATCH


def schema_types(schema: Any) -> dict[str, frozenset[str]]:
    """What the columns of a table with this pyarrow schema hold."""
    return {column.name: frozenset(_arrow_type(column.type)) for column in schema}


def _arrow_type(kind: Any) -> tuple[str, ...]:
    from pyarrow import types as t

    if t.is_dictionary(kind):
        return _arrow_type(kind.value_type)
    if t.is_null(kind):
        return ()
    tests = {
        "text": (t.is_string, t.is_large_string, t.is_string_view),
        "bool": (t.is_boolean,),
        "number": (t.is_integer, t.is_floating, t.is_decimal),
        "time": (t.is_timestamp, t.is_date),
        "list": (t.is_list, t.is_large_list, t.is_fixed_size_list, t.is_list_view),
        "struct": (t.is_struct,),
    }
    return tuple(name for name, checks in tests.items() if any(c(kind) for c in checks)) or (
        "other",
    )


def table_rows(layout: Layout, number: int, table: Any) -> Iterator[Row | Reject]:
    """The rows of a pyarrow table whose first row has this number.

    A text that is not UTF-8 rejects its row only.
    """
    for start in range(0, table.num_rows, BATCH):
        some = table.slice(start, BATCH)
        try:
            rows = some.to_pylist()
        except UnicodeDecodeError:
            yield from _one_by_one(layout, number + start, some)
        else:
            yield from rows


def _one_by_one(layout: Layout, number: int, table: Any) -> Iterator[Row | Reject]:
    for position in range(table.num_rows):
        one = table.slice(position, 1)
        try:
            yield from one.to_pylist()
        except UnicodeDecodeError as error:
            name = next(name for name in one.column_names if _is_broken(one[name]))
            fault = Rejected("wrong_type", f"column {name!r} is not UTF-8: {error.reason}")
            yield reject(layout.place(number + position), repr(error.object), fault)


def _is_broken(column: Any) -> bool:
    try:
        column.to_pylist()
    except UnicodeDecodeError:
        return True
    return False
