"""Refusals: answers that decline what they were asked.

Source: phrases near the start of an answer, as usual in filters of instruction data (WizardLM
    2304.12244 drops evolved answers with such phrases); `datakit.findings.refuses`, English only.
Takes: any kind; prompts, which have no answers, only with `drop: none`.
Gives: the same kind.
Measures: `refuses` by answer (`.chosen`, `.rejected`, `.response`, `.draft`, `.edited`): 1 where it
    declines, else 0; of candidates `.response` is the share of responses that decline, 0..1.
Drops: `refusal` (`drop: any`), `one_sided_refusal` (`drop: one_sided`).
"""

from typing import Generic, Literal

import polars as pl

from datakit.curation._sides import Rule, check_has, columns_of, over_sides, split
from datakit.findings import ANSWERS, refuses, sided_texts
from datakit.kit import Kit
from datakit.step import FrameStep, In, Split


class Refusal(FrameStep[In, In], Generic[In]):
    """Find answers that decline.

    drop: `any` drops rows with an answer that does, `one_sided` those where some answers do and
    others do not, `none` only measures. A one-sided refusal teaches when to decline: drop it only
    where that is not to be learned.
    """

    drop: Literal["any", "one_sided", "none"] = "none"

    def apply(self, frame: pl.DataFrame, kit: Kit) -> Split:
        texts = sided_texts(frame).filter(pl.col("side").is_in(ANSWERS))
        found = texts.select("row", "side", refuses=refuses(pl.col("text")).cast(pl.Float64))
        wide = over_sides(frame, found, ["refuses"], several="mean")
        columns = columns_of(wide, "refuses", "response")
        if self.drop != "none":
            check_has(frame, "response")
        if not columns or self.drop == "none":
            return split(wide, [])
        most, least = pl.max_horizontal(columns), pl.min_horizontal(columns)
        if self.drop == "any":
            names = [pl.when(pl.col(name) > 0).then(pl.lit(name)) for name in columns]
            said = pl.format("above 0: {}", pl.concat_str(names, separator=", ", ignore_nulls=True))
            return split(wide, [Rule("refusal", most > 0, said)])
        shares = pl.format("refuses: least {}, most {}", least.round(4), most.round(4))
        return split(wide, [Rule("one_sided_refusal", (least < 1) & (most > 0), shares)])
