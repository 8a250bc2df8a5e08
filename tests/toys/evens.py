"""Keep rows labelled even, and measure them."""

import polars as pl

from datakit.records import Prompt
from datakit.step import FrameStep, Split


class Evens(FrameStep[Prompt, Prompt]):
    """A vectorised filter."""

    def apply(self, frame, kit):
        label = pl.col("labels").list.first().struct.field("value")
        kept = frame.filter(label == "even").select(
            "id", pl.lit(2.0).alias("measure.two"), pl.lit("yes").alias("label.seen")
        )
        dropped = frame.filter(label != "even").select("id", reason=pl.lit("odd"))
        return Split(kept, dropped)


__all__ = ["Evens"]
