"""The text of a row that curation compares, and the order in which rows are worth keeping."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import polars as pl

from datakit.errors import InputError
from datakit.kit import Kit
from datakit.models.embed import Vectors
from datakit.tables import measure

Over = Literal["prompt", "response", "row"]
"""prompt: every turn before the answer; response: the answer or answers; row: both."""

_PROMPTS = ("messages", "prompt", "prompt_rejected", "context")
_ANSWERS = ("chosen", "rejected", "completion", "draft", "edited")


def row_texts(frame: pl.DataFrame, over: Over) -> list[str]:
    """One text for each row of a record table of any kind."""
    return text_column(frame, over).to_list()


def text_column(frame: pl.DataFrame, over: Over) -> pl.Series:
    """One text for each row of a record table of any kind, as a column without nulls."""
    schema = frame.schema
    columns = [_text(name, schema[name]) for name in text_columns(over) if name in schema]
    if not columns:
        raise InputError(f"`over: {over}` compares nothing here: these rows have no {over}")
    joined = pl.concat_str(columns, separator="\n", ignore_nulls=True)
    return frame.select(text=joined)["text"]


def text_columns(over: Over) -> tuple[str, ...]:
    """The columns of any kind that are compared."""
    prompts = () if over == "response" else _PROMPTS
    return prompts if over == "prompt" else (*prompts, *_ANSWERS, "responses")


def _text(name: str, dtype: pl.DataType) -> pl.Expr:
    match dtype:
        case pl.String():
            return pl.col(name)
        case pl.List(inner=pl.String()):
            return pl.col(name).list.join("\n")
        case pl.List(inner=pl.Struct(fields=fields)):
            known = [one.name for one in fields if one.name in ("content", "text")]
            if known:
                texts = pl.element().struct.field(known[0])
                return pl.col(name).list.eval(texts).list.join("\n")
        case _:
            pass
    raise InputError(f"column {name!r} is neither a text nor a list of turns, but {dtype}")


def embedded(frame: pl.DataFrame, over: Over, role: str, kit: Kit) -> pl.DataFrame:
    """`id` and `vector` (unit length) of each row."""
    vectors = kit.embed(role, row_texts(frame, over))
    width = vectors.shape[1]
    return frame.select("id").with_columns(
        pl.Series("vector", vectors, dtype=pl.Array(pl.Float32, width))
    )


def vectors_of(table: pl.DataFrame) -> Vectors:
    """The `vector` column as float32 [n, d]."""
    if not table.height:
        return np.zeros((0, 1), np.float32)
    return np.ascontiguousarray(table["vector"].to_numpy(), np.float32)


Keep = Literal["first", "longest", "highest", "source"]
"""Which row of a cluster stays: the first of the source, the longest text, the one with the highest
measure, the one of the source that is named first."""


def priority(
    table: pl.LazyFrame,
    keep: Keep,
    by: str | None = None,
    sources: Sequence[str] = (),
    lengths: pl.Expr | None = None,
) -> list[int]:
    """Row numbers, the most worth keeping first.

    Of equals the one with the smaller id comes first, so that the order of the rows does not
    matter; with `first` that order is what counts. Raises InputError where `by` or `sources` name
    what no row has.
    """
    match keep:
        case "first":
            worth = pl.lit(0.0)
        case "longest":
            worth = pl.lit(0) if lengths is None else lengths
        case "highest":
            worth = measure(by or "").fill_null(float("-inf"))
            _check_known(table.select(measure(by or "")), f"has the measure {by!r}", keep)
        case "source":
            places = {name: -place for place, name in enumerate(sources)}
            known = pl.when(pl.col("source").is_in(list(sources))).then(pl.col("source"))
            worth = known.replace_strict(places, default=-len(sources), return_dtype=pl.Int64)
            _check_known(table.select(known), f"is of a source of {list(sources)}", keep)
    tie = pl.lit("") if keep == "first" else pl.col("id")
    named = table.with_columns(worth=worth.cast(pl.Float64), tie=tie).select("worth", "tie")
    ranked = named.with_row_index("row").collect()
    return ranked.sort("worth", "tie", "row", descending=[True, False, False])["row"].to_list()


def _check_known(column: pl.LazyFrame, what: str, keep: Keep) -> None:
    found = column.collect().to_series()
    if found.len() > 1 and found.null_count() == found.len():
        raise InputError(f"`keep: {keep}`: no row {what}")
