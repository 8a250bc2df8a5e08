"""A few rows to read, drawn evenly over the margin, with what the judges said of them."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import polars as pl

from datakit.ids import spelled
from datakit.records import (
    Candidates,
    Conversation,
    Edit,
    Judged,
    Label,
    Message,
    Pair,
    Prompt,
    Record,
)
from datakit.report.tally import Tally
from datakit.tables import from_frame

Find = Callable[[Sequence[str]], pl.DataFrame]

SAMPLES = 20
SHOWN_CHARS = 4000
SHOWN_TURNS = 12
SHOWN_TEXTS = 8
REASON_CHARS = 1000


def samples(tally: Tally, find_rows: Find, find_judged: Find | None = None) -> list[dict[str, Any]]:
    """Up to 20 rows as plain data, from the least to the greatest margin; long texts are cut.

    Each text is `{content, more}`: its first 4,000 characters and how many more there are.
    find_rows, find_judged: the rows of record tables that have these ids, in any order.
    """
    margin = _margin_name(tally.measure_names)
    drawn = _drawn(tally, margin)
    found = {row.id: row for row in from_frame(tally.kind, find_rows(drawn))}
    records = [found[row_id] for row_id in drawn]
    judged: dict[str, Judged] = {}
    if find_judged is not None:
        parents = find_judged(sorted({parent for row in records for parent in row.parents}))
        judged = {row.id: row for row in from_frame(Judged, parents)}
    return [_sample(row, margin, judged) for row in records]


def _margin_name(names: Sequence[str]) -> str | None:
    """The first measure named `margin`; None where no step measured one."""
    return next((name for name in names if name.rpartition(".")[2] == "margin"), None)


def _drawn(tally: Tally, margin: str | None) -> list[str]:
    """The ids of rows taken in turn from 20 equal stretches of the margin.

    Ids are hashes: within a stretch their order is as good as a draw, and the same every time.
    """
    ids = tally.ids
    stretch = np.zeros(len(ids), np.int64)
    margins = np.full(len(ids), np.nan)
    if margin is not None:
        margins = tally.measure_of_each(margin)
        low, high = np.nanmin(margins), np.nanmax(margins)
        if high > low:
            place = np.floor((margins - low) / (high - low) * SAMPLES).clip(0, SAMPLES - 1)
            stretch = np.where(np.isnan(place), -1, place).astype(np.int64)
    order = np.lexsort((ids, stretch))
    starts = np.searchsorted(stretch[order], stretch[order])
    turn = np.arange(len(ids)) - starts
    some = order[np.argsort(turn, kind="stable")[:SAMPLES]]
    return spelled(ids[some[np.lexsort((ids[some], margins[some]))]])


def _sample(row: Record, margin: str | None, ratings: dict[str, Judged]) -> dict[str, Any]:
    base: dict[str, Any] = {
        "id": row.id,
        "split": row.split,
        "margin": row.measures.get(margin) if margin else None,
        "measures": dict(sorted(row.measures.items())),
        "labels": dict(sorted(row.labels.items())),
    }
    if not isinstance(row, Pair):
        prompt, texts = _texts(row)
        return base | {"prompt": _turns(prompt), "texts": texts}
    parents = [ratings[parent] for parent in row.parents if parent in ratings]
    return base | {
        "prompt": _turns(row.prompt),
        "prompt_rejected": _turns(row.prompt_rejected),
        "chosen": _turns(row.chosen),
        "rejected": _turns(row.rejected),
        "chosen_model": row.chosen_from.model,
        "rejected_model": row.rejected_from.model,
        "rationale": _cut(row.rationale),
        "verdicts": [said for judged in parents for said in _said(row, judged)],
    }


def _said(pair: Pair, judged: Judged) -> Iterable[dict[str, Any]]:
    """The verdicts that show the pair's two answers, and no other."""
    sides = {
        index: side
        for side, turns, made in (
            ("chosen", pair.chosen, pair.chosen_from),
            ("rejected", pair.rejected, pair.rejected_from),
        )
        for index, response in enumerate(judged.responses)
        if len(turns) == 1 and response.text == turns[0].content and response.model == made.model
    }
    for verdict in judged.verdicts:
        shown = [sides.get(index, "") for index in verdict.shown]
        if not shown or "" in shown:
            continue
        best = max(verdict.scores)
        winners = [s for s, score in zip(shown, verdict.scores, strict=True) if score == best]
        yield {
            "judge": verdict.judge,
            "template": verdict.template,
            "form": verdict.form,
            "shown": shown,
            "scores": list(verdict.scores),
            "order": f"{shown[0]} first" if len(shown) > 1 else f"{shown[0]} alone",
            "prefers": "" if len(shown) < 2 else winners[0] if len(winners) == 1 else "tie",
            "reason": _cut(verdict.reason, REASON_CHARS),
        }


def _texts(row: Record) -> tuple[Sequence[Message], list[dict[str, Any]]]:
    """What stands before, and the titled texts, of a row that is no pair."""
    if isinstance(row, Candidates):
        shown = row.responses[:SHOWN_TEXTS]
        titles = [one.model or f"response {i}" for i, one in enumerate(shown, 1)]
        return row.prompt, [
            {"title": title} | _cut(one.text) for title, one in zip(titles, shown, strict=True)
        ]
    if isinstance(row, Label):
        title = "desirable" if row.desirable else "undesirable"
        return row.prompt, [{"title": title} | _cut(turn.content) for turn in row.completion]
    if isinstance(row, Edit):
        sides = (("draft", row.draft), ("edited", row.edited))
        return row.context, [{"title": title} | _cut(text) for title, text in sides]
    if isinstance(row, Prompt | Conversation):
        return row.messages, []
    return (), []


def _turns(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The last 12 turns, and a note of those before."""
    earlier = len(messages) - SHOWN_TURNS
    note = f"{earlier:,} earlier turns are not shown"
    before = [{"role": "note", "content": note, "more": 0}] if earlier > 0 else []
    return before + [{"role": m.role} | _cut(m.content) for m in messages[-SHOWN_TURNS:]]


def _cut(text: str, limit: int = SHOWN_CHARS) -> dict[str, Any]:
    return {"content": text[:limit], "more": max(0, len(text) - limit)}
