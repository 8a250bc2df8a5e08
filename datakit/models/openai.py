"""Any OpenAI-compatible endpoint, chat and text completions, over bare aiohttp.

The openai package's client costs six times the processor time of the transport below it, and slows
down as connections grow, so the hot path goes without it. Failures are told apart here. A wrong key
or an unknown model stops the run; a request that the endpoint calls bad, and one that a filter
blocks, fail their row at once; rate limits, overload, timeouts, cut connections and malformed
bodies are tried again with exponential backoff and jitter, honouring Retry-After, and then leave
the row unanswered.
"""

import asyncio
import json
import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from datakit.errors import EndpointError, Refused, Unanswered
from datakit.models.chat import Ask, OpenAISpec, Reply, wire_request
from datakit.models.ledger import Meter
from datakit.text import shorten

if TYPE_CHECKING:
    import aiohttp

_FIRST_WAIT_S = 0.5
_LONGEST_WAIT_S = 60.0


class OpenAIChat:
    """A ChatModel over HTTP. The connection pool opens with the first request."""

    def __init__(self, spec: OpenAISpec, meter: Meter) -> None:
        self.identity = spec.resolved_identity()
        self._spec = spec
        self._meter = meter
        self._session: aiohttp.ClientSession | None = None
        self._url = (spec.base_url or "").rstrip("/")
        self._proxy = _proxy_of(self._url)

    async def answer(self, ask: Ask) -> Reply:
        """One reply. Raises EndpointError, Refused, or Unanswered after all retries."""
        path = "/chat/completions" if ask.prefix is None else "/completions"
        body = {"model": self._spec.model} | wire_request(self._spec, ask)
        wait_s = _FIRST_WAIT_S
        for attempt in range(self._spec.retries + 1):
            try:
                return await self._once(path, body)
            except _Transient as failure:
                self._meter.failed += 1
                if attempt == self._spec.retries:
                    raise Unanswered(
                        failure.reason,
                        f"{failure} after {attempt + 1} tries at {self._spec.base_url}",
                    ) from failure
                pause_s = failure.retry_after_s
                if pause_s is None:
                    # Jitter is wall-clock behaviour, not data: it needs no seed.
                    pause_s = wait_s * random.uniform(0.5, 1.0)
                await asyncio.sleep(min(pause_s, _LONGEST_WAIT_S))
                wait_s = min(wait_s * 2, _LONGEST_WAIT_S)
        raise AssertionError("the last try returns or raises")

    async def _once(self, path: str, body: dict[str, Any]) -> Reply:
        import aiohttp

        session = self._open()
        try:
            async with session.post(
                f"{self._url}{path}",
                data=json.dumps(body).encode(),
                proxy=self._proxy,
                allow_redirects=False,
            ) as answer:
                status, headers, raw = answer.status, answer.headers, await answer.read()
        except TimeoutError as error:
            raise _Transient("timeout", f"no answer within {self._spec.timeout_s:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise _Transient("connection", f"connection failed: {error}") from error
        if status >= 300:
            raise _classified(status, headers, raw, self._spec)
        try:
            payload = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise _Transient("malformed_body", "the body is not JSON") from error
        return _read(payload)

    def _open(self) -> "aiohttp.ClientSession":
        if self._session is None:
            import aiohttp

            headers = {"Content-Type": "application/json"}
            if self._spec.api_key_env:
                headers["Authorization"] = f"Bearer {self._spec.api_key()}"
            self._session = aiohttp.ClientSession(
                headers=headers,
                timeout=aiohttp.ClientTimeout(total=self._spec.timeout_s),
                # How many requests are in flight is decided before they come here.
                connector=aiohttp.TCPConnector(limit=0),
            )
        return self._session

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()


def _proxy_of(url: str) -> str | None:
    """The proxy that the environment names for an address; looked up once, not for each call."""
    address = urlsplit(url)
    if proxy_bypass(address.netloc):
        return None
    return getproxies().get(address.scheme)


class _Transient(Exception):
    """A failure that another try may heal."""

    def __init__(self, reason: str, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after_s = retry_after_s


def _classified(status: int, headers: Mapping[str, str], raw: bytes, spec: OpenAISpec) -> Exception:
    """The one policy for each HTTP status."""
    said = _message(raw)
    if spec.api_key_env:
        # An endpoint may repeat the key that it refuses.
        said = said.replace(spec.api_key(), "***")
    said = shorten(said, 200)
    if status < 400:
        target = shorten(headers.get("Location", ""), 200)
        return EndpointError(f"{spec.base_url} redirects to {target!r}: give that as base_url")
    if status in (401, 403):
        where = f"in {spec.api_key_env!r}" if spec.api_key_env else "(api_key_env is not set)"
        return EndpointError(f"{spec.base_url} refuses the key {where} with {status}: {said}")
    if status == 402:
        return EndpointError(f"{spec.base_url} asks for payment: {said}")
    if status == 404:
        return EndpointError(f"{spec.base_url} does not know model {spec.model!r}: {said}")
    if status == 408 or status == 409 or status == 429 or status >= 500:
        reason = "rate_limited" if status == 429 else f"http_{status}"
        header = headers.get("Retry-After", "")
        wait_s = float(header) if header.replace(".", "", 1).isdigit() else None
        return _Transient(reason, f"{status}: {said}", wait_s)
    if "content" in said.lower() and ("filter" in said.lower() or "policy" in said.lower()):
        return Refused("content_filter", f"{status}: {said}")
    # Not tried again now, yet by the next run: the endpoint may be mended, and a refusal is free.
    return Unanswered("bad_request", f"{spec.base_url} answers {status}: {said}")


def _message(raw: bytes) -> str:
    """What an error body says: OpenAI's `error.message` where it has that shape."""
    try:
        return str(json.loads(raw)["error"]["message"])
    except (ValueError, RecursionError, KeyError, TypeError):
        return raw[:1000].decode("utf-8", "replace")


def _read(payload: Any) -> Reply:
    """The reply in a completions body; a body of another shape counts as malformed."""
    try:
        choice = payload["choices"][0]
        message = choice.get("message") or {"content": choice["text"]}
        usage = payload.get("usage") or {}
        return Reply(
            text=_text(message.get("content")),
            reasoning=_text(message.get("reasoning_content") or message.get("reasoning")),
            finish_reason=choice.get("finish_reason") or "",
            input_tokens=usage.get("prompt_tokens") or 0,
            output_tokens=usage.get("completion_tokens") or 0,
            # A token may be half a character, which would not go into the ledger.
            logprobs=json.loads(_text(json.dumps(choice.get("logprobs"), ensure_ascii=False))),
        )
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        body = shorten(str(payload), 120)
        raise _Transient("malformed_body", f"not a completion: {body}") from error


def _text(value: str | None) -> str:
    """A text that UTF-8 can hold: half a surrogate pair, as JSON escapes allow, is replaced."""
    return (value or "").encode("utf-8", "replace").decode("utf-8")
