"""What a run may spend: dollars and tokens, over all processes that work on it.

Before a request is sent, what it can cost at most is held back; when its answer is there, what it
did cost is charged. So the sum never passes the cap by more than what estimates miss. A process
leases a part of what is left, and all leases and charges together stay below the cap. They lie in
the ledger's database, where the charges of each run, day and month and of all time add up.
"""

import asyncio
import os
import time
import uuid
from collections import deque
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Literal

from pydantic import Field

from datakit.errors import Pending
from datakit.models.ledger import Attempt, Ledger
from datakit.text import dollars
from datakit.values import Number, Value

Per = Literal["run", "day", "month", "total"]

_DAY_S = 86_400.0
_WHOSE: dict[Per, str] = {
    "run": "this run",
    "day": "this day",
    "month": "this month",
    "total": "all runs of the recipe",
}


class Budget(Value):
    """A cap on dollars, tokens (input and output together) or both.

    per: what the cap is for: each `run` (one command), a calendar `day` or `month` (UTC), or all
    runs of the recipe ever (`total`).
    """

    max_usd: Number | None = Field(default=None, ge=0)
    max_tokens: int | None = Field(default=None, ge=0)
    per: Per = "run"


def scopes(recipe: str, run: str, at: float) -> dict[Per, str]:
    """The names under which charges of a run add up."""
    day = datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d")
    return {
        "run": f"{recipe} run {run}",
        "day": f"{recipe} day {day}",
        "month": f"{recipe} month {day[:7]}",
        "total": f"{recipe} total",
    }


def charge(ledger: Ledger, attempts: Iterable[Attempt]) -> None:
    """Add attempts to what their scopes have spent; inside the caller's transaction."""
    days: dict[tuple[str, str, float], tuple[float, int]] = {}
    for one in attempts:
        if one.outcome != "replayed":
            day = one.recipe, one.run, one.at // _DAY_S * _DAY_S
            usd, tokens = days.get(day, (0.0, 0))
            days[day] = usd + one.usd, tokens + one.input_tokens + one.output_tokens
    sums: dict[str, tuple[float, int]] = {}
    for day, (more_usd, more_tokens) in days.items():
        for scope in scopes(*day).values():
            usd, tokens = sums.get(scope, (0.0, 0))
            sums[scope] = usd + more_usd, tokens + more_tokens
    ledger.db.executemany(
        "INSERT INTO spent VALUES (?, ?, ?) ON CONFLICT (scope) DO UPDATE SET "
        "usd = usd + excluded.usd, tokens = tokens + excluded.tokens",
        [(scope, usd, tokens) for scope, (usd, tokens) in sums.items()],
    )


def spent(ledger: Ledger, scope: str) -> tuple[float, int]:
    """Dollars and tokens that a scope has spent."""
    row = ledger.db.execute("SELECT usd, tokens FROM spent WHERE scope = ?", (scope,)).fetchone()
    return row or (0.0, 0)


