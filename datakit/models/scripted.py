"""The fake model that ships: an answer is a pure function of the request.

The default script fits the request. Where a JSON schema is asked for, it gives the smallest valid
answer, and where the schema lets it choose between labels whose texts stand in the request as
`<answer_a> ... </answer_a>`, it prefers the text with the larger hash: an opinion that does not
depend on the order shown. Otherwise it gives a short text seeded by the request.

A text completion that echoes its prompt with log-probabilities is a request for a score: a word has
a log-probability that is seeded by the model, the text before it and the word itself, whatever the
script.
"""

import hashlib
import importlib
import json
import math
import random
import re
from collections.abc import Callable
from typing import Any

from pydantic import JsonValue

from datakit.errors import InputError
from datakit.models.chat import Reply, Request
from datakit.models.specs import ScriptedSpec
from datakit.text import digest

_TEXT = (
    "begin with the plan then check each step against the goal and write the result plainly "
    "if something is missing say so ask for it and go on with what is known"
)
_WORD = re.compile(r"\s*\S+|\s+")
_OPENING = re.compile(r"<answer_[a-z](_*)>")

Script = Callable[[dict[str, Any], int], str]


class Scripted:
    """A ChatModel over a script; never fails, never waits."""

    def __init__(self, spec: ScriptedSpec) -> None:
        self.identity = spec.resolved_identity()
        self._words = spec.words
        self._script: Script | None = None if spec.script == "default" else _find(spec.script)

    async def answer(self, request: Request) -> Reply:
        body = request.body
        if body.get("echo") and body.get("logprobs") is not None:
            return self._scored(request)
        if self._script is not None:
            text = self._script(body, request.draw)
        elif request.answer_schema is not None:
            schema = request.answer_schema
            text = json.dumps(_smallest(schema, _preferred_label(body), schema))
        else:
            text = _some_text(digest([self.identity, body, request.draw]), self._words)
        return Reply(
            text=text,
            finish_reason="stop",
            input_tokens=len(request.text.split()),
            output_tokens=len(text.split()),
        )

    def _scored(self, request: Request) -> Reply:
        """The prompt and the log-probability (nats) of each of its words but the first."""
        text = str(request.body["prompt"])
        words = [(word.start(), word.group()) for word in _WORD.finditer(text)]
        before = hashlib.blake2b(self.identity.encode())
        logprobs: list[JsonValue] = []
        for start, word in words:
            before.update(word.encode())
            drawn = int.from_bytes(before.digest()[:4]) / 2**32
            # The longer the word, the less likely.
            logprobs.append(-(drawn + 0.5) * len(word) if start else None)
        return Reply(
            text=text,
            finish_reason="length",
            input_tokens=len(words),
            logprobs={
                "tokens": [word for _, word in words],
                "token_logprobs": logprobs,
                "top_logprobs": None,
                "text_offset": [start for start, _ in words],
            },
        )

    async def close(self) -> None:
        """Nothing to close."""


def _find(path: str) -> Script:
    module_name, _, function = path.partition(":")
    try:
        return getattr(importlib.import_module(module_name), function)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise InputError(
            f"script {path!r} is not `default` and not an importable `module:function`: {error}"
        ) from error


def _some_text(seed: str, length: int | None) -> str:
    rng = random.Random(seed)
    least, most = (length // 2, length * 3 // 2) if length else (12, 40)
    words = rng.choices(_TEXT.split(), k=rng.randint(least, most))
    return " ".join(words).capitalize() + "."


def _preferred_label(request: dict[str, Any]) -> str | None:
    """The label in the request whose text has the larger hash; None where there are no labels."""
    texts = "\n".join(str(turn["content"]) for turn in request.get("messages", ()))
    # The asker's own tags are longer than any that stand inside the texts.
    tail = max(_OPENING.findall(texts), default="")
    found = re.findall(
        rf"<answer_([a-z]){tail}>\n?(.*?)\n?</answer_\1{tail}>", texts, flags=re.DOTALL
    )
    blocks = [(digest(text.strip()), label) for label, text in found]
    return max(blocks)[1].upper() if blocks else None


def _smallest(schema: dict[str, Any], label: str | None, root: dict[str, Any]) -> Any:
    """The smallest value valid under a JSON schema, choosing `label` where an enum holds it.

    Not for `pattern`, `format`, `multipleOf` and `uniqueItems`; of `allOf` the first counts.
    """
    if "$ref" in schema:
        target: Any = root
        for name in schema["$ref"].removeprefix("#/").split("/"):
            target = target[name]
        return _smallest(target, label, root)
    if "enum" in schema:
        return label if label in schema["enum"] else schema["enum"][0]
    if "const" in schema:
        return schema["const"]
    for choice in ("anyOf", "oneOf", "allOf"):
        if choice in schema:
            return _smallest(schema[choice][0], label, root)
    kind = schema.get("type")
    match kind[0] if isinstance(kind, list) else kind:
        case "object":
            properties = schema.get("properties", {})
            required = schema.get("required", properties)
            return {name: _smallest(properties.get(name, {}), label, root) for name in required}
        case "array":
            least = schema.get("minItems", 0)
            items = schema.get("prefixItems", [])[:least]
            items += [schema.get("items", {})] * (least - len(items))
            return [_smallest(item, label, root) for item in items]
        case "string":
            return "x" * schema.get("minLength", 0) or "scripted"[: schema.get("maxLength")]
        case "integer" | "number":
            return _least(schema)
        case "boolean":
            return False
        case _:
            return None


def _least(schema: dict[str, Any]) -> float:
    """A number within the bounds: near the lower one, without one not above 0."""
    below, most = schema.get("exclusiveMaximum", math.inf), schema.get("maximum", math.inf)
    if "exclusiveMinimum" in schema:
        low = schema["exclusiveMinimum"]
        fits = low + 1 < below and low + 1 <= most
        return low + 1 if fits else (low + min(below, most)) / 2
    return schema.get("minimum", min(0, most, below - 1))
