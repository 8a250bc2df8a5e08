"""The text of a row that curation compares, and the order in which rows are worth keeping."""

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
    columns: list[pl.Expr] = []
    if over != "response":
        columns += [_text(name, frame.schema[name]) for name in _PROMPTS if name in frame.columns]
    if over != "prompt":
        columns += [_text(name, frame.schema[name]) for name in _ANSWERS if name in frame.columns]
        if "responses" in frame.columns:
            texts = pl.element().struct.field("text")
            columns.append(pl.col("responses").list.eval(texts).list.join("\n"))
    if not columns:
        raise InputError(f"`over: {over}` compares nothing here: these rows have no {over}")
    joined = pl.concat_str(columns, separator="\n", ignore_nulls=True)
    return frame.select(text=joined)["text"].to_list()


def _text(name: str, dtype: pl.DataType) -> pl.Expr:
    if dtype == pl.String:
        return pl.col(name)
    content = pl.element().struct.field("content")
    return pl.col(name).list.eval(content).list.join("\n")


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


Keep = Literal["first", "longest", "highest"]
"""Which row of a cluster stays: the first of the source, the longest text, the highest measure."""


def priority(table: pl.LazyFrame, keep: Keep, by: str | None, lengths: pl.Expr) -> list[int]:
    """Row numbers, the most worth keeping first; ties go to the earlier row."""
    match keep:
        case "first":
            worth = pl.lit(0.0, pl.Float64)
        case "longest":
            worth = lengths.cast(pl.Float64)
        case "highest":
            worth = measure(by or "").fill_null(float("-inf"))
            found = table.select(worth=measure(by or "")).collect()["worth"]
            if found.len() > 1 and found.null_count() == found.len():
                raise InputError(f"`keep: highest`: no row has the measure {by!r}")
    ranked = table.with_columns(worth=worth).select("worth").with_row_index("row").collect()
    return ranked.sort("worth", "row", descending=[True, False])["row"].to_list()
