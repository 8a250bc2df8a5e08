"""What is asked of a model, what comes back, and the request that goes over the wire.

An `Ask` is what a step wants to know; `request_of` merges it with the model's own defaults into the
`Request` that is sent, which is also what the ledger keys an answer by.
"""

import hashlib
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol

from pydantic import JsonValue

from datakit.models.sampling import Sampling
from datakit.models.specs import ChatSpec
from datakit.records import Messages
from datakit.text import canonical_json
from datakit.values import Value

_NO_SAMPLING = Sampling()
_KEY_BYTES = 16


@dataclass(frozen=True, slots=True)
class Ask:
    """One request for one draw: chat `messages`, or a raw `prefix` that the model continues.

    `answer_schema` is the JSON schema that the reply must fit: enforced where the endpoint can,
    else asked for in text. `logprobs` asks for that many alternatives with each token. `draw`
    numbers the samples of an otherwise equal request, and is never sent.
    """

    messages: Messages = ()
    prefix: str | None = None
    sampling: Sampling = _NO_SAMPLING
    answer_schema: dict[str, Any] | None = None
    logprobs: int | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, JsonValue] = field(default_factory=dict)
    extra_body: dict[str, JsonValue] = field(default_factory=dict)
    draw: int = 0


@dataclass(frozen=True, slots=True)
class Request:
    """The final request of one draw, all defaults merged, without the model's name.

    body: what is sent. text: its canonical JSON. key: where the ledger keeps the answer. step: the
    alias of the step that asks. depth: the step's place in the line; of two requests that wait, the
    deeper goes first, so that money buys finished rows.
    """

    body: dict[str, Any]
    text: str
    key: str
    draw: int = 0
    answer_schema: dict[str, Any] | None = None
    step: str = ""
    depth: int = 0

    @property
    def is_chat(self) -> bool:
        """Whether it is for chat completions; else for text completions."""
        return "messages" in self.body


class Reply(Value):
    """One answer as the model gave it; `finish_reason` is `stop`, `length`, `content_filter`."""

    text: str
    reasoning: str = ""
    finish_reason: str = ""
    input_tokens: int = 0
    output_tokens: int = 0
    logprobs: JsonValue = None


class ChatModel(Protocol):
    """Anything that answers a Request.

    `answer` raises RowError where this request failed and EndpointError where every request will.
    """

    @property
    def identity(self) -> str: ...

    async def answer(self, request: Request) -> Reply: ...

    async def close(self) -> None: ...


def request_of(spec: ChatSpec, identity: str, ask: Ask, step: str = "", depth: int = 0) -> Request:
    """The request that `ask` becomes for the model of `spec`."""
    body = wire_request(spec, ask)
    text = canonical_json(body)
    key = answer_key(identity, text, ask.draw)
    return Request(body, text, key, ask.draw, ask.answer_schema, step, depth)


_quoted = lru_cache(canonical_json)
"""A run asks few models, and each of them often."""


def answer_key(identity: str, text: str, draw: int) -> str:
    """Hash of the model's identity, the draw number and the request's canonical JSON."""
    whole = f"[{_quoted(identity)},{draw},{text}]"
    return hashlib.blake2b(whole.encode(), digest_size=_KEY_BYTES).hexdigest()


SCHEMA_REQUEST = """Reply with one JSON object that fits this JSON schema, and with nothing else:
{schema}"""


def wire_request(spec: ChatSpec, ask: Ask) -> dict[str, Any]:
    """The body of a request, all defaults merged, without the model's name.

    It is for chat completions where the ask holds messages, for text completions where it holds a
    prefix.
    """
    body: dict[str, Any] = ask.sampling.over(spec.sampling)
    schema = ask.answer_schema
    if ask.prefix is None:
        body["messages"] = [{"role": turn.role, "content": turn.content} for turn in ask.messages]
    else:
        body["prompt"] = ask.prefix
    if schema is not None and spec.json_schema:
        wanted = {"name": "answer", "schema": schema, "strict": True}
        body["response_format"] = {"type": "json_schema", "json_schema": wanted}
    elif schema is not None and ask.prefix is None:
        said = SCHEMA_REQUEST.replace("{schema}", canonical_json(schema))
        body["messages"][-1]["content"] += f"\n\n{said}"
    if ask.logprobs is not None:
        body |= (
            {"logprobs": True, "top_logprobs": ask.logprobs}
            if ask.prefix is None
            else {"logprobs": ask.logprobs}
        )
    effort = ask.reasoning_effort or spec.reasoning_effort
    if effort:
        body["reasoning_effort"] = effort
    if spec.chat_template_kwargs or ask.chat_template_kwargs:
        body["chat_template_kwargs"] = spec.chat_template_kwargs | ask.chat_template_kwargs
    if spec.extra_body or ask.extra_body:
        body |= spec.extra_body | ask.extra_body
    if ask.draw and isinstance(body.get("seed"), int):
        # With one seed, every sample would be the first again.
        body["seed"] += ask.draw
    return body