class Allowance:
    """This process's share of a budget.

    `hold` sets money aside for a request, `settle` returns it when the charge is written.
    """

    def __init__(self, budget: Budget, ledger: Ledger, recipe: str, run: str) -> None:
        self.budget = budget
        self._ledger = ledger
        self._whose = recipe, run
        self._scope = self._now()
        self._owner = uuid.uuid4().hex
        self._leased = (0.0, 0.0)
        self._held = (0.0, 0.0)
        self._holding = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self.is_spent = False

    async def hold(self, usd: float, tokens: float) -> None:
        """Set aside what one request can cost. Raises Pending where too little is left."""
        while self._has_rolled_over() or not self._covers(usd, tokens):
            if not self.is_spent and self._lease(usd, tokens):
                continue
            if self.is_spent or not self._holding:
                self.is_spent = True
                self._wake()
                raise self._spent()
            # What is under way may cost less than was held back for it.
            settled: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(settled)
            await settled
        self._held = self._held[0] + usd, self._held[1] + tokens
        self._holding += 1

    def settle(self, held: tuple[float, float], cost: tuple[float, float]) -> None:
        """A request has ended: `held` was set aside, `cost` is charged."""
        self._held = self._held[0] - held[0], self._held[1] - held[1]
        self._holding -= 1
        self._leased = self._leased[0] - cost[0], self._leased[1] - cost[1]
        self._wake()

    def written(self, usd: float, tokens: float) -> None:
        """Charges went into the sums: the lease shrinks by as much, in the same transaction."""
        self._ledger.db.execute(
            "UPDATE leases SET usd = usd - ?, tokens = tokens - ? WHERE owner = ?",
            (usd, tokens, self._owner),
        )

    def close(self) -> None:
        """Give back what was leased and not spent."""
        with self._ledger.transaction():
            self._ledger.db.execute("DELETE FROM leases WHERE owner = ?", (self._owner,))

    def _wake(self) -> None:
        """Let the first who waits look again; all of them where nothing comes back any more."""
        while self._waiting:
            first = self._waiting.popleft()
            if not first.done():
                first.set_result(None)
                if self._holding and not self.is_spent:
                    return

    def _now(self) -> str:
        """The scope that is charged now."""
        return scopes(*self._whose, time.time())[self.budget.per]

    def _has_rolled_over(self) -> bool:
        """Whether a new day or month has begun, with a budget of its own."""
        scope = self._now()
        if scope == self._scope:
            return False
        self.close()
        self._scope, self._leased, self.is_spent = scope, (0.0, 0.0), False
        return True

    def _covers(self, usd: float, tokens: float) -> bool:
        free_usd = self._leased[0] - self._held[0]
        free_tokens = self._leased[1] - self._held[1]
        return (self.budget.max_usd is None or usd <= free_usd + 1e-12) and (
            self.budget.max_tokens is None or tokens <= free_tokens
        )

    def _lease(self, usd: float, tokens: float) -> bool:
        """Lease more, so that the request is covered; False where too little is left."""
        ledger = self._ledger
        with ledger.transaction():
            self._forget_the_dead()
            paid = spent(ledger, self._scope)
            leased = ledger.db.execute(
                "SELECT COALESCE(SUM(MAX(usd, 0)), 0), COALESCE(SUM(MAX(tokens, 0)), 0) "
                "FROM leases WHERE scope = ?",
                (self._scope,),
            ).fetchone()
            wanted = (
                self._held[0] + usd - self._leased[0],
                self._held[1] + tokens - self._leased[1],
            )
            caps = (self.budget.max_usd, self.budget.max_tokens)
            granted: list[float] = []
            for cap, used, let, want in zip(caps, paid, leased, wanted, strict=True):
                left = 0.0 if cap is None else cap - used - let
                if cap is not None and want > left + 1e-12:
                    return False
                granted.append(0.0 if cap is None else max(0.0, want, min(left, cap / 100)))
            ledger.db.execute(
                "INSERT INTO leases VALUES (?, ?, ?, ?, ?) ON CONFLICT (owner, scope) DO UPDATE "
                "SET usd = usd + excluded.usd, tokens = tokens + excluded.tokens",
                (self._owner, self._scope, os.getpid(), *granted),
            )
        self._leased = self._leased[0] + granted[0], self._leased[1] + granted[1]
        return True

    def _forget_the_dead(self) -> None:
        """What a killed process had leased is free again."""
        for (pid,) in self._ledger.db.execute("SELECT DISTINCT pid FROM leases").fetchall():
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                self._ledger.db.execute("DELETE FROM leases WHERE pid = ?", (pid,))
            except PermissionError:
                continue

    def _spent(self) -> Pending:
        return Pending("budget", said_of(self.budget, self._ledger, self._scope))


def said_of(budget: Budget, ledger: Ledger, scope: str) -> str:
    """A sentence that says what a spent budget was, and what was spent."""
    caps = [
        "" if budget.max_usd is None else dollars(budget.max_usd),
        "" if budget.max_tokens is None else f"{budget.max_tokens:,} tokens",
    ]
    usd, tokens = spent(ledger, scope)
    named = " and ".join(cap for cap in caps if cap)
    return (
        f"the budget of {named} for {_WHOSE[budget.per]} is spent (${usd:,.4f}, {tokens:,} tokens)"
    )
