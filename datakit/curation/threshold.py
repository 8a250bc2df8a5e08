"""A threshold over a measure that another step or the source has put there.

Source: measure first, decide later, so that a new threshold costs no new call.
Takes: any kind.
Gives: the same kind.
Measures: none.
Drops: `below_min`, `above_max`, `no_measure`.
"""

from typing import Generic, Literal, Self

import polars as pl
from pydantic import Field, model_validator

from datakit.curation._sides import Rule, bounds, split
from datakit.kit import Kit
from datakit.step import FrameStep, In, Split
from datakit.tables import measure


class Threshold(FrameStep[In, In], Generic[In]):
    """Keep rows whose measure lies in [min, max].

    measure: its full name, `<alias>.<measure>`, with its side where it has one
    (`length.words.chosen`). missing: what becomes of rows without it.
    """

    measure: str = Field(min_length=1)
    min: float | None = Field(default=None, allow_inf_nan=False)
    max: float | None = Field(default=None, allow_inf_nan=False)
    missing: Literal["keep", "drop"] = "drop"

    @model_validator(mode="after")
    def _a_range(self) -> Self:
        if self.min is None and self.max is None:
            raise ValueError("give `min` or `max`, or both")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min is {self.min:g}, above max, which is {self.max:g}")
        return self

    def apply(self, frame: pl.DataFrame, kit: Kit) -> Split:
        name = f"_{self.measure}"
        wide = frame.select("id", measure(self.measure).alias(name))
        rules = [
            Rule(rule.reason, rule.broken, rule.detail.str.strip_prefix("_"))
            for rule in bounds([name], self.min, self.max, "below_min", "above_max")
        ]
        if self.missing == "drop":
            said = pl.lit(f"the row has no measure {self.measure!r}")
            rules.append(Rule("no_measure", pl.col(name).is_null(), said))
        return split(wide, rules)
