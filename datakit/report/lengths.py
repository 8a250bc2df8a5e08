"""How long the texts are, and whether the chosen ones are the longer ones."""

from typing import Any

import numpy as np
import polars as pl

from datakit.records import Candidates, Conversation, Edit, Label, Pair, Prompt, Record
from datakit.report.figures import Floats, bin_edges, summary, wilson


def prompt_column(kind: type[Record]) -> str:
    """The column that holds what comes before the answers."""
    if issubclass(kind, Prompt | Conversation):
        return "messages"
    return "context" if issubclass(kind, Edit) else "prompt"


def _texts(kind: type[Record], rows: pl.DataFrame) -> dict[str, pl.DataFrame]:
    """For each named text of the kind, `row` and `text`, one line for each turn or response."""
    found = {"prompt": prompt_column(kind)}
    if issubclass(kind, Pair):
        found |= {"chosen": "chosen", "rejected": "rejected"}
    elif issubclass(kind, Candidates):
        found |= {"response": "responses"}
    elif issubclass(kind, Label):
        found |= {"completion": "completion"}
    elif issubclass(kind, Edit):
        found |= {"draft": "draft", "edited": "edited"}
    elif issubclass(kind, Conversation):
        found = {"conversation": "messages"}
    return {name: rows.select(column) for name, column in found.items()}


def _counted(column: pl.DataFrame, words: bool = False) -> Floats:
    """Characters or words of each text [n]: turns are added up, responses stand alone."""
    text = pl.col(column.columns[0])
    turns = column.schema[column.columns[0]] != pl.String()
    if column.columns[0] == "responses":
        column, turns = column.explode("responses").drop_nulls(), False
        text = text.struct.field("text")
    one = pl.element().struct.field("content") if turns else text
    count = one.str.count_matches(r"\S+") if words else one.str.len_chars()
    whole = text.list.eval(count).list.sum() if turns else count
    return column.select(whole.cast(pl.Float64()).fill_null(0)).to_series().to_numpy()


def lengths(kind: type[Record], rows: pl.DataFrame) -> dict[str, Any]:
    """Summaries of the kind's texts in characters, and the same in `words`.

    For pairs also how often the chosen answer is the longer one; `equal` lengths are left out of
    that share.
    """
    texts = _texts(kind, rows)
    chars = {name: _counted(column) for name, column in texts.items()}
    edges: dict[str, list[float]] = {}
    if issubclass(kind, Pair):
        # The two sides share their bins, so that they can be laid side by side.
        shared = bin_edges(np.concatenate([chars["chosen"], chars["rejected"]]))
        edges = {"chosen": shared, "rejected": shared}
    found: dict[str, Any] = {
        name: summary(values, edges.get(name)) for name, values in chars.items()
    }
    words = {name: summary(_counted(column, words=True)) for name, column in texts.items()}
    found["words"] = {
        name: {key: value for key, value in figures.items() if key != "histogram"}
        for name, figures in words.items()
    }
    if issubclass(kind, Pair):
        longer = int((chars["chosen"] > chars["rejected"]).sum())
        equal = int((chars["chosen"] == chars["rejected"]).sum())
        found["chosen_longer"] = wilson(longer, rows.height - equal) | {"equal": equal}
    return found
