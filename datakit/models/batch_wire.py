"""Talking to a provider's files and batches, through the openai package.

Whatever goes wrong comes out as a `Fault`, and nothing is tried again here but by `patiently`.
"""

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from tempfile import TemporaryFile
from typing import IO, TYPE_CHECKING, NamedTuple, TypeVar

from datakit.models.batch_files import UrlPath
from datakit.models.faults import Fault, blotted, fault_of
from datakit.models.specs import OpenAISpec
from datakit.text import shorten

if TYPE_CHECKING:
    from openai.types import Batch

T = TypeVar("T")

FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 30.0
"""Pauses grow from the one to the other, between looks at a batch and between tries."""

PATIENCE_S = 3600.0
"""How long an endpoint that holds a batch may be out of reach."""

_CLOCKS_S = 86_400.0
"""By how much the provider's clock may differ from ours."""

_CALL = "datakit"


class State(NamedTuple):
    """How far a batch is; output and errors are ids of files, said what the provider complains."""

    id: str
    status: str
    output: str
    errors: str
    said: str
    codes: tuple[str, ...]
    done: int

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come of it."""
        return self.status in ("completed", "failed", "expired", "cancelled")


class Provider:
    """The files and batches of one endpoint. Every method raises Fault; use `with`."""

    def __init__(self, spec: OpenAISpec) -> None:
        import openai

        self.url = spec.urls[0]
        self.secret = spec.api_key() if spec.api_key_env else ""
        self._model = spec.model
        self._key_env = spec.api_key_env
        self._client = openai.OpenAI(
            base_url=self.url, api_key=spec.api_key(), max_retries=0, timeout=spec.timeout_s
        )

    def __enter__(self) -> "Provider":
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def upload(self, name: str, file: IO[bytes]) -> str:
        """Send a file of requests; its id."""
        file.seek(0)
        with self._faults("/files"):
            made = self._client.files.create(file=(f"{name}.jsonl", file), purpose="batch")
            return _text(made.id)

    def create(self, name: str, recipe: str, path: UrlPath, file_id: str) -> str:
        """Have the requests of a file answered within a day; the id of the batch."""
        with self._faults("/batches"):
            made = self._client.batches.create(
                input_file_id=file_id,
                endpoint=path,
                completion_window="24h",
                metadata={_CALL: name, "recipe": recipe[:512]},
            )
            return _text(made.id)

    def find(self, name: str, file_id: str, made: float) -> str:
        """The id of the batch that was created under `name`, or of that file; empty: none was."""
        with self._faults("/batches"):
            for batch in self._client.batches.list(limit=100):
                if batch.created_at < made - _CLOCKS_S:
                    break
                if (batch.metadata or {}).get(_CALL) == name or (
                    file_id and batch.input_file_id == file_id
                ):
                    return _text(batch.id)
        return ""

    def look(self, batch_id: str) -> State:
        """How far a batch is."""
        with self._faults("/batches"):
            return self._state(self._client.batches.retrieve(batch_id))

    @contextmanager
    def lines(self, file_id: str) -> Generator[Iterator[bytes]]:
        """The lines of a file, once all of it is here: nobody waits for a network over them."""
        with TemporaryFile() as file:
            self.patiently(lambda: self._download(file_id, file))
            file.seek(0)
            yield iter(file)

    def _download(self, file_id: str, file: IO[bytes]) -> None:
        file.seek(0)
        file.truncate()
        with (
            self._faults("/files"),
            self._client.files.with_streaming_response.content(file_id) as response,
        ):
            chunks = response.iter_bytes()
            while True:
                try:
                    chunk = next(chunks, None)
                except Exception as error:
                    # A body that is cut raises what the transport below the package raises, and
                    # which transport that is depends on the package's release.
                    raise self._cut(error) from None
                if chunk is None:
                    return
                file.write(chunk)

    def patiently(self, call: Callable[[], T], tries: int | None = None) -> T:
        """Call again, with growing pauses, while the failure is one that another try may heal.

        tries: at most so many; None: for as long as PATIENCE_S.
        """
        began, pause_s, count = time.monotonic(), FIRST_PAUSE_S, 0
        while True:
            count += 1
            try:
                return call()
            except Fault as fault:
                lasted = time.monotonic() - began > PATIENCE_S
                if not fault.policy.again or (lasted if tries is None else count >= tries):
                    raise
                wait_s = pause_s if fault.wait_s is None else fault.wait_s
            pause_s = min(pause_s * 2, LONGEST_PAUSE_S)
            time.sleep(min(wait_s, LONGEST_PAUSE_S))

    @contextmanager
    def _faults(self, what: str) -> Generator[None]:
        """Turn what the package raises into a Fault, without the key that a reply may repeat."""
        import openai

        try:
            yield
        except openai.APIStatusError as error:
            response = error.response
            raise fault_of(
                error.status_code,
                response.headers,
                response.content,
                self.url + what,
                self._model,
                self.secret,
                self._key_env,
            ) from None
        except openai.APITimeoutError:
            raise Fault("timeout", f"{self.url}: no answer in time") from None
        except openai.APIConnectionError as error:
            raise self._cut(error.__cause__ or error) from None
        except (openai.OpenAIError, ValueError, TypeError, AttributeError) as error:
            said = shorten(self.blotted(f"{type(error).__name__}: {error}"), 200)
            raise Fault("malformed_body", f"{self.url}{what}: {said}") from None

    def _cut(self, error: BaseException) -> Fault:
        said = shorten(self.blotted(str(error)), 200)
        return Fault("connection", f"{self.url}: connection failed: {said}")

    def blotted(self, said: str) -> str:
        """What an endpoint said, without the key that it may repeat."""
        return blotted(said.encode(), self.secret).decode()

    def _state(self, batch: "Batch") -> State:
        errors = (batch.errors and batch.errors.data) or []
        told: list[str] = []
        for one in errors[:3]:
            line = "" if one.line is None else f"line {one.line}: "
            told.append(f"{line}{one.message} ({one.code})")
        counts = batch.request_counts
        return State(
            id=_text(batch.id),
            status=_text(batch.status),
            output=batch.output_file_id or "",
            errors=batch.error_file_id or "",
            said=shorten(self.blotted("; ".join(told)), 300),
            codes=tuple(one.code or "" for one in errors),
            done=counts.completed + counts.failed if counts else 0,
        )


def _text(value: object) -> str:
    """A field that every such reply has."""
    if not isinstance(value, str) or not value:
        raise TypeError("the reply is none of a batch API")
    return value
