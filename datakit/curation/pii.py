"""Personal data and secrets: masked, dropped or counted.

Source: rules of known form, as in the pipelines of ROOTS (2303.03915) and Dolma (2402.00159), with
    checks of the forms that carry one; the kinds are those of `datakit.findings_pii`.
Takes: any kind.
Gives: the same kind; with `policy: mask` a row that held any is a new row, made from the old.
Measures: `entities` (number of different ones in the whole row), and for each kind found its own
    number: `email`, `phone`, `iban`, `card`, `ssn`, `ip`, `secret`, `url`.
Drops: `pii` (`policy: drop`); with `policy: mask`: `equal_once_masked` where the two sides of a
    pair differ in nothing else, and `pii_stays` where a part of the row that is not masked holds
    some. Details are made of kinds and counts. The record of a dropped row is whole, as always: it
    stays in the rejects, as the rows before this step stay in its input.
"""

import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Generic, Literal, cast

import polars as pl
from pydantic import Field

from datakit.findings_pii import KINDS, Kind, Masks, may_hold_pii
from datakit.kit import Kit
from datakit.step import FrameStep, In, Split
from datakit.text import canonical_json

_GROUPS: tuple[tuple[str, ...], ...] = (
    ("messages",),
    ("prompt", "prompt_rejected"),
    ("context",),
    ("chosen", "rejected"),
    ("completion",),
    ("responses",),
    ("draft", "edited"),
    ("rationale",),
    ("feedback",),
    ("verdicts",),
    ("references",),
    ("chosen_from", "rejected_from"),
    ("extra",),
)
"""Every column that holds text of a person or a model, in the order in which entities are numbered.
Columns of one group are taken in the order of their texts, never of their names: else a high number
would tell the rejected answer from the chosen one."""

_TEXT_FIELDS = frozenset(("content", "text", "reasoning", "reason", "raw"))
_NEVER_MASKED = ("failures",)
"""A derived row takes over its parent's failures, whatever it has itself."""


class Pii(FrameStep[In, In], Generic[In]):
    """Mask personal data and secrets, or drop or count the rows that hold some.

    policy: `mask` puts a placeholder in their place: `<EMAIL_1>` is the same e-mail in every text
    of a row. `drop` drops the row, `flag` only measures. kinds: what is looked for. `user`, which
    tells whose rows belong together, and labels are left as they are.
    """

    policy: Literal["mask", "drop", "flag"] = "mask"
    kinds: tuple[Kind, ...] = Field(default=KINDS, min_length=1)

    def apply(self, frame: pl.DataFrame, kit: Kit) -> Split:
        columns = [name for group in _GROUPS for name in group if name in frame.columns]
        seen = [name for name in (*columns, *_NEVER_MASKED) if name in frame.columns]
        texts = [_joined(pl.col(name), frame.schema[name]) for name in seen]
        held = pl.any_horizontal(may_hold_pii(text).fill_null(value=False) for text in texts)
        suspects = frame.filter(held)
        rows: list[dict[str, Any]] = []
        reasons: dict[str, tuple[str, str]] = {}
        counts: dict[str, dict[Kind, int]] = {}
        for piece in suspects.select("id", *seen).iter_slices(1_000):
            for row in piece.to_dicts():
                row_id: str = row["id"]
                masks = Masks(list(_texts_of(row)), self.kinds)
                counted = masks.counts()
                if not counted:
                    continue
                counts[row_id] = counted
                masked = _masked(row, columns, masks)
                reason = self._reason(row, masked, masks)
                if reason:
                    said = ", ".join(f"{counted[kind]} {kind}" for kind in KINDS if kind in counted)
                    reasons[row_id] = (reason, said)
                else:
                    rows.append(masked)
        return self._split(frame, columns, rows, counts, reasons)

    def _reason(self, row: dict[str, Any], masked: dict[str, Any], masks: Masks) -> str:
        """Why the row is dropped, or nothing."""
        if self.policy != "mask":
            return "pii" if self.policy == "drop" else ""
        if masks.stuck or any(
            masks.mask(text) != text
            for name in _NEVER_MASKED
            for text in _strings(row.get(name), name)
        ):
            return "pii_stays"
        two = bool(row.get("prompt_rejected"))
        first, other = ("prompt", "prompt_rejected") if two else ("chosen", "rejected")
        if other in row and row[first] != row[other] and masked[first] == masked[other]:
            return "equal_once_masked"
        return ""

    def _split(
        self,
        frame: pl.DataFrame,
        columns: list[str],
        rows: list[dict[str, Any]],
        counts: dict[str, dict[Kind, int]],
        reasons: dict[str, tuple[str, str]],
    ) -> Split:
        ids = list(reasons)
        dropped = pl.DataFrame(
            {
                "id": ids,
                "reason": [reasons[one][0] for one in ids],
                "detail": [reasons[one][1] for one in ids],
            },
            schema={"id": pl.String(), "reason": pl.String(), "detail": pl.String()},
        )
        table: dict[str, list[Any]] = {"id": list(counts)}
        table["measure.entities"] = [sum(one.values()) for one in counts.values()]
        for kind in KINDS:
            table[f"measure.{kind}"] = [one.get(kind) for one in counts.values()]
        numbers = {name: pl.Float64() for name in table if name != "id"}
        measured = pl.DataFrame(table, schema={"id": pl.String(), **numbers})
        kept = (
            frame.join(dropped, on="id", how="anti", maintain_order="left")
            .select("id", *columns)
            .join(measured, on="id", how="left", maintain_order="left")
            .with_columns(pl.col("measure.entities").fill_null(0))
        )
        if self.policy != "mask" or not rows:
            return Split(kept.drop(columns), dropped)
        schema = {name: frame.schema[name] for name in ("id", *columns)}
        masked = pl.DataFrame(rows, schema=schema)
        changed = kept.drop(columns).join(masked, on="id", how="inner").select(kept.columns)
        whole = pl.concat([kept.join(masked, on="id", how="anti"), changed])
        ordered = kept.select("id").join(whole, on="id", how="left", maintain_order="left")
        return Split(ordered, dropped)


