"""An OpenAI-compatible endpoint for tests and benchmarks, with faults on demand.

Why: code that pays for answers must meet a server that is slow, refuses, lies and hangs up, and do
so alike on every run. So an answer is a pure function of the request body, and a fault is drawn
from (seed, body, attempt number of that body), never from time or order of arrival.

A program (`python tests/endpoint.py --port 0 --p500 .1` prints `ready http://127.0.0.1:PORT/v1`)
or a thread (`with Endpoint(p500=0.1) as e:` gives `e.url`, `e.stats()`, `e.set(p500=0)`). Routes:
POST /v1/chat/completions and /v1/completions, GET /v1/models; GET /stats (?bodies), POST /reset
and /set (a JSON object of knobs), which lie beside /v1, not below it.
"""

import argparse
import asyncio
import json
import math
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from hashlib import sha256
from random import Random
from typing import Annotated, Any, Self
from weakref import WeakSet

from aiohttp import web
from pydantic import BaseModel, Field, NonNegativeFloat, NonNegativeInt, model_validator

Json = dict[str, Any]
Share = Annotated[float, Field(ge=0, le=1)]
Reply = Callable[[Json], str | None]

HANG_S = 60.0
SHARES = ("p500", "p429", "pbad", "phang", "pcut")
STATUS = {"bad_request": 400, "key": 401, "models": 404, "too_large": 413, "rpm": 429, "p429": 429}
CODES = {401: "invalid_api_key", 404: "model_not_found", 429: "rate_limit_exceeded"}
WORDS = "amber cedar delta field finds grove harbor holds island keeps lantern meadow north"
# An opening tag that comes again before it is closed was only mentioned: it opens no block.
BLOCK = re.compile(r"<(answer_([ab])_*)>((?:(?!<\1>).)*?)</\1>", re.DOTALL)


