"""Helpers for the tests of rule filters: a step over records, and what becomes of them."""

import polars as pl

from datakit.rows import conserve, decided
from datakit.tables import from_frame, to_frame

ZERO_WIDTH = "\u200b\u200d\ufeff"
RIGHT_TO_LEFT = "\u202eשלום مرحبا\u202c"
HOSTILE = (
    "",
    " \n\t ",
    "\x00" * 50,
    ZERO_WIDTH * 50,
    RIGHT_TO_LEFT * 50,
    "٣" * 1_000,
    "a" * 1_000_000,
    "a " * 500_000,
    "1" * 1_000_000,
    "1-" * 500_000,
    "a@" * 500_000,
    "(" * 1_000_000,
    "<|" * 500_000,
    "i can't " * 125_000,
    "\n" * 1_000_000,
    "你" * 300_000,
)
"""Texts that break what is written carelessly; the long ones bait nested quantifiers."""


def run(step, kind, rows, kit=None, alias="it"):
    """The kept and the dropped of a frame step, as the engine makes them of its decision."""
    frame = to_frame(kind, rows)
    split = step.apply(frame, kit)
    both = [*split.kept["id"], *split.dropped["id"]]
    assert sorted(both) == sorted(frame["id"]), "every row is on exactly one side"
    kept, dropped = decided(frame, split, alias, kind)
    conserve(alias, frame, kept, dropped)
    return from_frame(kind, kept), dropped


def measured(step, kind, row, kit=None):
    """The measures of one row that stays."""
    (kept,), _ = run(step, kind, [row], kit)
    return {name.removeprefix("it."): value for name, value in kept.measures.items()}


def reasons(step, kind, rows, kit=None):
    """Of each row, in order, why it is dropped; empty for those that stay."""
    _, dropped = run(step, kind, rows, kit)
    found = dict(zip(dropped["id"], dropped["reason"], strict=True))
    return [found.get(row.id, "") for row in rows]


def whatever_the_order(step, kind, rows, kit=None):
    """Whether what becomes of each row is the same in another order and alone."""
    whole = _becomes(step, kind, rows, kit)
    backwards = _becomes(step, kind, rows[::-1], kit)
    alone = {}
    for row in rows:
        alone |= _becomes(step, kind, [row], kit)
    return whole == backwards == alone


def _becomes(step, kind, rows, kit):
    kept, dropped = run(step, kind, rows, kit)
    return {row.id: row for row in kept} | {row["id"]: row for row in dropped.to_dicts()}


def frame_of(*texts):
    return pl.DataFrame({"text": list(texts)}, schema={"text": pl.String()})
