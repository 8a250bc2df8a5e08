"""Single values of a row: scalars, numbers, times, texts, one nested response; JSON of the rest."""

import base64
import json
import math
from collections.abc import Iterator, Sequence
from datetime import UTC, date, datetime, time
from typing import Any, cast

from datakit.errors import Rejected
from datakit.records import Response
from datakit.sources._layouts import Row
from datakit.sources._turns import sound, text_of, wrong_type

_NOT_GIVEN = frozenset({"", "n/a", "na", "nan", "none", "null"})
_TEXT_NAMES = ("response", "text", "content", "completion")
_GIVEN_NAMES = ("model", "finish_reason")
_RATINGS = frozenset({"rating", "score"})


def scalar(value: object, column: str) -> str:
    """A text, number or truth value as text."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str | int | float):
        return sound(str(value), column)
    raise wrong_type(value, column, "text or a number")


def optional_text(value: object, column: str) -> str:
    """A text, empty where the row has none."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise wrong_type(value, column, "text")
    return sound(value, column)


def texts(value: object, column: str) -> list[str]:
    """One text or a list of texts; none where the row has none."""
    if value is None or value == "":
        return []
    found = cast("list[object]", value) if isinstance(value, list) else [value]
    for one in found:
        if not isinstance(one, str):
            raise wrong_type(one, column, "text")
        sound(one, column)
    return cast("list[str]", found)


def number(value: object, column: str) -> float | None:
    """A number, also one written as text; None where none is given (null, NaN, "N/A")."""
    if value is None or (isinstance(value, str) and value.strip().lower() in _NOT_GIVEN):
        return None
    try:
        found = float(cast("Any", value))
    except (TypeError, ValueError, OverflowError) as error:
        raise wrong_type(value, column, "a number") from error
    return None if math.isnan(found) else found


def moment(value: object, column: str) -> datetime | None:
    """A time in UTC; one without a zone is taken to be in UTC."""
    if value is None or value == "":
        return None
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError as error:
            raise wrong_type(value, column, "an ISO time") from error
    elif isinstance(value, date) and not isinstance(value, datetime):
        value = datetime.combine(value, time())
    if not isinstance(value, datetime):
        raise wrong_type(value, column, "a time")
    return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def nested_response(value: object, where: str) -> tuple[Response, Row]:
    """One response of a list, and what of it was not read.

    Every numeric leaf is a measure named by its own key, or by the key above where its own is only
    `Rating` or `Score`; a rating may be written as text.
    """
    if isinstance(value, str):
        return Response(text=text_of(value, where)), {}
    if not isinstance(value, dict):
        raise wrong_type(value, where, "a response")
    one = cast("Row", value)
    name = next((name for name in _TEXT_NAMES if one.get(name) is not None), None)
    if name is None:
        raise Rejected("null_value", f"column {where!r} has none of {', '.join(_TEXT_NAMES)}")
    text = text_of(one[name], f"{where}.{name}")
    given = {key: optional_text(one.get(key), f"{where}.{key}") for key in _GIVEN_NAMES}
    rest = {key: inner for key, inner in one.items() if key not in (name, *_GIVEN_NAMES)}
    measures: dict[str, float] = {}
    for path, found in _ratings(rest, []):
        last = path[-2] if len(path) > 1 and path[-1].lower() in _RATINGS else path[-1]
        measures[".".join(path) if last in measures else last] = found
    return Response(text=text, measures=measures, **given), _unread(rest)


def compact_json(value: object) -> str:
    """JSON without spaces, keys sorted; dates in ISO form, bytes in base64, NaN as null."""
    try:
        text = _dumps(value, ascii_only=False)
        text.encode()
    except ValueError:  # NaN, infinity or half of a surrogate pair, which a JSON text lacks
        return _dumps(_without_nan(value), ascii_only=True)
    return text


def _ratings(value: Row, path: list[str]) -> Iterator[tuple[list[str], float]]:
    for key, inner in value.items():
        if isinstance(inner, dict):
            yield from _ratings(cast("Row", inner), [*path, key])
        elif (found := _rating(key, inner)) is not None:
            yield [*path, key], found


def _rating(key: str, value: object) -> float | None:
    """The number in one leaf; a text is one only where its key calls it a rating."""
    if isinstance(value, str):
        if key.lower() not in _RATINGS:
            return None
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None


def _unread(value: Row) -> Row:
    """What remains of a response beside its ratings and nulls."""
    rest: Row = {}
    for key, inner in value.items():
        kept: object = _unread(cast("Row", inner)) if isinstance(inner, dict) else inner
        if kept is not None and kept != {} and _rating(key, kept) is None:
            rest[key] = kept
    return rest


def _dumps(value: object, ascii_only: bool) -> str:
    return json.dumps(
        value,
        default=_json_safe,
        sort_keys=True,
        ensure_ascii=ascii_only,
        separators=(",", ":"),
        allow_nan=False,
    )


def _json_safe(value: object) -> str:
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return str(value)


def _without_nan(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _without_nan(one) for key, one in cast("Row", value).items()}
    if isinstance(value, list | tuple):
        return [_without_nan(one) for one in cast("Sequence[object]", value)]
    return value
