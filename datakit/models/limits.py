"""How many requests may be under way, at which address, and how many in a minute.

`Pool` hands out places: at most so many requests in flight in all, and at each address as many as
it takes. The window of an address halves when it says that it has too much and grows again while it
is in use and answers come quickly (additive increase, multiplicative decrease).
Of those who wait, the deepest in the line of steps goes first. An address whose connections fail
is left out for a while and then tried with one request.

`RateLimits` keeps requests and tokens a minute. Its buckets lie in the ledger's database, so that
several processes together stay below one limit.
"""

import asyncio
import heapq
import itertools
import math
import time
from collections.abc import Mapping, Sequence

from datakit.models.ledger import Ledger
from datakit.models.specs import Limits

FIRST_WINDOW = 32
"""Where the window begins if nobody said how many requests an endpoint takes."""
WIDEST_WINDOW = 2048
_SUSPECT = 3
_FIRST_OUT_S = 0.5
_LONGEST_OUT_S = 30.0
_LONGEST_WAIT_S = 120.0
"""A Retry-After beyond it is taken for a mistake, or for a limit that a run should not wait out."""
_SLOWED = 2.5
_AGING_S = 60.0
"""After so long, the best time to an answer counts for twice as much."""
_LEAST_SAMPLES = 32
_TOO_MANY = 0.15
"""Refused of the last requests: beyond it the endpoint has too much on its hands."""
_LAST = 100
_LAST_WINDOWS = 4
"""So many, and so many windows: refusals come at once and answers later, so that of one window's
requests the refused are seen first."""
_DRAW_S = 0.1


class Place:
    """One address of a model, and how it bears its load."""

    def __init__(self, url: str, window: float) -> None:
        self.url = url
        self.in_flight = 0
        self.window = window
        self.failures = 0
        self.out_until = 0.0
        self._cut_at = 0.0
        self._failed_at = 0.0
        self._refusals = 0.0
        self._recent_s = 0.0
        self._best_s = 0.0
        self._aged_at = 0.0
        self._samples = 0
        self._sound = math.inf
        self._grew = True

    def has_room(self, now: float) -> bool:
        """Whether one more request may go there now."""
        if now < self.out_until:
            return False
        # After a failure, one request tries whether the address is back.
        return self.in_flight < (1 if self.failures >= _SUSPECT else int(self.window))

    @property
    def _weight(self) -> float:
        """What one request counts in the share of refusals."""
        return 1 / max(_LAST, _LAST_WINDOWS * self.window)

    def answered(self, took_s: float, widest: float) -> None:
        """An answer came: the window may grow while it was in use and answers come quickly."""
        self.failures = 0
        self._refusals -= self._weight * self._refusals
        self._samples += 1
        weight = max(1 / self._samples, 1 / _LEAST_SAMPLES)
        self._recent_s += weight * (took_s - self._recent_s)
        if self._samples >= _LEAST_SAMPLES:
            # The best ages, so that an endpoint that has become slower is not held against it.
            now = time.monotonic()
            aged = self._best_s * 2 ** ((now - self._aged_at) / _AGING_S)
            self._best_s, self._aged_at = min(aged or self._recent_s, self._recent_s), now
        if self.in_flight * 2 < self.window or self._recent_s > _SLOWED * (self._best_s or 1e9):
            return
        # About doubles in each round up to what was known to be sound, then one more in each.
        more = 1 if self.window < self._sound else 1 / self.window
        self.window = min(widest, self.window + more)
        self._grew = True

    def refused(self, sent_at: float, wait_s: float | None) -> None:
        """It has too much: halve the window, once for all requests that were on their way.

        A refusal now and then, which says no time to wait, is no sign of that.
        """
        self._refusals += self._weight * (1 - self._refusals)
        if wait_s is None and self._refusals < _TOO_MANY:
            return
        now = time.monotonic()
        if wait_s is not None:
            self.out_until = max(self.out_until, now + min(wait_s, _LONGEST_WAIT_S))
        if sent_at >= self._cut_at:
            half = max(1.0, self.window / 2)
            # The first cut of a row of cuts says how much was too much.
            self._sound = half if self.window >= self._sound or self._grew else self._sound
            self.window, self._cut_at, self._grew = half, now, False

    def failed(self, sent_at: float) -> None:
        """A connection failed, or nothing came in time; what was sent together counts once."""
        if sent_at < self._failed_at:
            return
        self._failed_at = time.monotonic()
        self.failures += 1
        if self.failures >= _SUSPECT:
            out_s = _FIRST_OUT_S * 2 ** min(self.failures - _SUSPECT, 10)
            self.out_until = self._failed_at + min(_LONGEST_OUT_S, out_s)


