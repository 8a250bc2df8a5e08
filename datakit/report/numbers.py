"""The numbers of a version, as plain JSON data, and the gate over them.

A number is addressed by its dotted path (`lengths.chosen_longer.share`); a key may itself hold
dots, as the names of measures do (`measures.pair.margin.mean`).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, cast

import polars as pl

from datakit.report.figures import judge_figures, summary, value_counts
from datakit.report.lengths import lengths
from datakit.report.tally import Tally
from datakit.text import near_miss, shorten
from datakit.versions import StepCount, measure_names

NOT_STATED = "not stated"
_TOP = 20
_MISSING = object()


class Bounded(Protocol):
    """What a gate allows of one number."""

    @property
    def min(self) -> float | None: ...

    @property
    def max(self) -> float | None: ...


def report_numbers(
    tally: Tally, samples: Sequence[Mapping[str, Any]], funnel: Sequence[StepCount]
) -> dict[str, Any]:
    """Everything that the report says of a dataset.

    Shares are 0..1, lengths count characters (`words`: runs without white space).
    `dropped.share` and `failures.share` are of all rows that came to an end, in the dataset or in
    the rejects; `failures` are rows lost because a model failed.
    """
    kind, rows = tally.kind, tally.rows
    steps = _funnel(funnel)
    dropped = sum(step["dropped"] for step in steps.values())
    failed = sum(step["failed"] for step in steps.values())
    ended = max(1, dropped + rows.height)
    return {
        "kind": kind.__name__,
        "rows": rows.height,
        "prompts": rows["prompt"].n_unique(),
        "splits": dict(sorted(value_counts(rows["split"]).items())),
        "funnel": steps,
        "dropped": {"rows": dropped, "share": dropped / ended},
        "failures": {
            "rows": failed,
            "share": failed / ended,
            "kept_with_failures": int(rows["partly"].sum()),
        },
        "lengths": lengths(kind, rows),
        "measures": _measures(rows),
        "judge": judge_figures(tally.verdicts),
        "models": _models(rows),
        "categories": _categories(rows),
        "licenses": value_counts(_stated(rows["license"])),
        "sources": _sources(rows),
        "samples": list(samples),
    }


def lookup(report: Mapping[str, Any], path: str) -> float | None:
    """The number at a dotted path; None where there is none, or something that is no number."""
    return _as_number(_find(report, path))


def gate(report: Mapping[str, Any], bounds: Mapping[str, Bounded]) -> dict[str, str]:
    """For each path `pass`, or `fail:` and why. A number that is not there fails."""
    return {path: _judged_against(report, path, bound) for path, bound in bounds.items()}


def _judged_against(report: Mapping[str, Any], path: str, bound: Bounded) -> str:
    found = _find(report, path)
    value = _as_number(found)
    if found is None:
        return f"fail: {path} has no value, because there was nothing to count"
    if value is None:
        near = shorten(near_miss(path, _number_paths(report)), 300)
        return f"fail: the report has no number at {path!r}{near}"
    if bound.min is not None and value < bound.min:
        return f"fail: {path} is {_against(value, bound.min)}, below {bound.min:.12g}"
    if bound.max is not None and value > bound.max:
        return f"fail: {path} is {_against(value, bound.max)}, above {bound.max:.12g}"
    return "pass"


def _against(value: float, bound: float) -> str:
    """Short, unless that would make the value look like the bound."""
    short = f"{value:.4g}"
    return f"{value:.12g}" if float(short) == bound or abs(value) >= 1e4 else short


def _find(node: object, path: str) -> object:
    """What stands at a dotted path, the longest key first; `_MISSING` where nothing does."""
    if not isinstance(node, Mapping):
        return _MISSING
    mapping = cast("Mapping[str, object]", node)
    if path in mapping:
        return mapping[path]
    cuts = [place for place, mark in enumerate(path) if mark == "."]
    for cut in reversed(cuts):
        if path[:cut] in mapping:
            found = _find(mapping[path[:cut]], path[cut + 1 :])
            if found is not _MISSING:
                return found
    return _MISSING


def _as_number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value)


def _number_paths(node: Mapping[str, Any], before: str = "") -> Iterable[str]:
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _number_paths(cast("Mapping[str, Any]", value), f"{before}{key}.")
        elif _as_number(value) is not None:
            yield before + key


def _funnel(funnel: Sequence[StepCount]) -> dict[str, dict[str, Any]]:
    """Counts by alias, in order."""
    steps: dict[str, dict[str, Any]] = {}
    for one in funnel:
        alias = one.alias
        while alias in steps:
            alias += "+"
        steps[alias] = one.model_dump(exclude={"alias"})
    return steps


def _measures(rows: pl.DataFrame) -> dict[str, Any]:
    pairs = rows["measures"].explode().drop_nulls()
    names, values = pairs.struct.field("name"), pairs.struct.field("value")
    return {
        name: summary(values.filter(names == name).drop_nulls().to_numpy())
        for name in measure_names(rows)
    }


def _models(rows: pl.DataFrame) -> list[dict[str, Any]]:
    """Who was preferred over whom; for candidates, who answered how often."""
    if "chosen" in rows.columns:
        grouped = rows.group_by("chosen", "rejected").agg(pairs=pl.len())
        return grouped.sort(
            ["pairs", "chosen", "rejected"], descending=[True, False, False]
        ).to_dicts()
    if "models" in rows.columns:
        models = value_counts(rows["models"].explode())
        return [{"model": name, "responses": n} for name, n in models.items()]
    return []


def _categories(rows: pl.DataFrame) -> dict[str, dict[str, Any]]:
    """For each label: rows that have it, distinct values, and the 20 most frequent ones."""
    labels = rows["labels"].explode().drop_nulls()
    names, values = labels.struct.field("name"), labels.struct.field("value")
    found: dict[str, dict[str, Any]] = {}
    for name in measure_names(rows, "labels"):
        own = values.filter(names == name)
        counts = value_counts(own, _TOP)
        found[name] = {"rows": own.len(), "distinct": own.n_unique(), "values": counts}
    return found


def _stated(values: pl.Series) -> pl.Series:
    stated = pl.col("stated")
    frame = values.alias("stated").to_frame()
    return frame.select(
        pl.when(stated.str.strip_chars() == "").then(pl.lit(NOT_STATED)).otherwise(stated)
    ).to_series()


def _sources(rows: pl.DataFrame) -> list[dict[str, Any]]:
    """Rows by source and licence, the largest first."""
    columns = {"source": _stated(rows["source"]), "license": _stated(rows["license"])}
    counts = pl.DataFrame(columns).group_by("source", "license").agg(rows=pl.len())
    return counts.sort(["rows", "source", "license"], descending=[True, False, False]).to_dicts()
