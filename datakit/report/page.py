"""The report as one page that needs nothing else: no script, no network, no other file.

Everything that a model, a user or a file wrote is escaped, its control and direction marks are
made visible, and the page's own policy forbids scripts and loading.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml

from datakit.report.numbers import lookup
from datakit.report.words import reason_words
from datakit.text import plain
from datakit.versions import Manifest

_TICKS = 5
_FLIPS = """Of answer pairs judged in both orders, those whose winner changed. The two verdicts \
cancel out to a tie. If it is high, use a stronger judge or a sharper criterion."""
_TIES = """Of all pairwise verdicts. If it is high, the answers are too alike: use models that \
differ more, or ask for more samples."""


def render_page(manifest: Manifest, report: Mapping[str, Any]) -> str:
    """The whole HTML page; the same bytes for the same input."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "count": count,
        "percent": percent,
        "num": short_number,
        "safe_text": safe_text,
        "words": reason_words,
    }
    page = environment.get_template("page.html.j2")
    return page.render(
        m=manifest,
        r=report,
        summary=headline(manifest, report),
        unfinished=unfinished(manifest),
        gates=gate_lines(manifest, report),
        funnel=_funnel(report),
        lengths=_lengths(report),
        margins=_histograms(report, margins=True),
        measures=_histograms(report, margins=False),
        judge=_judge(report["judge"]),
        duels=duels(report["models"]),
        categories=_categories(report),
        recipe=yaml.safe_dump(manifest.recipe, sort_keys=False, allow_unicode=True, width=88),
    )


def count(value: float) -> str:
    """A whole number with thousands apart."""
    return f"{value:,.0f}"


def percent(value: float | None) -> str:
    """A share in percent; a dash where there is none. Never rounds to 0 or 100 what is not."""
    if value is None:
        return "–"
    if value in (0, 1):
        return f"{100 * value:.0f} %"
    shown = f"{100 * value:.1f} %"
    return {"0.0 %": "< 0.1 %", "100.0 %": "> 99.9 %"}.get(shown, shown)


def short_number(value: float | None) -> str:
    """Three significant digits, whole numbers whole; a dash where there is none."""
    if value is None:
        return "–"
    if abs(value) >= 1e9:
        return f"{value:.3g}"
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def safe_text(value: object) -> str:
    """Text with control and direction marks made visible; line ends become plain ones."""
    return plain(str(value).replace("\r\n", "\n"))


def headline(manifest: Manifest, report: Mapping[str, Any]) -> str:
    """One sentence that says what a reader must know first."""
    rows, dropped = report["rows"], report["dropped"]["rows"] - manifest.pending
    noun = {"Pair": "preference pair", "Label": "labelled answer"}.get(report["kind"], "row")
    said = f"{count(rows)} {noun}{'' if rows == 1 else 's'}"
    said += f" over {count(report['prompts'])} prompt{'' if report['prompts'] == 1 else 's'}; "
    said += f"{count(dropped)} row{'' if dropped == 1 else 's'} dropped on the way. "
    failed = sum(verdict != "pass" for verdict in manifest.gate.values())
    if not manifest.gate:
        return said + "No gate was set."
    total = len(manifest.gate)
    return said + (f"{failed} of {total} gates failed." if failed else f"All {total} gates passed.")


def unfinished(manifest: Manifest) -> str:
    """What a reader of a pre-release must know before all else; empty for a whole version."""
    if not manifest.pending:
        return ""
    rows = "1 row is" if manifest.pending == 1 else f"{count(manifest.pending)} rows are"
    return (
        f"A partial pre-release: {rows} pending and left out, because their answers were not yet "
        "asked for. It is no base for later versions."
    )