class Knobs(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """What is set at the start and may change while running; a wrong value raises ValueError."""

    latency: str = "fixed:0"  # before every reply: fixed:S or lognormal:MEAN:SIGMA, MEAN in seconds
    p500: Share = 0.0  # shares of attempts: a 500
    p429: Share = 0.0  # a 429, with a Retry-After header if `retry_after` (seconds) is set
    pbad: Share = 0.0  # a 200 with the first half of the JSON, whose length is stated correctly
    phang: Share = 0.0  # no answer until the client leaves, at most HANG_S
    pcut: Share = 0.0  # the connection is closed in the middle of the body
    retry_after: NonNegativeFloat | None = None
    rpm: NonNegativeInt = 0  # requests a minute (a bucket that refills steadily); 0 = no limit
    fail_first: NonNegativeInt = 0  # the first k attempts of every body get a 500
    fail_matching: str = ""  # a request that contains this text always gets a 500
    key: str = ""  # the API key that is asked for; empty = any
    models: tuple[str, ...] = ()  # the models that are known; empty = any
    seed: int = 0
    per_body: bool = True  # False: all bodies count as one (fast), faults are drawn by arrival

    @model_validator(mode="after")
    def _check(self) -> Self:
        if sum(getattr(self, name) for name in SHARES) > 1 + 1e-9:
            raise ValueError(f"the shares {', '.join(SHARES)} sum to more than 1")
        self.delay_s(Random(0))
        return self

    def delay_s(self, rng: Random) -> float:
        """Draw the time before one reply."""
        kind, *numbers = self.latency.split(":")
        match kind, [float(number) for number in numbers]:
            case "fixed", [seconds] if 0 <= seconds < math.inf:
                return seconds
            case "lognormal", [mean, sigma] if 0 < mean < math.inf and 0 <= sigma < math.inf:
                # The mean of a lognormal is exp(mu + sigma^2 / 2).
                return rng.lognormvariate(math.log(mean) - sigma**2 / 2, sigma)
            case _:
                raise ValueError(f"latency is fixed:S or lognormal:MEAN:SIGMA, not {self.latency}")

    def outcome(self, body: Json, raw: bytes, attempt: int, rng: Random) -> str:
        """How an attempt shall end: `ok`, or the name of the knob that spoils it."""
        shares = [getattr(self, name) for name in SHARES]
        drawn = rng.choices([*SHARES, "ok"], [*shares, max(0.0, 1 - sum(shares))])[0]
        # As it was sent, or as it reads: JSON writes some characters in two ways.
        if self.fail_matching and self.fail_matching in "\n".join([raw.decode(), *texts_of(body)]):
            return "fail_matching"
        if self.models and body.get("model") not in self.models:
            return "models"
        return "fail_first" if attempt <= self.fail_first else drawn


class Refusal(Exception):
    """An error reply in OpenAI's shape, counted under `kind`: the knob that caused it, if any."""

    def __init__(self, kind: str, message: str = "", wait_s: float | None = None) -> None:
        super().__init__(kind)
        status = STATUS.get(kind, 500)
        type_ = {429: "rate_limit_error", 500: "server_error"}.get(status, "invalid_request_error")
        code = CODES.get(status, kind)
        error = {"message": f"{kind} {message}".strip(), "type": type_, "code": code}
        headers = {} if wait_s is None else {"Retry-After": f"{wait_s:g}"}
        self.kind = kind
        self.response = web.json_response({"error": error}, status=status, headers=headers)


class Tally:
    """What was asked and how it ended, readable from any thread.

    Always `requests == ok + sum(errors) + in_flight`. A reply is counted before its first byte is
    sent, so that a client that has its answer never reads stale numbers.
    """

    def __init__(self) -> None:
        self._lock, self._in_flight = threading.Lock(), 0
        self.reset()

    def reset(self) -> None:
        """Forget all but what is in flight, which counts as if it had just been asked."""
        with self._lock:
            self._requests = self._max_in_flight = self._in_flight
            self._again, self._times = 0, list[float]()
            self._ok, self._errors, self._attempts = Counter[str](), Counter[str](), Counter[str]()
            self._connections, self._transports = 0, WeakSet[Any]()

    def arrive(self, transport: asyncio.BaseTransport | None) -> None:
        """A request has come; its body is not read yet."""
        with self._lock:
            self._times = [*self._times[:1], time.time()]
            self._requests += 1
            self._in_flight += 1
            self._max_in_flight = max(self._max_in_flight, self._in_flight)
            if transport is not None and transport not in self._transports:
                self._transports.add(transport)
                self._connections += 1

    def admit(self, key: str) -> int:
        """Number this attempt at a body from 1; an empty key stands for all bodies."""
        with self._lock:
            self._attempts[key] += 1
            self._again += bool(key) and key in self._ok
            return self._attempts[key]

    def settle(self, key: str, kind: str) -> None:
        """The request ends: `ok`, or the kind of its error."""
        with self._lock:
            self._in_flight -= 1
            if kind == "ok":
                self._ok[key] += 1
            else:
                self._errors[kind] += 1

    def stats(self, *, bodies: bool = False) -> Json:
        """The totals; `bodies` adds, by `body_key`, attempts let in (past key and rpm) and ok."""
        with self._lock:
            each = {k: {"attempts": n, "ok": self._ok[k]} for k, n in self._attempts.items() if k}
            return {
                "requests": self._requests,
                "ok": self._ok.total(),
                "errors": dict(self._errors),
                "in_flight": self._in_flight,
                "max_in_flight": self._max_in_flight,
                "connections": self._connections,
                "first_request_at": self._times[0] if self._times else None,
                "last_request_at": self._times[-1] if self._times else None,
                "distinct": len(each),
                "answered_twice": sum(max(body["ok"] - 1, 0) for body in each.values()),
                "sent_again_after_ok": self._again,
            } | ({"bodies": each} if bodies else {})


class Bucket:
    """Permits that refill steadily, `rpm` a minute; a full bucket holds a minute's worth."""

    def __init__(self) -> None:
        self._rpm, self._permits, self._at = 0, 0.0, 0.0

    def take(self, rpm: int) -> tuple[float, dict[str, str]]:
        """The seconds to wait, 0 where a permit was taken, and the headers that say so."""
        now = time.monotonic()
        refilled = self._permits + (now - self._at) * rpm / 60 if rpm == self._rpm else rpm
        self._rpm, self._permits, self._at = rpm, min(rpm, refilled), now
        wait_s = max(0.0, (1 - self._permits) * 60 / rpm)
        self._permits -= not wait_s
        return wait_s, {
            "x-ratelimit-limit-requests": str(rpm),
            "x-ratelimit-remaining-requests": str(int(self._permits)),
            "x-ratelimit-reset-requests": f"{(rpm - self._permits) * 60 / rpm:.3f}s",
        }


def body_key(body: Json) -> str:
    """The name of a request body in the accounting: equal JSON is one body, whatever its order."""
    return sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def texts_of(body: Json) -> list[str]:
    """The text of each prompt, one for a chat; ValueError where we cannot answer the request."""
    source, plain = body.get("messages") or body.get("prompt"), isinstance(body.get("model"), str)
    unserved = body.get("stream") or body.get("echo") or body.get("max_tokens", 0) < 0
    if not source or not plain or unserved or body.get("n", 1) not in range(1, 129):
        raise ValueError("give model, messages or prompt, n up to 128; no stream, no echo")
    if "messages" in body:
        contents = [message.get("content") or "" for message in source]
        parts = [[{"text": c}] if isinstance(c, str) else c for c in contents]
        return ["\n".join(part.get("text", "") for message in parts for part in message)]
    # A prompt is a text, a list of texts, or token ids in one list or in several.
    single = isinstance(source, str) or isinstance(source[0], int)
    return [str(prompt) for prompt in ([source] if single else source)]


def sentences(seed: str) -> str:
    """Two sentences, a function of `seed` alone."""
    digest = sha256(seed.encode()).digest()
    known = WORDS.split()
    words = [known[byte % len(known)] for byte in digest[: 16 + digest[-1] % 15]]
    return f"{' '.join(words[:8]).capitalize()}. {' '.join(words[8:]).capitalize()}."


def verdict(text: str, asks: str) -> str | None:
    """The JSON verdict of a judge who prefers the same text in both orders; None: none is asked."""
    blocks = {label.upper(): block.strip() for _, label, block in BLOCK.findall(text)}
    if len(blocks) < 2 or "json" not in asks.lower() or "verdict" not in asks.lower():
        return None
    best = max("AB", key=lambda k: sha256(blocks[k].encode(errors="surrogatepass")).digest())
    return json.dumps({"reason": f"The text of {best} has the larger hash.", "verdict": best})


def clip(text: str, body: Json) -> tuple[str, str]:
    """The text up to its first stop string and its last allowed word, and the finish reason."""
    stops: str | list[str] = body.get("stop") or []
    for stop in [stops] if isinstance(stops, str) else stops:
        text = text.split(stop, 1)[0]
    limit: int | None = body.get("max_completion_tokens", body.get("max_tokens"))
    ends = [word.end() for word in re.finditer(r"\S+", text)]
    if limit is None or len(ends) <= limit:
        return text, "stop"
    return text[: [0, *ends][limit]], "length"


def answer(body: Json, *, chat: bool, own: str | None = None) -> Json:
    """The completion: `own` text if given, else a verdict where one is asked, else sentences.

    Nothing in it may differ between two answers to one body, hence the constant time and the id.
    """
    texts, said, choices = texts_of(body), list[str](), list[Json]()
    if chat is not ("messages" in body):
        raise ValueError("chat completions take messages, completions a prompt")
    for text in texts:
        judged = verdict(text, text + json.dumps(body.get("response_format")))
        fixed = judged if own is None else own
        source = json.dumps([body["model"], body.get("messages"), text, body.get("seed")])
        for draw in range(body.get("n", 1)):
            one, finish = clip(sentences(f"{draw} {source}") if fixed is None else fixed, body)
            said.append(one)
            place = {"message": {"role": "assistant", "content": one}} if chat else {"text": one}
            choices.append({"index": len(choices), **place, "finish_reason": finish})
    asked, given = (sum(len(text.split()) for text in side) for side in (texts, said))
    usage = {"prompt_tokens": asked, "completion_tokens": given, "total_tokens": asked + given}
    kind = "chat.completion" if chat else "text_completion"
    head = {"id": f"cmpl-{body_key(body)[:24]}", "object": kind, "created": 1_700_000_000}
    return {**head, "model": body["model"], "choices": choices, "usage": usage}


class Endpoint:
    """The server; keyword arguments other than `reply` and `port` are `Knobs`.

    `reply(body)` may give the text of an answer, or None to leave it to the default. It runs in the
    server's thread and must be a function of the body alone.
    """

    def __init__(self, *, reply: Reply | None = None, port: int = 0, **knobs: Any) -> None:
        self.knobs, self.url = Knobs(**knobs), ""
        self._reply, self._port = reply, port
        self._tally, self._bucket = Tally(), Bucket()
        self.stats = self._tally.stats

    def set(self, **changes: Any) -> None:
        """Change knobs while it runs; a ValueError leaves them as they were."""
        self.knobs = Knobs.model_validate({**self.knobs.model_dump(), **changes})

    def reset(self) -> None:
        """Forget what was counted, attempts and the minute's requests included; knobs stay."""
        self._tally.reset()
        self._bucket = Bucket()

    async def start(self) -> None:
        """Take requests at `url`, in the running loop; OSError where the port is taken."""
        app = web.Application(client_max_size=64 * 1024**2)
        app.router.add_post("/v1/{kind:chat/completions|completions}", self._complete)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/{action:stats}", self._control)
        app.router.add_post("/{action:reset|set}", self._control)
        # Cancellation tells that a client has left; by default a hung reply delays the end by 60 s.
        options: Json = {"handler_cancellation": True, "shutdown_timeout": 0.1}
        self._runner = web.AppRunner(app, access_log=None, **options)
        await self._runner.setup()
        # The default backlog of 128 drops a burst of connections, which then take a second longer.
        await web.TCPSite(self._runner, "127.0.0.1", self._port, backlog=4096).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}/v1"

    async def close(self) -> None:
        """Stop serving; what is in flight is broken off."""
        await self._runner.cleanup()

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        try:
            asyncio.run_coroutine_threadsafe(self.start(), self._loop).result()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self.close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _complete(self, request: web.Request) -> web.Response:
        """Count a request in, answer or spoil it, and count it out before the reply is sent."""
        knobs, key, kind, headers = self.knobs, "", "client_left", dict[str, str]()
        self._tally.arrive(request.transport)
        try:
            raw = await request.read()
            if not self._allows(request):
                raise Refusal("key", "is not the one asked for")
            if knobs.rpm:
                wait_s, headers = self._bucket.take(knobs.rpm)
                if wait_s:
                    headers["retry-after-ms"] = str(math.ceil(wait_s * 1000))
                    raise Refusal("rpm", wait_s=math.ceil(wait_s))
            body = {k: v for k, v in json.loads(raw).items() if v is not None}
            key = body_key(body) if knobs.per_body else ""
            attempt = self._tally.admit(key)
            rng = Random(f"{knobs.seed} {key} {attempt}")
            outcome, delay_s = knobs.outcome(body, raw, attempt, rng), knobs.delay_s(rng)
            await asyncio.sleep(delay_s)
            if outcome == "phang":
                kind = outcome
                await asyncio.sleep(HANG_S)
            response = self._reply_to(body, request.path.endswith("/chat/completions"), outcome)
            kind = outcome
        except Refusal as refusal:
            kind, response = refusal.kind, refusal.response
        except web.HTTPRequestEntityTooLarge:
            kind, response = "too_large", Refusal("too_large").response
        except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
            kind, response = "bad_request", Refusal("bad_request", str(error)).response
        finally:
            self._tally.settle(key, kind)
        response.headers.update(headers)
        return response

    def _allows(self, request: web.Request) -> bool:
        key = self.knobs.key
        return not key or request.headers.get("Authorization") == f"Bearer {key}"

    def _reply_to(self, body: Json, chat: bool, outcome: str) -> web.Response:
        """The reply that `outcome` calls for, or a Refusal."""
        if outcome not in ("ok", "pbad", "pcut", "phang"):
            raise Refusal(outcome, wait_s=self.knobs.retry_after if outcome == "p429" else None)
        try:
            own = self._reply(body) if self._reply else None
        except Exception as error:
            raise Refusal("reply", f"raised {error!r}") from error
        data = json.dumps(answer(body, chat=chat, own=own)).encode()
        sent = {"ok": len(data), "phang": 0}.get(outcome, len(data) // 2)
        response = web.Response(body=data[:sent], content_type="application/json")
        if outcome in ("pcut", "phang"):
            # Less is sent than was promised, and then the connection is closed.
            response.headers["Content-Length"] = str(len(data))
            response.force_close()
        return response

    async def _models(self, request: web.Request) -> web.Response:
        if not self._allows(request):
            return Refusal("key", "is not the one asked for").response
        names = self.knobs.models or ("any",)
        data = [{"id": name, "object": "model", "created": 0, "owned_by": "test"} for name in names]
        return web.json_response({"object": "list", "data": data})

    async def _control(self, request: web.Request) -> web.Response:
        """GET /stats, POST /reset and POST /set: each answers with the numbers and the knobs."""
        try:
            if request.path == "/reset":
                self.reset()
            if request.path == "/set":
                self.set(**json.loads(await request.read()))
        except (ValueError, TypeError) as error:
            return Refusal("bad_request", str(error)).response
        stats = self.stats(bodies="bodies" in request.query)
        return web.json_response({**stats, "knobs": self.knobs.model_dump()})


async def serve(endpoint: Endpoint) -> None:
    """Serve as a program: say where, then run until SIGTERM or SIGINT."""
    asked_to_stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, asked_to_stop.set)
    await endpoint.start()
    print(f"ready {endpoint.url}", flush=True)
    await asked_to_stop.wait()
    await endpoint.close()


def main() -> None:
    """Read the knobs from the command line (`--fail-first 2 --models a b --no-per-body`)."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--models", nargs="*", default=[])
    parser.add_argument("--no-per-body", dest="per_body", action="store_false")
    for name, default in Knobs().model_dump(exclude={"models", "per_body"}).items():
        parser.add_argument(f"--{name.replace('_', '-')}", default=default, help="%(default)s")
    asyncio.run(serve(Endpoint(**vars(parser.parse_args()))))


if __name__ == "__main__":
    main()