def _joined(column: pl.Expr, kind: pl.DataType) -> pl.Expr:
    """All texts inside a column as one."""
    if isinstance(kind, pl.List):
        inner = cast("pl.DataType", kind.inner)
        return column.list.eval(_joined(pl.element(), inner)).list.join("\n", ignore_nulls=True)
    if isinstance(kind, pl.Struct):
        fields = [
            _joined(column.struct.field(field.name), cast("pl.DataType", field.dtype))
            for field in kind.fields
            if field.name in _TEXT_FIELDS
        ]
        return pl.concat_str(fields, separator="\n", ignore_nulls=True)
    return column


def _texts_of(row: dict[str, Any]) -> Iterator[str]:
    """Every text of a row, in the order in which entities are numbered."""
    for group in _GROUPS:
        found = [list(_strings(row[name], name)) for name in group if name in row]
        for texts in sorted(found):
            yield from texts
    for name in _NEVER_MASKED:
        yield from _strings(row.get(name), name)


def _strings(value: Any, name: str) -> Iterator[str]:
    texts: list[str] = []

    def noted(text: str) -> str:
        texts.append(text)
        return text

    _mapped(value, name, noted)
    yield from texts


def _masked(row: dict[str, Any], columns: list[str], masks: Masks) -> dict[str, Any]:
    changed = {name: _mapped(row[name], name, masks.mask) for name in columns}
    return {"id": row["id"], **changed}


def _mapped(value: Any, name: str, change: Callable[[str], str]) -> Any:
    """The value of column `name` with each of its texts changed."""
    return _json(value, change) if name == "extra" and value else _walked(value, change)


def _walked(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_walked(one, change) for one in cast("list[Any]", value)]
    if isinstance(value, dict):
        fields = cast("dict[str, Any]", value)
        return {
            name: _walked(one, change) if name in _TEXT_FIELDS else one
            for name, one in fields.items()
        }
    return value


def _json(text: str, change: Callable[[str], str]) -> str:
    """A JSON text with its strings changed, and each number whose digits change made a string."""
    try:
        value = json.loads(text)
        changed = _json_value(value, change)
        return text if changed == value else canonical_json(changed)
    except (ValueError, RecursionError):
        return change(text)


def _json_value(value: Any, change: Callable[[str], str]) -> Any:
    inside = partial(_json_value, change=change)
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [inside(one) for one in cast("list[Any]", value)]
    if isinstance(value, dict):
        fields = cast("dict[str, Any]", value)
        return {change(name): inside(one) for name, one in fields.items()}
    if isinstance(value, int | float) and not isinstance(value, bool):
        said = change(str(value))
        return value if said == str(value) else said
    return value
