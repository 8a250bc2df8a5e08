"""JSON that fits a schema, and JSON that does not."""

import json
import math
import re
from hashlib import sha256
from typing import Any

Json = dict[str, Any]

NAMED = re.compile(r"JSON schema\b[^{}]{0,200}?:\s*(?={)", re.IGNORECASE)
WORDS = ["amber", "cedar", "delta", "field", "finds", "grove", "harbor", "holds", "island"]
WORDS += ["keeps", "lantern", "meadow", "north"]


def sentences(seed: str) -> str:
    """Two sentences, a function of `seed` alone."""
    digest = sha256(seed.encode()).digest()
    words = [WORDS[byte % len(WORDS)] for byte in digest[: 16 + digest[-1] % 15]]
    return f"{' '.join(words[:8]).capitalize()}. {' '.join(words[8:]).capitalize()}."


def schema_in(text: str) -> Json | None:
    """The last schema that follows the words "JSON schema" and a colon; None where none does."""
    for match in reversed(list(NAMED.finditer(text))):
        try:
            return json.JSONDecoder().raw_decode(text, match.end())[0]
        except ValueError:
            continue
    return None


def resolved(schema: Json, root: Json) -> Json:
    """The schema behind `$ref`; of alternatives the first one."""
    while True:
        if "$ref" in schema:
            target = root
            for name in schema["$ref"].removeprefix("#").strip("/").split("/"):
                target = target[name] if name else target
            schema = target
        elif choices := schema.get("anyOf") or schema.get("oneOf") or schema.get("allOf"):
            schema = choices[0]
        else:
            return schema


def fitting(schema: Json, seed: str, root: Json | None = None) -> Any:
    """A value that fits: the smallest one, but texts, enums, booleans and bounded integers vary.

    They are drawn from `seed`. Not for `pattern`, `format`, `multipleOf` and `uniqueItems`.
    """
    root = schema if root is None else root
    schema = resolved(schema, root)
    drawn = int.from_bytes(sha256(seed.encode()).digest()[:8])
    if "enum" in schema:
        return schema["enum"][drawn % len(schema["enum"])]
    if "const" in schema:
        return schema["const"]
    kind = schema.get("type", "object" if "properties" in schema else None)
    match kind[0] if isinstance(kind, list) else kind:
        case "object":
            known = schema.get("properties", {})
            names = schema.get("required", known)
            return {name: fitting(known.get(name, {}), f"{seed}/{name}", root) for name in names}
        case "array":
            least = schema.get("minItems", 0)
            items = schema.get("prefixItems", [])[:least]
            items = items + [schema.get("items", {})] * (least - len(items))
            return [fitting(item, f"{seed}/{place}", root) for place, item in enumerate(items)]
        case "string":
            text = sentences(seed)[: schema.get("maxLength")]
            return text.ljust(schema.get("minLength", 0), "x")
        case "integer":
            return _number(schema, whole=True, drawn=drawn)
        case "number":
            return _number(schema, whole=False, drawn=drawn)
        case "boolean":
            return drawn % 2 == 0
        case _:
            return None


def _number(schema: Json, *, whole: bool, drawn: int) -> float:
    low, high = schema.get("minimum", -math.inf), schema.get("maximum", math.inf)
    if (above := schema.get("exclusiveMinimum")) is not None:
        low = max(low, math.floor(above) + 1 if whole else math.nextafter(above, math.inf))
    if (below := schema.get("exclusiveMaximum")) is not None:
        high = min(high, math.ceil(below) - 1 if whole else math.nextafter(below, -math.inf))
    if whole and low > -math.inf:
        low = math.ceil(low)
        return low + (drawn % (math.floor(high) - low + 1) if high < math.inf else 0)
    least = low if low > -math.inf else min(0, high)
    return math.floor(least) if whole else least


def unfit(schema: Json, seed: str) -> Any:
    """A value that does not fit: a field left out or of another type, else something simpler."""
    from jsonschema import Draft202012Validator

    value, fits = fitting(schema, seed) if schema else None, Draft202012Validator(schema).is_valid
    spoilt = list[Any]()
    if isinstance(value, dict):
        for name in value:
            spoilt.append({k: v for k, v in value.items() if k != name})
            spoilt.append({**value, name: {"unfit": name}})
        turn = sha256(seed.encode()).digest()[0] % (len(spoilt) or 1)
        spoilt = spoilt[turn:] + spoilt[:turn]
    spoilt += [["unfit"], "unfit", None, 0]
    return next((one for one in spoilt if not fits(one)), ["unfit"])
