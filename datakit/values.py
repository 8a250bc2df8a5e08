"""Plain data: frozen values, and the table type that follows from an annotation.

A mapping from names to numbers or texts is a dict in Python and in JSON, and a list of (name,
value) structs in a table, so that the table's schema does not depend on the names.
"""

import re
import types
import typing
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Annotated, Any, Literal

import polars as pl
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    SerializationInfo,
)


def _dict_from_pairs(value: object) -> object:
    if isinstance(value, list):
        pairs = typing.cast("list[dict[str, object]]", value)
        return {str(pair["name"]): pair["value"] for pair in pairs}
    return value


def _pairs_for_frame(value: Mapping[str, object], info: SerializationInfo) -> object:
    if info.context == "frame":
        return [{"name": name, "value": value[name]} for name in sorted(value)]
    return dict(sorted(value.items()))


SPLIT_NAME = re.compile(r"[a-z0-9][a-z0-9_]*")
"""What a split may be called: it becomes part of a file's name."""

Number = Annotated[float, Field(allow_inf_nan=False)]
Measures = Annotated[
    dict[str, Number], BeforeValidator(_dict_from_pairs), PlainSerializer(_pairs_for_frame)
]
Labels = Annotated[
    dict[str, str], BeforeValidator(_dict_from_pairs), PlainSerializer(_pairs_for_frame)
]


def no_names() -> Any:
    """The default of a mapping: a plain `{}` would be copied deeply at every construction."""
    return Field(default_factory=dict, json_schema_extra={"default": {}})


class Value(BaseModel):
    """Frozen, strict about unknown fields: the base of everything that is plain data."""

    model_config = ConfigDict(frozen=True, extra="forbid")


_SCALARS: dict[object, pl.DataType] = {
    str: pl.String(),
    int: pl.Int64(),
    float: pl.Float64(),
    bool: pl.Boolean(),
    datetime: pl.Datetime("us", "UTC"),
}


def polars_type(annotation: Any) -> pl.DataType:
    """The polars type of a field; a dict becomes a list of (name, value) structs."""
    if annotation in _SCALARS:
        return _SCALARS[annotation]
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return polars_type(args[0])
    if origin is Literal:
        return pl.String()
    if origin in (typing.Union, types.UnionType):
        return polars_type(next(arg for arg in args if arg is not type(None)))
    if origin is tuple:
        return pl.List(polars_type(args[0]))
    if origin is dict:
        return pl.List(pl.Struct({"name": pl.String(), "value": polars_type(args[1])}))
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        fields = annotation.model_fields.items()
        return pl.Struct({name: polars_type(field.annotation) for name, field in fields})
    raise TypeError(f"no table type for {annotation!r}")


def table_of_lines(lines: Sequence[str], schema: Any) -> pl.DataFrame:
    """JSON lines as a table of a pyarrow schema without `large_` types."""
    from pyarrow import BufferReader, json, system_memory_pool

    text = "\n".join(lines).encode()
    table = json.read_json(
        BufferReader(text),
        read_options=json.ReadOptions(use_threads=False, block_size=len(text) + 1),
        parse_options=json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="error"),
        # The default pool keeps what it once had: tens of MB for tables of one.
        memory_pool=system_memory_pool(),
    )
    return typing.cast("pl.DataFrame", pl.from_arrow(table))


def small_schema(schema: Any) -> Any:
    """A pyarrow schema without the `large_` types, which not every reader knows."""
    import pyarrow as pa

    return pa.schema([(field.name, _small_type(field.type)) for field in schema])


def _small_type(kind: Any) -> Any:
    import pyarrow as pa

    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_large_list(kind) or pa.types.is_list(kind):
        return pa.list_(_small_type(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, _small_type(field.type)) for field in kind.fields])
    return kind