def gate_lines(manifest: Manifest, report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each gate with its bounds in words, the value and the verdict."""
    bounds = cast("object", manifest.recipe.get("gate"))
    known = cast("Mapping[str, Any]", bounds) if isinstance(bounds, Mapping) else {}
    lines: list[dict[str, Any]] = []
    for path, verdict in manifest.gate.items():
        bound = known.get(path)
        sides = cast("Mapping[str, Any]", bound) if isinstance(bound, Mapping) else {}
        wanted = [
            f"{words} {_bound(sides[side])}"
            for side, words in (("min", "at least"), ("max", "at most"))
            if sides.get(side) is not None
        ]
        lines.append(
            {
                "path": path,
                "bound": " and ".join(wanted),
                "value": lookup(report, path),
                "passed": verdict == "pass",
                "said": verdict.removeprefix("fail: ").removeprefix(f"{path} "),
            }
        )
    return lines


def _bound(value: object) -> str:
    return f"{value:.12g}" if isinstance(value, int | float) else str(value)


def duels(models: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each two models, how often each was preferred; the more frequent winner first."""
    wins = {(one["chosen"], one["rejected"]): one["pairs"] for one in models if "pairs" in one}
    found: list[dict[str, Any]] = []
    for (one, other), pairs in wins.items():
        lost = wins.get((other, one), 0)
        if one == other:
            found.append({"one": one, "other": other, "won": pairs, "lost": None, "n": pairs})
        elif (pairs, other) > (lost, one):
            found.append(
                {"one": one, "other": other, "won": pairs, "lost": lost, "n": pairs + lost}
            )
    return sorted(found, key=lambda duel: (-duel["n"], duel["one"], duel["other"]))


def _funnel(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The steps with the width of their bars in percent of the largest step."""
    steps: Mapping[str, Mapping[str, Any]] = report["funnel"]
    most = max((max(s["rows_in"], s["kept"] + s["dropped"]) for s in steps.values()), default=0)
    return [
        {
            **step,
            "alias": alias,
            "kept_width": 100 * step["kept"] / max(most, 1),
            "dropped_width": 100 * step["dropped"] / max(most, 1),
            "reasons": sorted(step["reasons"].items(), key=lambda one: (-one[1], one[0])),
        }
        for alias, step in steps.items()
    ]


def _lengths(report: Mapping[str, Any]) -> dict[str, Any]:
    """Rows of the table of lengths, and the charts: the two sides together, the rest alone."""
    texts = {name: figures for name, figures in report["lengths"].items() if "histogram" in figures}
    sides = [(name, texts[name]["histogram"]) for name in ("chosen", "rejected") if name in texts]
    alone = {name: figures for name, figures in texts.items() if name not in dict(sides)}
    return {
        "rows": [(name, f, report["lengths"]["words"][name]) for name, f in texts.items()],
        "sides": _chart(sides),
        "alone": [(name, _chart([(name, f["histogram"])])) for name, f in alone.items()],
        "longer": report["lengths"].get("chosen_longer"),
    }


def _histograms(report: Mapping[str, Any], *, margins: bool) -> list[dict[str, Any]]:
    return [
        {"name": name, "figures": figures, "chart": _chart([(name, figures["histogram"])])}
        for name, figures in report["measures"].items()
        if (name.rpartition(".")[2] == "margin") == margins
    ]


def _chart(series: Iterable[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """Histograms over the same edges as groups of bars, heights in percent of the highest."""
    named = list(series)
    edges: list[float] = named[0][1]["edges"] if named else []
    bins = max(0, len(edges) - 1)
    highest = max((max(h["counts"], default=0) for _, h in named), default=0)
    groups = [
        {
            "range": f"{short_number(edges[place])} to {short_number(edges[place + 1])}",
            "bars": [
                {
                    "name": name,
                    "count": histogram["counts"][place],
                    "height": 100 * histogram["counts"][place] / max(highest, 1),
                }
                for name, histogram in named
            ],
        }
        for place in range(bins)
    ]
    marks = sorted({round(bins * tick / (_TICKS - 1)) for tick in range(_TICKS)}) if bins else []
    ticks = [{"left": 100 * mark / bins, "label": short_number(edges[mark])} for mark in marks]
    wider = bins > 1 and edges[-1] - edges[-2] > 1.5 * (edges[1] - edges[0])
    return {"groups": groups, "ticks": ticks, "highest": highest, "wider": wider}


def _categories(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for name, label in report["categories"].items():
        values: Mapping[str, int] = label["values"]
        most = max(values.values(), default=1)
        lines = [(value, n, 100 * n / most, n / label["rows"]) for value, n in values.items()]
        rest = label["distinct"] - len(values), label["rows"] - sum(values.values())
        found.append({"name": name, "lines": lines, "rest": rest, **label})
    return found


def _judge(judge: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The judge's figures, each with what it means and what to do about it."""
    first = judge["first_share"]
    lean = "no lean can be told from chance."
    if first["n"] and (first["low"] > 0.5 or first["high"] < 0.5):
        side = "first" if first["low"] > 0.5 else "second"
        lean = f"this judge leans to what is shown {side}: keep asking in both orders."
    first_meaning = "Of verdicts that are no tie. An unbiased judge gives 50 %. Here "
    first_meaning += lean if first["n"] else "there are none."
    texts = (
        ("first_share", "Prefers what it sees first", first_meaning),
        ("flip_share", "Changes its mind with the order", _FLIPS),
        ("tie_share", "Sees no difference", _TIES),
    )
    return [{"title": title, "meaning": meaning, **judge[name]} for name, title, meaning in texts]
