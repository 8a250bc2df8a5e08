"""Special tokens and rendered chat templates inside texts.

Source: control tokens of the common chat templates (ChatML, Llama 2 and 3, Gemma, Mistral,
    DeepSeek, Alpaca) and transcripts of two speakers; a trainer renders them a second time.
Takes: any kind.
Gives: the same kind.
Measures: `template` by side (`.prompt`, `.chosen`, `.rejected`, `.response`, `.draft`, `.edited`):
    number of families of `datakit.findings.TEMPLATES` found there, 0 for none; of candidates
    `.response.min` and `.response.max`.
Drops: `template`, naming the side, only with `policy: drop`.
"""

from typing import Generic, Literal

import polars as pl

from datakit.curation._sides import bounds, check_has, columns_of, over_sides, split
from datakit.curation._texts import Over
from datakit.findings import has_template, sided_texts, templates
from datakit.kit import Kit
from datakit.step import FrameStep, In, Split


class Markup(FrameStep[In, In], Generic[In]):
    """Find texts that hold what only a chat template should write.

    over: where a find drops the row. policy: `flag` measures only.
    """

    over: Over = "row"
    policy: Literal["drop", "flag"] = "drop"

    def apply(self, frame: pl.DataFrame, kit: Kit) -> Split:
        texts = sided_texts(frame)
        # Few texts have any, so the families are told apart only of those.
        found = texts.select("row", "side", "text", has=has_template(pl.col("text")))
        some = found.filter("has").select(
            "row", "side", template=templates(pl.col("text")).list.len()
        )
        none = found.filter(~pl.col("has")).select("row", "side", template=pl.lit(0, pl.UInt32()))
        wide = over_sides(frame, pl.concat([some, none]), ["template"])
        if self.policy == "flag":
            return split(wide, [])
        check_has(frame, self.over)
        return split(wide, bounds(columns_of(wide, "template", self.over), None, 0, "", "template"))
