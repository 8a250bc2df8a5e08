"""The numbers of a version, as plain JSON data, and the gate over them.

A number is addressed by its dotted path (`lengths.chosen_longer.share`); a key may itself hold
dots, as the names of measures do (`measures.pair.margin.mean`).
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, cast

from datakit.records import Pair
from datakit.report.figures import ranked, summary
from datakit.report.lengths import lengths
from datakit.report.tally import Tally
from datakit.text import near_miss, shorten
from datakit.versions import StepCount

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
    kind, rows = tally.kind, tally.height
    steps = _funnel(funnel)
    dropped = sum(step["dropped"] for step in steps.values())
    failed = sum(step["failed"] for step in steps.values())
    ended = max(1, dropped + rows)
    return {
        "kind": kind.__name__,
        "rows": rows,
        "prompts": tally.prompts,
        "splits": dict(sorted(tally.splits.items())),
        "funnel": steps,
        "dropped": {"rows": dropped, "share": dropped / ended},
        "failures": {
            "rows": failed,
            "share": failed / ended,
            "kept_with_failures": tally.partly,
        },
        "lengths": lengths(kind, tally.lengths, rows),
        "measures": {name: summary(tally.measured(name)) for name in tally.measure_names},
        "judge": tally.judge.figures(),
        "models": _models(tally),
        "categories": _categories(tally.labels),
        "licenses": _licenses(tally.origins),
        "sources": _sources(tally.origins),
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


def _models(tally: Tally) -> list[dict[str, Any]]:
    """Who was preferred over whom; for candidates, who answered how often."""
    most_first = sorted(tally.models.items(), key=lambda one: (-one[1], one[0]))
    if issubclass(tally.kind, Pair):
        return [
            {"chosen": chosen, "rejected": rejected, "pairs": n}
            for (chosen, rejected), n in most_first
        ]
    return [{"model": model, "responses": n} for (model,), n in most_first]


def _categories(labels: Mapping[str, Counter[str]]) -> dict[str, dict[str, Any]]:
    """For each label: rows that have it, distinct values, and the 20 most frequent ones."""
    return {
        name: {
            "rows": labels[name].total(),
            "distinct": len(labels[name]),
            "values": ranked(labels[name], _TOP),
        }
        for name in sorted(labels)
    }


def _stated(text: str) -> str:
    return text if text.strip() else NOT_STATED


def _licenses(origins: Mapping[tuple[str, str], int]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for (_, license_), rows in origins.items():
        counts[_stated(license_)] += rows
    return ranked(counts)


def _sources(origins: Mapping[tuple[str, str], int]) -> list[dict[str, Any]]:
    """Rows by source and licence, the largest first."""
    counts: Counter[tuple[str, str]] = Counter()
    for (source, license_), rows in origins.items():
        counts[_stated(source), _stated(license_)] += rows
    return [
        {"source": source, "license": license_, "rows": rows}
        for (source, license_), rows in sorted(counts.items(), key=lambda one: (-one[1], one[0]))
    ]
