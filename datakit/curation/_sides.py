"""Measures by side of a row, and the rules that drop rows by them: what the filters share."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import polars as pl

from datakit.curation._texts import Over
from datakit.errors import InputError
from datakit.findings import ANSWERS, PROMPTS, SIDES
from datakit.step import Split

Several = Literal["range", "mean"]
"""What stands for the several responses of candidates: `.response.min` and `.response.max`, or
their mean as `.response`."""


def over_sides(
    frame: pl.DataFrame, values: pl.DataFrame, names: Sequence[str], several: Several = "range"
) -> pl.DataFrame:
    """`id`, and a column `<name>.<side>` for each measured name and each side that occurs.

    values: `row`, `side` and the columns `names`, one row for each text, as `sided_texts` gives
    them. A row without a text on a side has null there. Rows stand in the order of `frame`.
    """
    wide = frame.select("id").with_row_index("row")
    many = "responses" in frame.columns
    for side in SIDES:
        here = values.filter(pl.col("side") == side)
        if not here.height:
            continue
        if not (many and side == "response"):
            found = here.select("row", pl.col(names).name.suffix(f".{side}"))
        elif several == "mean":
            found = here.group_by("row").agg(
                pl.col(names).cast(pl.Float64).mean().name.suffix(f".{side}")
            )
        else:
            found = here.group_by("row").agg(
                pl.col(names).min().name.suffix(f".{side}.min"),
                pl.col(names).max().name.suffix(f".{side}.max"),
            )
        wide = wide.join(found, on="row", how="left", maintain_order="left")
    return wide.drop("row")


def columns_of(wide: pl.DataFrame, name: str, over: Over) -> list[str]:
    """The columns of a measure that `over` means, in the order of the sides.

    `row` means the measure of the whole row where there is one, else those of every side.
    """
    if over == "row" and name in wide.columns:
        return [name]
    sides = {"prompt": PROMPTS, "response": ANSWERS, "row": SIDES}[over]
    ends = [end for side in sides for end in (side, f"{side}.min", f"{side}.max")]
    return [f"{name}.{end}" for end in ends if f"{name}.{end}" in wide.columns]


def check_has(frame: pl.DataFrame, over: Over) -> None:
    """Raises InputError where a bound is set over something that the kind never has."""
    if over == "response" and frame.columns and _prompts_only(frame):
        raise InputError("`over: response` bounds nothing here: these rows have no response")


def _prompts_only(frame: pl.DataFrame) -> bool:
    answers = {"chosen", "responses", "completion", "edited", "feedback"}
    return "messages" in frame.columns and not answers & set(frame.columns)


@dataclass(frozen=True)
class Rule:
    """A row is dropped for `reason` where `broken` holds; `detail` is a sentence for a person."""

    reason: str
    broken: pl.Expr
    detail: pl.Expr


def bounds(
    columns: Sequence[str],
    low: float | None,
    high: float | None,
    too_low: str,
    too_high: str,
) -> list[Rule]:
    """A rule for each column and each bound that is set; bounds are inclusive, null breaks none."""
    rules: list[Rule] = []
    for name in columns:
        value = pl.col(name)
        said = value.cast(pl.Float64).round(4).cast(pl.String)
        if low is not None:
            detail = pl.format("{} is {}, below {}", pl.lit(name), said, pl.lit(f"{low:g}"))
            rules.append(Rule(too_low, value < low, detail))
        if high is not None:
            detail = pl.format("{} is {}, above {}", pl.lit(name), said, pl.lit(f"{high:g}"))
            rules.append(Rule(too_high, value > high, detail))
    return rules


def split(wide: pl.DataFrame, rules: Sequence[Rule], labels: Sequence[str] = ()) -> Split:
    """Rows that break a rule are dropped for the first that they break; the others keep all.

    wide: `id`, and columns that become labels where named in `labels`, else measures. A column
    whose name begins with `_` helps the rules and is not kept.
    """
    nothing = pl.lit(None, pl.String)
    reason = pl.coalesce(
        nothing, *[pl.when(rule.broken).then(pl.lit(rule.reason)) for rule in rules]
    )
    detail = pl.coalesce(nothing, *[pl.when(rule.broken).then(rule.detail) for rule in rules])
    marked = wide.with_columns(reason=reason, detail=detail)
    stays = pl.col("reason").is_null()
    added: list[pl.Expr] = []
    for name in wide.columns:
        if name == "id" or name.startswith("_"):
            continue
        if name in labels:
            added.append(pl.col(name).alias(f"label.{name}"))
        else:
            added.append(pl.col(name).cast(pl.Float64).alias(f"measure.{name}"))
    return Split(
        marked.filter(stays).select("id", *added),
        marked.filter(~stays).select("id", "reason", "detail"),
    )
