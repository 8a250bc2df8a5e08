"""Any OpenAI-compatible endpoint, chat and text completions, over bare aiohttp.

The openai package's client costs six times the processor time of the transport below it, and slows
down as connections grow, so the hot path goes without it. `faults.py` says what can go wrong with
an attempt and what is done about it, `limits.py` how many requests are under way and where, and an
answer is in the ledger before its place is free for another request.
"""

import asyncio
import hashlib
import json
import random
import re
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import orjson

from datakit.errors import EndpointError
from datakit.models.book import Book
from datakit.models.chat import Reply, Request
from datakit.models.faults import Fault, blotted, fault_of
from datakit.models.limits import Place, Pool, RateLimits
from datakit.models.specs import OpenAISpec, Price, VLLMSpec
from datakit.text import canonical_json, shorten

if TYPE_CHECKING:
    import aiohttp

_FIRST_WAIT_S = 0.5
_LONGEST_WAIT_S = 60.0
_REFUSED_WITHIN_S = 10.0
_MOST_TOKENS = 10**8
_LOGIN = re.compile(r"//[^/@\s]+@")
_BROKEN_OFF = ("abort", "error", "insufficient_system_resource")
"""Finish reasons of an answer that the server, not the model, ended."""


class OpenAIChat:
    """A ChatModel over HTTP. The connection pool opens with the first request.

    share: the part of the spec's window that this session may use, where several work together.
    """

    def __init__(
        self,
        spec: OpenAISpec | VLLMSpec,
        urls: tuple[str, ...],
        book: Book,
        price: Price | None = None,
        share: int = 1,
    ) -> None:
        self.identity = spec.resolved_identity()
        self._spec = spec
        self._book = book
        self._price = price
        self._key = spec.api_key() if isinstance(spec, OpenAISpec) and spec.api_key_env else ""
        window = spec.max_in_flight and max(1, -(-spec.max_in_flight // share))
        self._pool = Pool(urls, window)
        name = hashlib.blake2b("\0".join((*urls, spec.model, self._key)).encode(), digest_size=12)
        self._limits = RateLimits(spec.limits, name.hexdigest(), book.ledger)
        self._usage = Usage()
        self._head = f'{{"model":{canonical_json(spec.model)},'.encode()
        self._proxies = {url: _proxy_of(url) for url in urls}
        self._session: aiohttp.ClientSession | None = None
        self._first = _First()

    async def answer(self, request: Request) -> Reply:
        """One reply, in the ledger. Raises EndpointError, Refused, Pending or Unanswered."""
        if not self._first.is_over:
            async with self._first:
                return await self._tried(request)
        return await self._tried(request)

    async def _tried(self, request: Request) -> Reply:
        pause_s = _FIRST_WAIT_S
        tries = 0
        while True:
            tries += 1
            try:
                return await self._attempt(request)
            except Fault as fault:
                if not fault.policy.again or tries > self._spec.retries:
                    error = fault.error(tries)
                    if isinstance(error, EndpointError):
                        self._first.refusal = error
                    raise error from fault
                wait_s = fault.wait_s
                if wait_s is None:
                    # Jitter is wall-clock behaviour, not data: it needs no seed.
                    wait_s = pause_s * random.uniform(0.5, 1.0)
                    pause_s = min(pause_s * 2, _LONGEST_WAIT_S)
                self._first.open()
            await asyncio.sleep(min(wait_s, _LONGEST_WAIT_S))

    async def _attempt(self, request: Request) -> Reply:
        """One attempt: a place, a permit, the call, the ledger. Raises Fault."""
        book, price = self._book, self._price
        tokens = self._usage.expected(request)
        place = await self._pool.take(request.depth)
        held: tuple[float, float] | None = None
        cost = (0.0, 0.0)
        try:
            if not self._limits.none:
                await self._limits.permit(*tokens)
            if book.allowance is not None:
                most = self._usage.most(request)
                want = (price.usd(*most) if price else 0.0, float(sum(most)))
                await book.allowance.hold(*want)
                held = want
            sent_at = time.monotonic()
            try:
                reply = await self._post(place, request)
            except Fault as fault:
                billed = tokens if fault.policy.billed else (0, 0)
                usd = price.usd(*billed) if price else 0.0
                cost = (usd, float(sum(billed)))
                book.failed(self.identity, request, fault.kind, billed, usd)
                self._bear(place, fault, sent_at)
                raise
            self._pool.answered(place, time.monotonic() - sent_at)
            self._first.open()
            used = self._usage.of(request, reply)
            if not self._limits.none:
                self._limits.settle(used[0] - tokens[0], used[1] - tokens[1])
            usd = price.usd(*used) if price else 0.0
            cost = (usd, float(sum(used)))
            return await book.write(self.identity, request, reply, used, usd)
        finally:
            if book.allowance is not None and held is not None:
                book.allowance.settle(held, cost)
            self._pool.give(place)

    def _bear(self, place: Place, fault: Fault, sent_at: float) -> None:
        """What a fault means for the requests to come."""
        if fault.policy.slows:
            place.refused(sent_at, fault.wait_s)
        elif fault.policy.suspects:
            place.failed(sent_at)
            if self._pool.elsewhere(place):
                fault.wait_s = 0.0

    async def _post(self, place: Place, request: Request) -> Reply:
        import aiohttp

        session = self._session or self._open()
        url = place.url
        path = "/chat/completions" if request.is_chat else "/completions"
        try:
            async with session.post(
                url + path,
                data=self._head + request.text[1:].encode(),
                proxy=self._proxies[url],
                allow_redirects=False,
            ) as answer:
                status, headers, raw = answer.status, answer.headers, await answer.read()
        except TimeoutError as error:
            said = f"{url}: no answer within {self._spec.timeout_s:g} s"
            raise Fault("timeout", said) from error
        except aiohttp.ClientPayloadError as error:
            raise Fault("cut", f"{url}: the body was cut: {_safe(error)}") from error
        except (aiohttp.ClientError, OSError) as error:
            said = _safe(error)
            raise Fault("connection", f"{url}: connection failed: {said}") from error
        if "x-ratelimit-limit-requests" in headers or "x-ratelimit-limit-tokens" in headers:
            self._limits.learn(headers)
        if status >= 300:
            spec = self._spec
            named = spec.api_key_env if isinstance(spec, OpenAISpec) else None
            raise fault_of(status, headers, raw, url, spec.model, self._key, named)
        if self._key:
            raw = blotted(raw, self._key)
        try:
            return reply_of(_loads(raw))
        except (ValueError, RecursionError) as error:
            raise Fault("malformed_body", f"{url}: {error}") from error

    def _open(self) -> "aiohttp.ClientSession":
        import aiohttp

        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        self._session = aiohttp.ClientSession(
            headers=headers,
            timeout=aiohttp.ClientTimeout(total=self._spec.timeout_s),
            # How many requests are in flight is decided before they come here.
            connector=aiohttp.TCPConnector(limit=0),
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        return self._session

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()


class _First:
    """The first request goes alone, so that a wrong key costs one call and not a window.

    The others wait until it is answered, fails in a way that another try may heal, or takes so
    long that it cannot have been refused. A refusal is theirs too.
    """

    def __init__(self) -> None:
        self.refusal: EndpointError | None = None
        self.is_over = False
        self._is_taken = False
        self._over = asyncio.Event()

    async def __aenter__(self) -> None:
        if not self._is_taken:
            self._is_taken = True
            asyncio.get_running_loop().call_later(_REFUSED_WITHIN_S, self.open)
            return
        await self._over.wait()
        if self.refusal is not None:
            raise self.refusal

    async def __aexit__(self, *_: object) -> None:
        self.open()

    def open(self) -> None:
        """Let the others go."""
        if not self._over.is_set():
            self.is_over = self.refusal is None
            self._over.set()


class Usage:
    """What requests to one model use, learnt from its replies; for limits and budgets."""

    def __init__(self) -> None:
        self._tokens_per_character = 0.4
        self._mean_output = 0.0
        self._most_output = 1024
        self._replies = 0

    def expected(self, request: Request) -> tuple[int, int]:
        """Input and output tokens of a request, about."""
        output = self._mean_output if self._replies else 256
        return int(len(request.text) * self._tokens_per_character), int(
            min(output, self._ceiling(request))
        )

    def most(self, request: Request) -> tuple[int, int]:
        """Input and output tokens that a request can cost at the most."""
        # A tokenizer makes no more than a token of each character of common text.
        ceiling = 1.25 * self._tokens_per_character if self._replies >= 16 else 1.0
        return int(len(request.text) * ceiling) + 1, self._ceiling(request)

    def of(self, request: Request, reply: Reply) -> tuple[int, int]:
        """Input and output tokens of an answered request; learns from them.

        They are estimated where the endpoint states none, or a cap would never hold there.
        """
        if not (reply.input_tokens or reply.output_tokens):
            said = len(reply.text) + len(reply.reasoning)
            return self.expected(request)[0], int(said * self._tokens_per_character) + 1
        self._replies += 1
        weight = max(1 / self._replies, 0.02)
        found = reply.input_tokens / len(request.text)
        self._tokens_per_character += weight * (found - self._tokens_per_character)
        self._mean_output += weight * (reply.output_tokens - self._mean_output)
        self._most_output = max(self._most_output, reply.output_tokens)
        return reply.input_tokens, reply.output_tokens

    def _ceiling(self, request: Request) -> int:
        """The most tokens that an answer can have: what is allowed, else the most so far."""
        limit = self._limit(request)
        return self._most_output if limit is None else limit

    def _limit(self, request: Request) -> int | None:
        """The token limit that the request states."""
        body = request.body
        limit = body.get("max_completion_tokens", body.get("max_tokens"))
        return limit if isinstance(limit, int) else None


def reply_of(payload: Any) -> Reply:
    """The reply in a completions body. Raises ValueError where it has another shape."""
    try:
        choice = payload["choices"][0]
        message = choice.get("message") or {"content": choice["text"]}
        usage = payload.get("usage")
        finish = _text(choice.get("finish_reason"))
        if finish in _BROKEN_OFF:
            raise ValueError(f"broken off ({finish})")
        content = message.get("content")
        if isinstance(content, list):
            content = "".join(part["text"] for part in content if part.get("type") == "text")
        if not content and message.get("refusal"):
            content, finish = message["refusal"], "content_filter"
        logprobs = choice.get("logprobs")
        if choice.get("prompt_logprobs") is not None:
            logprobs = choice["prompt_logprobs"]
        if logprobs is not None:
            # A token may be half a character, which would not go into the ledger.
            logprobs = json.loads(_text(json.dumps(logprobs, ensure_ascii=False)))
        return Reply(
            text=_text(content),
            reasoning=_text(message.get("reasoning_content") or message.get("reasoning")),
            finish_reason=finish,
            input_tokens=_tokens(usage, "prompt_tokens"),
            output_tokens=_tokens(usage, "completion_tokens"),
            logprobs=logprobs,
        )
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"not a completion: {shorten(str(payload), 120)}") from error


def _loads(raw: bytes) -> Any:
    """JSON; slowly where it holds what only Python's reader takes (half a surrogate pair, NaN)."""
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError:
        return json.loads(raw)


def _tokens(usage: Any, name: str) -> int:
    """A count that an endpoint states; 0, which is then estimated, where it cannot be one."""
    said = usage.get(name) if isinstance(usage, dict) else None
    return int(said) if isinstance(said, int | float) and 0 <= said < _MOST_TOKENS else 0


def _text(value: str | None) -> str:
    """A text that UTF-8 can hold: half a surrogate pair, as JSON escapes allow, is replaced."""
    return (value or "").encode("utf-8", "replace").decode("utf-8")


def _safe(error: Exception) -> str:
    """What an error says, without the login that an address of a proxy may hold."""
    return shorten(_LOGIN.sub("//", str(error)), 200)


def _proxy_of(url: str) -> str | None:
    """The proxy that the environment names for an address; looked up once, not for each call."""
    address = urlsplit(url)
    if proxy_bypass(address.netloc):
        return None
    return getproxies().get(address.scheme)
