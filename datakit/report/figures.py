"""Figures over columns: summaries with histograms, shares with intervals, what a judge did."""

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

Floats = npt.NDArray[np.float64]

_BINS = 20
_Z95 = 1.959964


def wilson(hits: int, n: int) -> dict[str, Any]:
    """Share `hits / n` with its Wilson 95 % interval; None instead of numbers where n is 0."""
    if n == 0:
        return {"n": 0, "share": None, "low": None, "high": None}
    share, z2 = hits / n, _Z95**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    reach = _Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    # At 0 and n hits the interval ends there exactly; rounding must not move it past.
    low = 0.0 if hits == 0 else max(0.0, middle - reach)
    high = 1.0 if hits == n else min(1.0, middle + reach)
    return {"n": n, "share": share, "low": low, "high": high}


def summary(values: Floats, edges: list[float] | None = None) -> dict[str, Any]:
    """n, mean, p10, p50, p90, max and a histogram; None and empty lists where there are no values.

    edges: bin edges shared with another column; otherwise `bin_edges(values)`.
    """
    if values.size == 0:
        nothing = dict.fromkeys(("mean", "p10", "p50", "p90", "max"))
        return {"n": 0} | nothing | {"histogram": {"edges": [], "counts": []}}
    edges = bin_edges(values) if edges is None else edges
    counts, _ = np.histogram(values, bins=edges)
    # Values are finite, yet sums and differences of very large ones need not be.
    scale = max(1.0, float(np.abs(values).max()) / 1e300)
    p10, p50, p90 = (float(one) * scale for one in np.quantile(values / scale, (0.1, 0.5, 0.9)))
    return {
        "n": int(values.size),
        "mean": float(np.mean(values / scale)) * scale,
        "p10": p10,
        "p50": p50,
        "p90": p90,
        "max": float(values.max()),
        "histogram": {"edges": edges, "counts": [int(count) for count in counts]},
    }


def bin_edges(values: Floats) -> list[float]:
    """Edges of about 20 equal bins at round numbers; `[v, v]` where all values are equal.

    Whatever lies far above the 98th percentile shares one last, wider bin.
    """
    if values.size == 0:
        return []
    low, top = float(values.min()), float(values.max())
    if not math.isfinite(top - low):
        return [low, top]
    high = float(np.quantile(values, 0.98))
    if top - high <= (high - low) / 2 or high == low:
        high = top
    step = _round_step((high - low) / _BINS)
    if step <= 1e-9 * max(abs(low), abs(high)):
        return [low, top]
    first, last = math.floor(low / step), math.ceil(high / step)
    edges = [float(f"{place * step:.12g}") for place in range(first, max(last, first + 1) + 1)]
    # The twelve digits of an edge must not cut off the value that stands on it.
    edges[0] = min(edges[0], low)
    if top > edges[-1]:
        edges = [*edges, top] if high < top else [*edges[:-1], top]
    return edges


def _round_step(width: float) -> float:
    """The next 1, 2 or 5 times a power of ten."""
    if width <= 0:
        return 0.0
    power = 10.0 ** math.floor(math.log10(width))
    return next(power * lead for lead in (1, 2, 5, 10) if power * lead >= width * (1 - 1e-9))


class JudgeCounts:
    """What is counted of raw verdicts, part by part; the verdicts of a row come together."""

    def __init__(self) -> None:
        self.names: dict[str, Counter[str]] = {
            name: Counter() for name in ("judge", "template", "form")
        }
        self.pairwise = self.first = self.second = self.flips = self.both = 0

    def add(self, verdicts: pl.DataFrame) -> None:
        """Take in verdicts, as `verdict_lines` gives them."""
        if not verdicts.height:
            return
        for name, counts in self.names.items():
            counts.update(value_counts(verdicts[name]))
        pairwise = verdicts.filter(
            pl.col("form") == "pairwise", pl.col("shown").list.len() == 2
        ).with_columns(
            one=pl.col("shown").list.get(0),
            other=pl.col("shown").list.get(1),
            lean=pl.col("scores").list.get(0) - pl.col("scores").list.get(1),
        )
        self.pairwise += pairwise.height
        self.first += int((pairwise["lean"] > 0).sum())
        self.second += int((pairwise["lean"] < 0).sum())
        flips, both = _flips(pairwise)
        self.flips += flips
        self.both += both

    def figures(self) -> dict[str, Any]:
        """Counts and biases over the pairwise verdicts.

        first_share: of decided verdicts, those for what was shown first; flip_share: of pairs of
        responses that one judge saw in both orders, those whose winner changes with the order (a
        tie in one order is no flip); tie_share: of all pairwise verdicts. Each with n and its
        interval.
        """
        decided = self.first + self.second
        return {
            "verdicts": self.names["judge"].total(),
            "judges": ranked(self.names["judge"]),
            "templates": ranked(self.names["template"]),
            "forms": ranked(self.names["form"]),
            "tie_share": wilson(self.pairwise - decided, self.pairwise),
            "first_share": wilson(self.first, decided),
            "flip_share": wilson(self.flips, self.both),
        }


def judge_figures(verdicts: pl.DataFrame) -> dict[str, Any]:
    """The figures of all verdicts, as `verdict_lines` gives them."""
    counts = JudgeCounts()
    counts.add(verdicts)
    return counts.figures()


def verdict_lines(judged: pl.DataFrame, first_row: int) -> pl.DataFrame:
    """One line for each verdict of a `Judged` table, without its texts; `row` tells its row."""
    names = ("judge", "template", "form", "aspect", "shown", "scores")
    rows = pl.int_range(first_row, first_row + pl.len(), dtype=pl.Int64())
    return (
        judged.select(rows.alias("row"), "verdicts")
        .explode("verdicts")
        .drop_nulls("verdicts")
        .select("row", *(pl.col("verdicts").struct.field(name) for name in names))
    )


def _flips(pairwise: pl.DataFrame) -> tuple[int, int]:
    """(flips, pairs seen in both orders)."""
    key = ["row", "judge", "template", "aspect", "low", "high"]
    swapped = pl.col("one") > pl.col("other")
    both = (
        pairwise.with_columns(
            low=pl.min_horizontal("one", "other"),
            high=pl.max_horizontal("one", "other"),
            swapped=swapped,
            lean=pl.when(swapped).then(-pl.col("lean")).otherwise(pl.col("lean")),
        )
        .group_by(*key, "swapped", maintain_order=True)
        .agg(pl.col("lean").last())
        .group_by(key)
        .agg(orders=pl.len(), least=pl.col("lean").min(), most=pl.col("lean").max())
        .filter(pl.col("orders") == 2)
    )
    return both.filter(pl.col("least") < 0, pl.col("most") > 0).height, both.height


def value_counts(values: pl.Series) -> dict[str, int]:
    """How often each text occurs."""
    counts = values.drop_nulls().alias("value").to_frame().group_by("value").len()
    return dict(counts.iter_rows())


def ranked(counts: Mapping[str, int], top: int | None = None) -> dict[str, int]:
    """The most frequent first, then by name."""
    return dict(sorted(counts.items(), key=lambda one: (-one[1], one[0]))[:top])