class Pool:
    """Places for requests at the addresses of one model; of one event loop."""

    def __init__(self, urls: Sequence[str], max_in_flight: int | None) -> None:
        self._widest = max_in_flight or WIDEST_WINDOW
        self.places = [Place(url, max_in_flight or FIRST_WINDOW) for url in urls]
        self._free = self._widest
        self._waiting: list[tuple[int, int, asyncio.Future[Place]]] = []
        self._order = itertools.count()
        self._alarm: asyncio.TimerHandle | None = None

    async def take(self, depth: int = 0) -> Place:
        """A place at the least loaded address, as soon as there is one."""
        if not self._waiting:
            place = self._roomiest(time.monotonic())
            if place is not None:
                return self._given(place)
        future: asyncio.Future[Place] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (-depth, next(self._order), future))
        self._hand_out()
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                self.give(future.result())
            raise

    def give(self, place: Place) -> None:
        """Give a place back."""
        place.in_flight -= 1
        self._free += 1
        if self._waiting:
            self._hand_out()

    def answered(self, place: Place, took_s: float) -> None:
        """Tell that a place's request was answered."""
        place.answered(took_s, self._widest)

    def elsewhere(self, place: Place) -> bool:
        """Whether another address can take the request of `place` at once."""
        now = time.monotonic()
        return any(other is not place and other.has_room(now) for other in self.places)

    def _given(self, place: Place) -> Place:
        place.in_flight += 1
        self._free -= 1
        return place

    def _roomiest(self, now: float) -> Place | None:
        """The address with the most room; None where nowhere is any."""
        if not self._free:
            return None
        if len(self.places) == 1:
            return self.places[0] if self.places[0].has_room(now) else None
        open_ = [place for place in self.places if place.has_room(now)]
        return min(open_, key=lambda place: place.in_flight / place.window, default=None)

    def _hand_out(self) -> None:
        # One look at the clock for both questions: an address that comes back between two would
        # be waited for, and nobody would wake.
        now = time.monotonic()
        while self._waiting:
            if self._waiting[0][2].done():
                heapq.heappop(self._waiting)
                continue
            place = self._roomiest(now)
            if place is None:
                self._wake_later(now)
                return
            heapq.heappop(self._waiting)[2].set_result(self._given(place))

    def _wake_later(self, now: float) -> None:
        """Look again when the first address that is left out may be asked again."""
        out = [place.out_until for place in self.places if place.out_until > now]
        if not out:
            return
        loop = asyncio.get_running_loop()
        when = loop.time() + min(out) - now
        if self._alarm is not None:
            if self._alarm.when() <= when:
                return
            self._alarm.cancel()
        self._alarm = loop.call_at(when, self._awake)

    def _awake(self) -> None:
        self._alarm = None
        self._hand_out()


class RateLimits:
    """Requests and tokens a minute for one model; what is not given is learnt from headers."""

    def __init__(self, limits: Limits, name: str, ledger: Ledger) -> None:
        self._name = name
        self._ledger = ledger
        self._given = {key: value for key, value in limits.model_dump().items() if value}
        self._buckets = {key: self._bucket(key, value) for key, value in self._given.items()}

    @property
    def none(self) -> bool:
        """Whether nothing is limited so far."""
        return not self._buckets

    async def permit(self, input_tokens: float, output_tokens: float) -> None:
        """Wait until a request of about so many tokens may be sent."""
        for key, bucket in tuple(self._buckets.items()):
            await bucket.take(_charge(key, input_tokens, output_tokens))

    def settle(self, input_tokens: float, output_tokens: float) -> None:
        """Charge what a request used beyond its estimate; less than nothing gives back."""
        for key, bucket in self._buckets.items():
            if key != "requests":
                bucket.charge(_charge(key, input_tokens, output_tokens))

    def learn(self, headers: Mapping[str, str]) -> None:
        """Take over the limits that a reply states (`x-ratelimit-limit-requests`, `-tokens`)."""
        for key in ("requests", "tokens"):
            stated = headers.get(f"x-ratelimit-limit-{key}", "")
            if key not in self._given and stated.isascii() and stated.isdigit() and int(stated):
                bucket = self._buckets.get(key)
                if bucket is None or bucket.per_minute != int(stated):
                    self._buckets[key] = self._bucket(key, int(stated))

    def _bucket(self, key: str, per_minute: int) -> "_Bucket":
        return _Bucket(f"{self._name} {key}", per_minute, self._ledger)


def _charge(key: str, input_tokens: float, output_tokens: float) -> float:
    match key:
        case "requests":
            return 1.0
        case "input_tokens":
            return input_tokens
        case "output_tokens":
            return output_tokens
        case _:
            return input_tokens + output_tokens


class _Bucket:
    """This process's stock of a bucket that refills steadily and that all processes draw from.

    It holds one second's worth, so that no minute sees more than the limit and a sixtieth.
    """

    def __init__(self, name: str, per_minute: int, ledger: Ledger) -> None:
        self.per_minute = per_minute
        self._name = name
        self._ledger = ledger
        self._stock = 0.0
        self._turn = asyncio.Lock()

    async def take(self, amount: float) -> None:
        """Wait for `amount`, in order of asking."""
        async with self._turn:
            while self._stock < amount:
                wait_s = self._draw(amount - self._stock)
                if wait_s:
                    await asyncio.sleep(wait_s)
            self._stock -= amount

    def _draw(self, wanted: float) -> float:
        """Draw from the shared bucket, or say how many seconds it takes to fill."""
        a_second = self.per_minute / 60
        holds = max(1.0, a_second)
        enough = min(wanted, holds)
        now = time.time()
        db = self._ledger.db
        with self._ledger.transaction():
            row = db.execute(
                "SELECT level, at FROM buckets WHERE name = ?", (self._name,)
            ).fetchone()
            level, at = row or (holds, now)
            level = min(holds, level + max(0.0, now - at) * a_second)
            # A little more than is wanted, so that not every request costs a transaction; one that
            # is larger than the bucket leaves a debt.
            drawn = max(wanted, min(level, a_second * _DRAW_S)) if level >= enough else 0.0
            db.execute(
                "INSERT OR REPLACE INTO buckets VALUES (?, ?, ?)", (self._name, level - drawn, now)
            )
        self._stock += drawn
        return 0.0 if drawn else (enough - level) / a_second

    def charge(self, amount: float) -> None:
        """Take without waiting; who comes next waits the longer."""
        self._stock -= amount
