"""What the ledger's database holds of batches: the queue, the batches, and what they cost.

A request is queued (no batch), in a batch, or has failed (a kind of fault, and no batch); an
answered one is in the queue no more. A batch is there before anything of it is sent.
"""

import json
import os
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any, NamedTuple

from datakit.models.batch_files import UrlPath, request_line
from datakit.models.budget import Budget, charge, said_of, scopes, spent
from datakit.models.chat import Reply, Request
from datakit.models.faults import Fault
from datakit.models.ledger import Answer, Attempt, Ledger
from datakit.models.openai import Usage
from datakit.models.prices import price_of
from datakit.models.specs import FREE, OpenAISpec

MOST_REQUESTS = 50_000
MOST_BYTES = 100_000_000
"""What one file may hold."""

WINDOW_S = 26 * 3600.0
"""After so long, a batch of a day is over, whether or not anybody can still be asked about it."""

BUDGET = "budget"
"""Where a kind of fault stands else: the request was not sent, because the budget is spent."""

_CLAIM_S = 3600.0
"""No upload takes longer."""

_INFINITE = float("inf")


class Sent(NamedTuple):
    """A batch as the ledger knows it; no id: nobody knows whether it was created."""

    name: str
    id: str
    file: str
    path: UrlPath
    recipe: str
    run: str
    worker: int
    requests: int
    made: float

    @property
    def is_over(self) -> bool:
        """Whether it must have ended by now."""
        return time.time() - self.made > WINDOW_S

    @property
    def is_being_sent(self) -> bool:
        """Whether another thread or process is at work on it."""
        is_own = self.worker == threading.get_native_id()
        return not is_own and time.time() - self.made < _CLAIM_S and _lives(self.worker)


