"""Prompts in capitals."""

import polars as pl

from datakit.records import Prompt
from datakit.step import FrameStep, Split


class Upper(FrameStep[Prompt, Prompt]):
    """Rewrites what a row says."""

    def apply(self, frame, kit):
        turn = pl.element().struct
        upper = pl.struct(role=turn.field("role"), content=turn.field("content").str.to_uppercase())
        return Split(
            frame.select("id", messages=pl.col("messages").list.eval(upper)),
            frame.clear().select("id", reason=pl.lit("")),
        )
