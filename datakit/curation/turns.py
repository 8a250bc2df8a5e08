"""Turns: how many, in which order of roles, and whether any is empty.

Source: the form that chat templates and trainers ask for: at most one system turn, then user and
    assistant in turn.
Takes: any kind.
Gives: the same kind.
Measures: `turns` (number of turns of the whole conversation, the answer's among them), `ordered`
    (1 where the roles stand in order, else 0), `empty_turns` (number of turns that show nothing);
    of pairs by side: `.chosen`, `.rejected`. An edit's conversation is its context.
Drops: `too_few_turns`, `too_many_turns`, `role_order`, `empty_turn`, only where asked for.
"""

from typing import Generic, Literal

import polars as pl
from pydantic import Field

from datakit.curation._sides import Rule, bounds, split
from datakit.findings import in_role_order, is_blank
from datakit.kit import Kit
from datakit.step import FrameStep, In, Split


class Turns(FrameStep[In, In], Generic[In]):
    """Keep conversations of the wanted form. Both sides of a pair must have it.

    order: `alternating` drops conversations whose roles do not alternate. empty: `drop` drops those
    with a turn that shows nothing.
    """

    min_turns: int | None = Field(default=None, ge=0)
    max_turns: int | None = Field(default=None, ge=0)
    order: Literal["any", "alternating"] = "any"
    empty: Literal["keep", "drop"] = "keep"

    def apply(self, frame: pl.DataFrame, kit: Kit) -> Split:
        wide = frame.select("id")
        rules: list[Rule] = []
        for end, roles, texts in _conversations(frame):
            turns, ordered, empty = f"turns{end}", f"ordered{end}", f"empty_turns{end}"
            found = frame.select(
                roles.list.len().alias(turns),
                in_role_order(roles).cast(pl.Float64).alias(ordered),
                texts.list.eval(is_blank(pl.element())).list.sum().alias(empty),
            )
            wide = wide.hstack(found)
            few, many = self.min_turns, self.max_turns
            rules += bounds([turns], few, many, "too_few_turns", "too_many_turns")
            if self.order == "alternating":
                rules += bounds([ordered], 1, None, "role_order", "")
            if self.empty == "drop":
                rules += bounds([empty], None, 0, "", "empty_turn")
        return split(wide, rules)


def _conversations(frame: pl.DataFrame) -> list[tuple[str, pl.Expr, pl.Expr]]:
    """(end of the measure's name, roles, texts) of each conversation of a row, as list columns."""
    if "rejected" in frame.columns:
        two = pl.col("prompt_rejected").list.len() > 0
        other = pl.when(two).then("prompt_rejected").otherwise("prompt")
        return [
            (".chosen", *_turns(pl.col("prompt"), pl.col("chosen"))),
            (".rejected", *_turns(other, pl.col("rejected"))),
        ]
    if "responses" in frame.columns:
        roles, texts = _turns(pl.col("prompt"))
        # Many answers to one conversation: one more turn, and each answer may be empty.
        answers = pl.col("responses").list.eval(pl.element().struct.field("text"))
        one = pl.concat_list(roles, pl.lit("assistant"))
        return [("", one, pl.concat_list(texts, answers))]
    if "completion" in frame.columns:
        return [("", *_turns(pl.col("prompt"), pl.col("completion")))]
    return [("", *_turns(pl.col("context" if "draft" in frame.columns else "messages")))]


def _turns(first: pl.Expr, then: pl.Expr | None = None) -> tuple[pl.Expr, pl.Expr]:
    """Roles and texts of the turns of one or two columns, one after the other."""
    all_turns = first if then is None else pl.concat_list(first, then)
    field = pl.element().struct.field
    return all_turns.list.eval(field("role")), all_turns.list.eval(field("content"))