class BatchBook:
    """The requests and batches of one model at one address, as one run sees them."""

    def __init__(
        self, spec: OpenAISpec, ledger: Ledger, recipe: str, run: str, budget: Budget | None
    ) -> None:
        self.identity = spec.resolved_identity()
        self.url = spec.urls[0]
        self._spec = spec
        self._ledger = ledger
        self._db = ledger.db
        self._recipe = recipe
        self._run = run
        self._budget = budget
        self._price = price_of(spec, ledger.path.parent) or FREE
        self._usage = Usage()

    # -- the queue -------------------------------------------------------------------------------

    @property
    def waits(self) -> bool:
        """Whether a request of this run is neither answered nor failed for good."""
        return self._has("run = ? AND model = ? AND failed = ''", self._run, self.identity)

    def has_queued(self, path: UrlPath) -> bool:
        """Whether this run has queued requests for a URL path."""
        where = "batch = '' AND model = ? AND run = ? AND failed = '' AND path = ?"
        return self._has(where, self.identity, self._run, path)

    def drop_answered(self) -> None:
        """Somebody else may have had answered what this run has queued."""
        with self._ledger.transaction():
            self._db.execute(
                "DELETE FROM queue WHERE batch = '' AND model = ? AND run = ? AND "
                "EXISTS (SELECT 1 FROM answers WHERE answers.key = queue.key)",
                (self.identity, self._run),
            )

    def give_up(self) -> None:
        """Nothing more is affordable: the rows that wait end as rows of a spent budget."""
        assert self._budget is not None
        said = said_of(self._budget, self._ledger, self._scope)
        with self._ledger.transaction():
            self._db.execute(
                "UPDATE queue SET failed = ?, said = ? "
                "WHERE batch = '' AND model = ? AND run = ? AND failed = ''",
                (BUDGET, said, self.identity, self._run),
            )

    def _queued(self, path: UrlPath, most: int) -> Iterator[tuple[str, str]]:
        """Key and request of what this run has queued, the deepest steps first."""
        # Sorting keys alone keeps memory flat.
        keys = self._db.execute(
            "SELECT key FROM queue WHERE batch = '' AND model = ? AND run = ? AND failed = '' "
            "AND path = ? ORDER BY depth DESC, rowid LIMIT ?",
            (self.identity, self._run, path, most),
        ).fetchall()
        for key in keys:
            yield self._db.execute("SELECT key, request FROM queue WHERE key = ?", key).fetchone()

    def _has(self, where: str, *values: str) -> bool:
        sql = f"SELECT EXISTS (SELECT 1 FROM queue WHERE {where})"  # noqa: S608
        return bool(self._db.execute(sql, values).fetchone()[0])

    # -- batches ---------------------------------------------------------------------------------

    def batches(self) -> list[Sent]:
        """What was sent to this address, or may have been, and is not collected."""
        rows = self._db.execute(
            "SELECT name, id, file, path, recipe, run, worker, requests, made FROM batches "
            "WHERE url = ? AND model = ? AND NOT collected ORDER BY made",
            (self.url, self.identity),
        )
        return [Sent(*row) for row in rows]

    def elsewhere(self) -> list[tuple[Sent, str]]:
        """Batches that hold requests of this run and were sent to other addresses."""
        rows = self._db.execute(
            "SELECT name, id, file, path, recipe, run, worker, requests, made, url FROM batches "
            "WHERE url != ? AND model = ? AND NOT collected AND EXISTS "
            "(SELECT 1 FROM queue WHERE queue.batch = batches.name AND queue.run = ?)",
            (self.url, self.identity, self._run),
        )
        return [(Sent(*row), url) for *row, url in rows]

    def claim(self, path: UrlPath, file: IO[bytes], most: int) -> Sent | None:
        """Take requests for the next batch, and write their lines; None where none is affordable.

        It is written down before any of it is sent.
        """
        held, size = (0.0, 0.0), 0
        keys: list[str] = []
        with self._ledger.transaction():
            left = self._left()
            for key, text in self._queued(path, most):
                line = request_line(key, path, self._spec.model, text)
                size += len(line)
                wanted = self._with(held, key, text)
                fits = wanted[0] <= left[0] + 1e-12 and wanted[1] <= left[1]
                if not fits or (keys and size > MOST_BYTES):
                    break
                file.write(line)
                keys.append(key)
                held = wanted
            return self._claimed(path, keys, held) if keys else None

    def _claimed(self, path: UrlPath, keys: Sequence[str], held: tuple[float, float]) -> Sent:
        made = Sent(
            name=uuid.uuid4().hex,
            id="",
            file="",
            path=path,
            recipe=self._recipe,
            run=self._run,
            worker=threading.get_native_id(),
            requests=len(keys),
            made=time.time(),
        )
        whose = self.url, self.identity, path, self._recipe, self._run
        self._db.execute(
            "INSERT INTO batches VALUES (?, '', '', ?, ?, ?, ?, ?, ?, ?, ?, 0)",
            (made.name, *whose, made.worker, made.requests, made.made),
        )
        self._db.executemany(
            "UPDATE queue SET batch = ? WHERE key = ?", ((made.name, key) for key in keys)
        )
        if self._budget is not None:
            # Process 0 is alive for ever: what a batch may cost is held back until it is
            # collected, whatever becomes of the process that sent it.
            self._db.execute(
                "INSERT INTO leases VALUES (?, ?, 0, ?, ?)", (made.name, self._scope, *held)
            )
        return made

    def note(self, batch: Sent, file: str = "", id: str = "") -> Sent:  # noqa: A002
        """Write down the provider's name of a batch's file, or of the batch itself."""
        noted = batch._replace(file=file or batch.file, id=id or batch.id)
        with self._ledger.transaction():
            self._db.execute(
                "UPDATE batches SET file = ?, id = ? WHERE name = ?",
                (noted.file, noted.id, noted.name),
            )
        return noted

    def release(self, batch: Sent) -> None:
        """A batch is over: what is still in it is queued again."""
        with self._ledger.transaction():
            self._db.execute("UPDATE queue SET batch = '' WHERE batch = ?", (batch.name,))
            self._db.execute("UPDATE batches SET collected = 1 WHERE name = ?", (batch.name,))
            self._db.execute("DELETE FROM leases WHERE owner = ?", (batch.name,))

    # -- what batches bring ----------------------------------------------------------------------

    def write(self, batch: Sent, outcomes: Iterable[tuple[str, Reply | Fault]]) -> list[Attempt]:
        """Write answers and failures of a batch; those that are written already change nothing."""
        answers: list[Answer] = []
        attempts: list[Attempt] = []
        with self._ledger.transaction():
            for key, outcome in outcomes:
                row = self._db.execute(
                    "SELECT step, tries, draw, request FROM queue WHERE key = ? AND batch = ?",
                    (key, batch.name),
                ).fetchone()
                if row is None:
                    continue
                step, tries, draw, text = row
                if isinstance(outcome, Fault):
                    self._failed(key, tries + 1, outcome)
                    used = (0, 0)
                    if outcome.policy.billed and outcome.kind != "timeout":
                        used = self._usage.expected(_request(key, text))
                    attempts.append(self._attempt(batch, key, step, outcome.kind, used))
                    continue
                answers.append(Answer(key, self.identity, draw, text, outcome))
                used = self._usage.of(_request(key, text), outcome)
                attempts.append(self._attempt(batch, key, step, "ok", used))
                self._db.execute("DELETE FROM queue WHERE key = ?", (key,))
            self._ledger.put(answers)
            self._charge(batch, attempts)
            if answers and not self._has("batch = ?", batch.name):
                # Nothing may ask for it again, so nothing may be left to do.
                self.release(batch)
        return attempts

    def end(self, batch: Sent, fault: Fault) -> list[Attempt]:
        """A batch is collected: `fault` is what became of the requests that it did not answer."""
        with self._ledger.transaction():
            rows = self._db.execute(
                "SELECT key, step, tries FROM queue WHERE batch = ?", (batch.name,)
            ).fetchall()
            attempts: list[Attempt] = []
            for key, step, tries in rows:
                self._failed(key, tries + 1, fault)
                attempts.append(self._attempt(batch, key, step, fault.kind, (0, 0)))
            self._charge(batch, attempts)
            self.release(batch)
        return attempts

    def _failed(self, key: str, tries: int, fault: Fault) -> None:
        """A request goes back into the queue, or has failed for good."""
        again = fault.policy.again and tries <= self._spec.retries
        kind, said = ("", "") if again else (fault.kind, str(fault))
        self._db.execute(
            "UPDATE queue SET batch = '', tries = ?, failed = ?, said = ? WHERE key = ?",
            (tries, kind, said, key),
        )

    def _attempt(
        self, batch: Sent, key: str, step: str, outcome: str, used: tuple[int, int]
    ) -> Attempt:
        """An attempt, charged to the run that sent the batch: that run's budget let it go."""
        usd, whose = self._price.usd(*used), (batch.run, batch.recipe)
        return Attempt(time.time(), *whose, step, self.identity, key, outcome, 1, *used, usd)

    def _charge(self, batch: Sent, attempts: list[Attempt]) -> None:
        """Write attempts and their bill; what is held back for the batch shrinks by as much."""
        self._db.executemany(
            "INSERT INTO attempts VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", attempts
        )
        charge(self._ledger, attempts)
        usd = sum(one.usd for one in attempts)
        tokens = sum(one.input_tokens + one.output_tokens for one in attempts)
        self._db.execute(
            "UPDATE leases SET usd = usd - ?, tokens = tokens - ? WHERE owner = ?",
            (usd, tokens, batch.name),
        )

    # -- the budget ------------------------------------------------------------------------------

    @property
    def _scope(self) -> str:
        assert self._budget is not None
        return scopes(self._recipe, self._run, time.time())[self._budget.per]

    @property
    def holds(self) -> bool:
        """Whether part of the budget is held back for batches of this model."""
        if self._budget is None:
            return False
        held = self._db.execute(
            "SELECT 1 FROM leases JOIN batches ON name = owner WHERE scope = ? AND url = ? AND "
            "model = ? LIMIT 1",
            (self._scope, self.url, self.identity),
        )
        return held.fetchone() is not None

    def _with(self, held: tuple[float, float], key: str, text: str) -> tuple[float, float]:
        """What is held back for a batch, with what one request more can cost."""
        if self._budget is None:
            return held
        most = self._usage.most(_request(key, text))
        return held[0] + self._price.usd(*most), held[1] + sum(most)

    def _left(self) -> tuple[float, float]:
        """Dollars and tokens that are neither spent nor held back; inside a transaction."""
        if self._budget is None:
            return _INFINITE, _INFINITE
        usd, tokens = spent(self._ledger, self._scope)
        leases = self._db.execute(
            "SELECT pid, usd, tokens FROM leases WHERE scope = ?", (self._scope,)
        )
        for pid, usd_held, tokens_held in leases:
            if _lives(pid):
                usd, tokens = usd + max(0.0, usd_held), tokens + max(0.0, tokens_held)
        most_usd, most_tokens = self._budget.max_usd, self._budget.max_tokens
        return (
            _INFINITE if most_usd is None else most_usd - usd,
            _INFINITE if most_tokens is None else most_tokens - tokens,
        )


def _lives(pid: int) -> bool:
    """Whether a process or thread is there."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _request(key: str, text: str) -> Request:
    """A queued request, as far as `Usage` looks at it."""
    body: dict[str, Any] = json.loads(text)
    return Request(body, text, key)
