"""Structured answers: a pydantic type that a reply must fit, and the one chance to repair it.

The type's JSON schema is enforced by the endpoint where it can (`json_schema: true`), else asked
for in text. The reply is parsed strictly: one JSON object, no key twice, no unknown key, no value
of another type. Nothing is ever filled in.
"""

import json
import math
from dataclasses import replace
from functools import cache
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from datakit.errors import Unparsable
from datakit.models.chat import Ask
from datakit.records import Message
from datakit.text import shorten

A = TypeVar("A", bound=BaseModel)

_FENCE = "```"

REPAIR = """That reply cannot be used: {error}. Reply again with the JSON object alone, and change \
nothing else about your answer."""


@cache
def schema_of(answer: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema of an answer type, without titles; every field is required."""
    schema: dict[str, Any] = _plain(answer.model_json_schema())
    return schema


def read_answer(text: str, answer: type[A]) -> A:
    """The answer in a reply. Raises Unparsable (`invalid_answer`) with the first error."""
    said = text.strip()
    if said.startswith(_FENCE) and said.endswith(_FENCE):
        said = said.strip("`").removeprefix("json")
    try:
        data = json.loads(
            said, object_pairs_hook=_object, parse_constant=_no_number, parse_float=_finite
        )
    except (ValueError, RecursionError) as error:
        raise Unparsable("invalid_answer", f"not JSON: {shorten(str(error), 80)}", text) from error
    try:
        # A table must be able to hold it: half a surrogate pair, which JSON can spell, becomes `?`.
        clean = json.dumps(data, ensure_ascii=False).encode(errors="replace")
        return answer.model_validate_json(clean, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        detail = shorten(f"{where}: {first['msg']}" if where else first["msg"], 120)
        raise Unparsable("invalid_answer", detail, text) from error


def repair(ask: Ask, said: str, error: Unparsable) -> Ask:
    """The request that shows the model its own reply and what is wrong with it."""
    asked = REPAIR.replace("{error}", error.detail)
    turns = (Message(role="assistant", content=said), Message(role="user", content=asked))
    return replace(ask, messages=(*ask.messages, *turns))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; one that gives a key two values says nothing certain: ValueError."""
    found = dict(pairs)
    # As they are spelt: Python takes 1 for true.
    if len(found) < len(pairs) and any(repr(found[name]) != repr(value) for name, value in pairs):
        raise ValueError("a key has two values")
    return found


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits} is too large")
    return number


def _plain(schema: Any, is_schema: bool = True) -> Any:
    """As strict endpoints want it: every field required, no other, no title and no default."""
    if isinstance(schema, list):
        return [_plain(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    plain = {
        key: _plain(inner, key not in ("properties", "$defs"))
        for key, inner in schema.items()
        if not is_schema or key not in ("title", "default")
    }
    if is_schema and "properties" in schema:
        plain |= {"required": list(schema["properties"]), "additionalProperties": False}
    return plain
