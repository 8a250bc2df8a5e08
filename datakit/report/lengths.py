"""How long the texts are, and whether the chosen ones are the longer ones."""

from collections.abc import Callable, Iterator
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


def _texts(kind: type[Record]) -> dict[str, str]:
    """For each named text of the kind its column."""
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
    return found


def text_lengths(kind: type[Record]) -> Iterator[pl.Expr]:
    """`chars.<text>` and `words.<text>` of each row: turns are added up, responses are a list."""
    for name, column in _texts(kind).items():
        text = pl.col(column)
        turns = kind.table_schema()[column] != pl.String()
        field = "text" if column == "responses" else "content"
        one = pl.element().struct.field(field) if turns else text
        counts = {"chars": one.str.len_chars(), "words": one.str.count_matches(r"\S+")}
        for what, count in counts.items():
            whole = text.list.eval(count) if turns else count
            if turns and column != "responses":
                whole = whole.list.sum()
            yield whole.alias(f"{what}.{name}")


def lengths(kind: type[Record], found_of: Callable[[str], Floats], rows: int) -> dict[str, Any]:
    """Summaries of the kind's texts in characters, and the same in `words`.

    found_of: the numbers in a column of `text_lengths`, responses one by one. For pairs also how
    often the chosen answer is the longer one; `equal` lengths are left out of that share.
    """
    texts = _texts(kind)
    chars = {name: found_of(f"chars.{name}") for name in texts}
    edges: dict[str, list[float]] = {}
    if issubclass(kind, Pair):
        # The two sides share their bins, so that they can be laid side by side.
        shared = bin_edges(np.concatenate([chars["chosen"], chars["rejected"]]))
        edges = {"chosen": shared, "rejected": shared}
    found: dict[str, Any] = {
        name: summary(values, edges.get(name)) for name, values in chars.items()
    }
    words = {name: summary(found_of(f"words.{name}")) for name in texts}
    found["words"] = {
        name: {key: value for key, value in figures.items() if key != "histogram"}
        for name, figures in words.items()
    }
    if issubclass(kind, Pair):
        longer = int((chars["chosen"] > chars["rejected"]).sum())
        equal = int((chars["chosen"] == chars["rejected"]).sum())
        found["chosen_longer"] = wilson(longer, rows - equal) | {"equal": equal}
    return found
