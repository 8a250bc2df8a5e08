"""Length bounds: rows whose texts are too short or too long, in characters or words.

Source: the usual first rule of any filter; word bounds as in Gopher (Rae et al. 2021, 2112.11446,
    table A1, which keeps documents of 50 to 100,000 words).
Takes: any kind.
Gives: the same kind.
Measures: `characters` (Unicode code points) and `words` (runs without white space; of scripts
    without spaces each character), each over the whole row and by side: `.prompt`, `.chosen`,
    `.rejected`, `.response`, `.draft`, `.edited`; of candidates `.response.min` and
    `.response.max`; a pair of prompts has `.prompt.chosen` and `.prompt.rejected`. Pairs also have
    `ratio`: characters of the longer answer over those of the shorter, 1 or more.
Drops: `too_short`, `too_long`, `uneven`, only where a bound is set.
"""

from typing import Generic, Self

import polars as pl
from pydantic import Field, model_validator

from datakit.curation._sides import Rule, bounds, check_has, columns_of, over_sides, split
from datakit.curation._texts import Over
from datakit.findings import count_words, sided_texts
from datakit.kit import Kit
from datakit.step import FrameStep, In, Split


class Length(FrameStep[In, In], Generic[In]):
    """Keep rows whose texts have the wanted length. Bounds are inclusive.

    over: what the bounds are about. `prompt`: the turns before the answer. `response`: every answer
    by itself, so both sides of a pair. `row`: all texts together. max_ratio: how many times as
    long as the other the longer answer of a pair may be, whichever is chosen.
    """

    over: Over = "response"
    min_characters: int | None = Field(default=None, ge=0)
    max_characters: int | None = Field(default=None, ge=0)
    min_words: int | None = Field(default=None, ge=0)
    max_words: int | None = Field(default=None, ge=0)
    max_ratio: float | None = Field(default=None, ge=1, allow_inf_nan=False)

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        for unit, low, high in self._bounds():
            if low is not None and high is not None and low > high:
                raise ValueError(f"min_{unit} is {low}, above max_{unit}, which is {high}")
        return self

    def apply(self, frame: pl.DataFrame, kit: Kit) -> Split:
        if any(bound is not None for _, *both in self._bounds() for bound in both):
            check_has(frame, self.over)
        text = pl.col("text")
        counted = sided_texts(frame).select(
            "row", "side", characters=text.str.len_chars(), words=count_words(text)
        )
        wide = over_sides(frame, counted, ["characters", "words"])
        whole = counted.group_by("row").agg(pl.sum("characters", "words"))
        sums = frame.select("id").with_row_index("row").join(whole, on="row", how="left")
        wide = wide.join(sums.drop("row"), on="id", how="left", maintain_order="left")
        rules: list[Rule] = []
        for unit, low, high in self._bounds():
            rules += bounds(columns_of(wide, unit, self.over), low, high, "too_short", "too_long")
        if "characters.chosen" in wide.columns:
            sides = ["characters.chosen", "characters.rejected"]
            ratio = pl.max_horizontal(sides) / pl.min_horizontal(sides)
            wide = wide.with_columns(ratio=ratio)
            rules += bounds(["ratio"], None, self.max_ratio, "", "uneven")
        return split(wide, rules)

    def _bounds(self) -> list[tuple[str, int | None, int | None]]:
        return [
            ("characters", self.min_characters, self.max_characters),
            ("words", self.min_words, self.max_words),
        ]
