"""What the test endpoint can be told to do, how it refuses, and what it counts."""

import math
import threading
import time
from collections import Counter
from functools import cached_property
from random import Random
from typing import Annotated, Any, Self
from weakref import WeakSet

from aiohttp import web
from pydantic import BaseModel, Field, NonNegativeFloat, NonNegativeInt, model_validator

Json = dict[str, Any]
Share = Annotated[float, Field(ge=0, le=1)]

# New ones go to the end, so that a seed goes on drawing what it drew.
SHARES = ("p500", "p429", "pbad", "phang", "pcut")
SHARES += ("pempty", "plength", "pfilter", "prefuse", "pinvalid", "p503")
STATUS = {"bad_request": 400, "key": 401, "models": 404, "missing": 404, "too_large": 413}
STATUS |= {"rpm": 429, "tpm": 429, "p429": 429, "prefuse": 400, "p503": 503}
CODES = {401: "invalid_api_key", 404: "model_not_found", 429: "rate_limit_exceeded"}
OWN_CODES = {"prefuse": "content_filter", "p503": "overloaded", "missing": "not_found"}
SAYS = {"prefuse": "The prompt was blocked by the content filter.", "p503": "Overloaded."}


class Knobs(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """What is set at the start and may change while running; a wrong value raises ValueError."""

    latency: str = "fixed:0"  # before every reply: fixed:S or lognormal:MEAN:SIGMA, MEAN in seconds
    p500: Share = 0.0  # shares of attempts: a 500
    p429: Share = 0.0  # a 429, with a Retry-After header if `retry_after` (seconds) is set
    p503: Share = 0.0  # a 503 `overloaded`, with the same header
    pbad: Share = 0.0  # a 200 with the first half of the JSON, whose length is stated correctly
    phang: Share = 0.0  # no answer until the client leaves, at most a minute
    pcut: Share = 0.0  # the connection is closed in the middle of the body
    pempty: Share = 0.0  # a 200 with empty text, finish_reason stop
    plength: Share = 0.0  # a 200 with the first half of the text, finish_reason length
    pfilter: Share = 0.0  # a 200 with empty text, finish_reason content_filter
    prefuse: Share = 0.0  # a 400 `content_filter`
    pinvalid: Share = 0.0  # JSON that misses the schema, where one is asked for the first time
    retry_after: NonNegativeFloat | None = None
    rpm: NonNegativeInt = 0  # requests a minute (a bucket that refills steadily); 0 = no limit
    tpm: NonNegativeInt = 0  # tokens a minute, of prompt and answer; 0 = no limit
    quiet_limits: bool = False  # True: rpm and tpm hold, but no x-ratelimit header tells of them
    fail_first: NonNegativeInt = 0  # the first k attempts of every body get a 500
    fail_matching: str = ""  # a request that contains this text always gets a 500
    key: str = ""  # the API key that is asked for; empty = any
    models: tuple[str, ...] = ()  # the models that are known; empty = any
    batch_s: NonNegativeFloat = 0.0  # what a batch takes; it is validated in the first tenth
    batch_limit: NonNegativeInt = 0  # requests that a batch may hold; 0 = no limit
    pexpire: Share = 0.0  # share of the requests of a batch that it leaves unanswered and expires
    seed: int = 0
    per_body: bool = True  # False: all bodies count as one (fast), faults are drawn by arrival

    @model_validator(mode="after")
    def _check(self) -> Self:
        if sum(self.shares) > 1 + 1e-9:
            raise ValueError(f"the shares {', '.join(SHARES)} sum to more than 1")
        self.delay_s(Random(0))
        return self

    @cached_property
    def shares(self) -> tuple[float, ...]:
        """The shares in the order of SHARES."""
        return tuple(getattr(self, name) for name in SHARES)

    @cached_property
    def drawn(self) -> bool:
        """Whether an outcome or a delay is left to chance."""
        return any(self.shares) or not self.latency.startswith("fixed")

    @cached_property
    def plain(self) -> bool:
        """Whether every good request is answered at once, and nothing is kept of it."""
        spoils = self.fail_first or self.fail_matching or self.models or self.key
        limits = self.rpm or self.tpm or self.per_body
        return not (self.drawn or spoils or limits or self.delay_s(Random(0)))

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

    def fate(self, key: str, attempt: int) -> tuple[str, float]:
        """What chance has for an attempt at a body: `ok` or a name of SHARES, and the delay."""
        if not self.drawn:
            return "ok", self.delay_s(Random(0))
        rng = Random(f"{self.seed} {key} {attempt}")
        rest = max(0.0, 1 - sum(self.shares))
        return rng.choices([*SHARES, "ok"], [*self.shares, rest])[0], self.delay_s(rng)

    def expires(self, key: str, attempt: int) -> bool:
        """Whether a batch leaves this attempt at a body unanswered."""
        rng = Random(f"{self.seed} {key} {attempt} expires") if self.pexpire else None
        return rng is not None and rng.random() < self.pexpire


class Refusal(Exception):
    """An error reply in OpenAI's shape, counted under `kind`: the knob that caused it, if any."""

    def __init__(self, kind: str, message: str = "", wait_s: float | None = None) -> None:
        super().__init__(kind)
        self.kind, self.status = kind, STATUS.get(kind, 500)
        type_ = {429: "rate_limit_error"}.get(self.status, "invalid_request_error")
        type_ = "server_error" if self.status >= 500 else type_
        code = OWN_CODES.get(kind) or CODES.get(self.status, kind)
        said = f"{kind} {message or SAYS.get(kind, '')}".strip()
        self.body: Json = {"error": {"message": said, "type": type_, "code": code}}
        self.headers = {} if wait_s is None else {"Retry-After": f"{wait_s:g}"}

    @property
    def response(self) -> web.Response:
        return web.json_response(self.body, status=self.status, headers=self.headers)


class Tally:
    """What was asked and how it ended, readable from any thread.

    Always `requests == ok + sum(errors) + in_flight`; what came in batches is counted beside that,
    and only the counts by body cover both. A reply is counted before its first byte is sent, so
    that a client that has its answer never reads stale numbers.
    """

    def __init__(self) -> None:
        self._lock, self._in_flight = threading.Lock(), 0
        self.reset()

    def reset(self) -> None:
        """Forget all but what is in flight, which counts as if it had just been asked."""
        with self._lock:
            self._requests = self._max_in_flight = self._in_flight
            self._again = self._ok = self._connections = 0
            self._first: float | None = None
            self._last: float | None = None
            self._errors, self._attempts, self._answered = (Counter[str]() for _ in range(3))
            self._of_batches, self._batch_errors = Counter[str](), Counter[str]()
            self._transports = WeakSet[Any]()

    def arrive(self, transport: Any) -> None:
        """A request has come; its body is not read yet."""
        with self._lock:
            self._arrive(transport)
            self._in_flight += 1
            self._max_in_flight = max(self._max_in_flight, self._in_flight)

    def _arrive(self, transport: Any) -> None:
        self._last = time.time()
        if self._first is None:
            self._first = self._last
        self._requests += 1
        if transport is not None and transport not in self._transports:
            self._transports.add(transport)
            self._connections += 1

    def pass_by(self, transport: Any) -> None:
        """A request has come and is answered in the same moment, its body not told from others."""
        with self._lock:
            self._arrive(transport)
            self._max_in_flight = max(self._max_in_flight, self._in_flight + 1)
            self._attempts[""] += 1
            self._answered[""] += 1
            self._ok += 1

    def admit(self, key: str) -> int:
        """Number this attempt at a body from 1; an empty key stands for all bodies."""
        with self._lock:
            self._attempts[key] += 1
            self._again += bool(key) and key in self._answered
            return self._attempts[key]

    def settle(self, key: str, kind: str) -> None:
        """The request ends: `ok`, or the kind of its error."""
        with self._lock:
            self._in_flight -= 1
            if kind == "ok":
                self._ok += 1
                self._answered[key] += 1
            else:
                self._errors[kind] += 1

    def settle_in_batch(self, key: str, kind: str) -> None:
        """A request of a batch ends: `ok`, or the kind of its error; `pexpire` is no answer."""
        with self._lock:
            self._of_batches["batch_requests"] += kind != "pexpire"
            if kind == "ok":
                self._answered[key] += 1
            else:
                self._batch_errors[kind] += 1

    def count(self, name: str) -> None:
        """One more of `files`, `files_deleted` or `batches`."""
        with self._lock:
            self._of_batches[name] += 1

    def stats(self, *, bodies: bool = False) -> Json:
        """The totals; `bodies` adds, by `body_key`, attempts let in (past key, limits) and ok."""
        with self._lock:
            answered = self._answered
            each = {k: {"attempts": n, "ok": answered[k]} for k, n in self._attempts.items() if k}
            names = ("files", "files_deleted", "batches", "batch_requests")
            return {
                "requests": self._requests,
                "ok": self._ok,
                "errors": dict(self._errors),
                "in_flight": self._in_flight,
                "max_in_flight": self._max_in_flight,
                "connections": self._connections,
                "first_request_at": self._first,
                "last_request_at": self._last,
                "distinct": len(each),
                "answered_twice": sum(max(body["ok"] - 1, 0) for body in each.values()),
                "sent_again_after_ok": self._again,
                **{name: self._of_batches[name] for name in names},
                "batch_errors": dict(self._batch_errors),
            } | ({"bodies": each} if bodies else {})


class Bucket:
    """Permits for `what` that refill steadily; a full bucket holds a minute's worth."""

    def __init__(self, what: str) -> None:
        self._what, self._limit, self._permits, self._at = what, 0, 0.0, 0.0

    def take(self, limit: int, amount: int = 1) -> tuple[float, dict[str, str]]:
        """The seconds to wait, 0 where `amount` was taken, and the headers that say so."""
        now = time.monotonic()
        refilled = self._permits + (now - self._at) * limit / 60
        if limit != self._limit:
            refilled = limit
        self._limit, self._permits, self._at = limit, min(limit, refilled), now
        wait_s = max(0.0, (amount - self._permits) * 60 / limit)
        if not wait_s:
            self._permits -= amount
        return wait_s, {
            f"x-ratelimit-limit-{self._what}": str(limit),
            f"x-ratelimit-remaining-{self._what}": str(int(self._permits)),
            f"x-ratelimit-reset-{self._what}": f"{(limit - self._permits) * 60 / limit:.3f}s",
        }
