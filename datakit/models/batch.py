"""The provider's offline batch API: the same requests under the same keys, answered within a day.

`Queued` stands where a live model would: it writes a request into the ledger's queue, and its row
waits. `settle` then sends what is queued, waits, and writes the answers into the ledger, where the
next pass finds them.

Nothing is paid twice. What a batch holds is written down before any of it is sent, under a name
that goes with it: after a kill, the batch is found again by that name. And an answer, its bill and
its end in the queue are one transaction.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import islice
from tempfile import TemporaryFile
from typing import IO, NamedTuple

from datakit.errors import DatakitError, EndpointError, OutsideError, Pending
from datakit.models import batch_wire
from datakit.models.batch_book import BUDGET, MOST_REQUESTS, BatchBook, Sent
from datakit.models.batch_files import CHAT, TEXT, outcome_of
from datakit.models.batch_wire import Provider, State
from datakit.models.book import Book, Meter
from datakit.models.budget import Budget
from datakit.models.chat import Reply, Request
from datakit.models.faults import Fault
from datakit.models.ledger import Attempt, Ledger
from datakit.models.specs import ChatSpec, OpenAISpec

_ROWS = 1_000
"""Lines that are written in one transaction: others get their turn at the ledger between."""

_TOO_LARGE = "too_many_tasks"
_TOO_MUCH = frozenset(
    {_TOO_LARGE, "token_limit_exceeded", "request_limit_exceeded", "rate_limit_exceeded"}
)
"""Codes of batches that are refused for their size, or for what is under way already."""


class Waiting(NamedTuple):
    """What a progress callback hears: batches under way, their requests, and those answered."""

    model: str
    batches: int
    requests: int
    answered: int


class Queued:
    """Requests wait in the ledger's database for the next batch; their rows are pending.

    run: the run that asks. What a batch could not answer in it is raised as the row's error; in
    another run, it is asked again.
    """

    def __init__(self, identity: str, spec: ChatSpec, book: Book, run: str) -> None:
        self.identity = identity
        self._name = spec.model
        self._ledger = book.ledger
        self._run = run
        self._rows: list[tuple[object, ...]] = []
        self._written: asyncio.Future[None] | None = None

    async def answer(self, request: Request) -> Reply:
        """Never a reply: raises Pending, or what the batch brought instead of an answer."""
        with self._ledger.outside():
            known = self._ledger.db.execute(
                "SELECT run, failed, said, tries FROM queue WHERE key = ?", (request.key,)
            ).fetchone()
        if known is None or known[0] != self._run:
            await self._write(request)
        elif known[1] == BUDGET:
            raise Pending(BUDGET, known[2])
        elif known[1]:
            _, kind, said, tries = known
            raise Fault(kind, said).error(tries)
        raise Pending("batch", "waits for its batch")

    async def _write(self, request: Request) -> None:
        """Have a request written with all others of this turn of the event loop."""
        path = CHAT if request.is_chat else TEXT
        asked = request.draw, request.text, request.step, request.depth, self._run, time.time()
        self._rows.append((request.key, self.identity, self._name, path, *asked))
        if self._written is None:
            loop = asyncio.get_running_loop()
            self._written = loop.create_future()
            loop.call_soon(self._flush)
        # Whoever is cancelled must not cancel the others' wait.
        await asyncio.shield(self._written)

    def _flush(self) -> None:
        rows, written = self._rows, self._written
        self._rows, self._written = [], None
        assert written is not None
        try:
            with self._ledger.transaction():
                self._ledger.db.executemany(
                    "INSERT INTO queue VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, '', 0, '', '') "
                    "ON CONFLICT (key) DO UPDATE SET name = excluded.name, run = excluded.run, "
                    "step = excluded.step, depth = excluded.depth, asked = excluded.asked, "
                    "tries = IIF(batch = '', 0, tries), failed = '', said = '' "
                    "WHERE run != excluded.run",
                    rows,
                )
        except Exception as error:
            written.set_exception(error)
            written.exception()  # seen: everybody who waited may have been cancelled
        else:
            written.set_result(None)

    async def close(self) -> None:
        """Nothing to close: what was asked is written in the turn that asked it."""


def settle(queues: Sequence["Queue"]) -> None:
    """Send what is queued in each of them and wait until all of it is answered or has failed.

    What the budget does not cover stays queued, and its rows end as those of a spent budget.
    Raises EndpointError and OutsideError. A signal may stop it at any moment: the next run
    collects what was sent.
    """
    try:
        with ExitStack() as stack:
            providers = [stack.enter_context(Provider(queue.spec)) for queue in queues]
            pause_s = batch_wire.FIRST_PAUSE_S
            while True:
                # Each has its turn before any is waited for: batches of two models run together.
                news = [queue.turn(one) for queue, one in zip(queues, providers, strict=True)]
                if not any(queue.holds for queue in queues):
                    # Else what is under way may cost less than is held back for it.
                    for queue in queues:
                        queue.give_up()
                if not any(queue.waits for queue in queues):
                    return
                pause_s = batch_wire.FIRST_PAUSE_S if any(news) else pause_s * 1.5
                pause_s = min(pause_s, batch_wire.LONGEST_PAUSE_S)
                time.sleep(pause_s)
    except Fault as fault:
        said = f"{fault}; the same command goes on where this one stopped"
        if fault.kind == "unknown_model":
            said = f"{fault} (where there is no batch API, leave out `mode: batch`)"
        raise EndpointError(said) from fault
    except OSError as error:
        if isinstance(error, DatakitError):
            raise
        raise OutsideError(
            "requests and answers pass through the folder for temporary files, which failed: "
            f"{error}; make room, or set TMPDIR, and run the same command again"
        ) from error


class Queue:
    """What waits for batches of one model, and its batches that are under way.

    recipe and run name what is charged, and whose requests are sent: what an interrupted run left
    in the queue and nobody asks for any more costs nothing. budget: the cap of both. meter: counts
    what is sent. progress: called after every look.
    """

    def __init__(
        self,
        spec: OpenAISpec,
        ledger: Ledger,
        *,
        recipe: str,
        run: str,
        budget: Budget | None = None,
        meter: Meter | None = None,
        progress: Callable[[Waiting], None] | None = None,
    ) -> None:
        self.spec = spec
        self._ledger = ledger
        self._book = BatchBook(spec, ledger, recipe, run, budget)
        self._meter = meter or Meter()
        self._progress = progress
        self._most = MOST_REQUESTS
        self._refusals = 0
        self._not_before = 0.0
        self._is_full = False
        self._is_short = False

    def settle(self) -> None:
        """Send what is queued and wait for it; as the function of that name."""
        settle([self])

    @property
    def waits(self) -> bool:
        """Whether a request of this run is neither answered nor failed."""
        with self._ledger.outside():
            return self._book.waits

    @property
    def holds(self) -> bool:
        """Whether money is held back for a batch that is under way."""
        with self._ledger.outside():
            return self._book.holds

    def give_up(self) -> None:
        """Leave what the budget does not cover."""
        if self._is_short:
            self._book.give_up()

    def turn(self, provider: Provider) -> bool:
        """Look at every batch, collect what is over, send what can be; whether anything moved."""
        with self._ledger.outside():
            self._elsewhere()
            moved, answered = False, 0
            for batch in self._book.batches():
                found = batch if batch.id else self._adopted(provider, batch)
                state = self._looked_at(provider, found) if found is not None else None
                if found is not None and state is not None and state.is_over:
                    self._collect(provider, found, state)
                    moved = True
                elif state is not None:
                    answered += state.done
            moved = self._send(provider) or moved
            if self._progress is not None:
                out = self._book.batches()
                requests = sum(batch.requests for batch in out)
                self._progress(Waiting(self._book.identity, len(out), requests, answered))
            return moved

    # -- batches that are under way --------------------------------------------------------------

    def _elsewhere(self) -> None:
        """Requests of this run may be in a batch at another address, which nobody asks here."""
        for batch, url in self._book.elsewhere():
            if not batch.is_over:
                raise EndpointError(
                    f"{batch.requests:,} requests to {self._book.identity!r} are in batch "
                    f"{batch.id!r} at {url}, not at {self._book.url}: run once with that base_url "
                    "to collect it; 26 hours after it was sent, its requests are sent again"
                )
            self._book.release(batch)

    def _adopted(self, provider: Provider, batch: Sent) -> Sent | None:
        """A batch whose maker did not get to write its id down, if it was created at all."""
        if batch.is_being_sent:
            return None
        found = provider.patiently(
            lambda: provider.find(batch.name, batch.file, batch.made), self.spec.retries + 1
        )
        if found:
            return self._book.note(batch, id=found)
        self._book.release(batch)
        return None

    def _looked_at(self, provider: Provider, batch: Sent) -> State | None:
        """How far a batch is; None where nobody knows it any more, and it is given up."""
        try:
            return provider.patiently(lambda: provider.look(batch.id))
        except Fault as fault:
            self._known(batch, fault)
        self._book.release(batch)
        return None

    def _known(self, batch: Sent, fault: Fault) -> None:
        """What to do where a batch, or a file of it, is not there: ask again, but not too soon."""
        if fault.kind != "unknown_model":
            raise fault
        if not batch.is_over:
            raise EndpointError(
                f"{self._book.url} does not know batch {batch.id!r}, which holds "
                f"{batch.requests:,} requests, or its files: give the key (api_key_env) that it "
                "was made with; 26 hours after it was sent, its requests are sent again"
            ) from fault

    # -- collecting ------------------------------------------------------------------------------

    def _collect(self, provider: Provider, batch: Sent, state: State) -> None:
        """Write down what a batch brought, and what becomes of the rest."""
        if state.status == "failed":
            self._refused(batch, state)
            return
        for file_id in filter(None, (state.output, state.errors)):
            try:
                with provider.lines(file_id) as lines:
                    while some := list(islice(lines, _ROWS)):
                        self._count(self._book.write(batch, self._outcomes(provider, some)))
            except Fault as fault:
                self._known(batch, fault)
        url = self._book.url
        if state.status == "cancelled":
            self._book.release(batch)
            raise EndpointError(
                f"batch {batch.id!r} at {url} was cancelled; what it answered is kept, and the "
                "same command sends the rest again"
            )
        lost = Fault("malformed_body", f"{url}: batch {batch.id!r} brought no answer to it")
        if state.status == "expired":
            lost = Fault("timeout", f"{url}: batch {batch.id!r} expired before its turn")
        self._count(self._book.end(batch, lost))
        self._is_full, self._refusals = False, 0

    def _outcomes(
        self, provider: Provider, lines: Sequence[bytes]
    ) -> list[tuple[str, Reply | Fault]]:
        """What some lines tell; what cannot be read counts as lost at the batch's end."""
        outcomes: list[tuple[str, Reply | Fault]] = []
        for line in lines:
            try:
                key, outcome = outcome_of(line, provider.url, self.spec.model, provider.secret)
            except ValueError:
                continue
            if outcome is not None:
                outcomes.append((key, outcome))
        return outcomes

    def _count(self, attempts: Sequence[Attempt]) -> None:
        meter = self._meter
        for one in attempts:
            meter.usd += one.usd
            if one.outcome == "ok":
                meter.sent += 1
                meter.input_tokens += one.input_tokens
                meter.output_tokens += one.output_tokens
            else:
                meter.failed += 1
                meter.wasted_usd += one.usd

    def _refused(self, batch: Sent, state: State) -> None:
        """A batch of which no request was looked at: it is too much for now, or wrong."""
        self._book.release(batch)
        said = state.said or "no reason given"
        refused = f"{self._book.url} refuses a batch of {batch.requests:,} requests"
        if not _TOO_MUCH.intersection(state.codes) and "enqueued" not in said.lower():
            raise EndpointError(f"{refused}: {said}")
        self._is_full = True
        if self._book.batches():
            return
        # Nothing else of ours is in its way: others' batches are, or it is too large by itself.
        self._refusals += 1
        if self._refusals > self.spec.retries:
            raise EndpointError(
                f"{refused}, after {self._refusals} tries: {said}; run the same command later"
            )
        self._most = max(1, batch.requests // 4)
        if _TOO_LARGE not in state.codes:
            # What others have under way takes its time.
            wait_s = batch_wire.LONGEST_PAUSE_S * 2 ** (self._refusals - 1)
            self._not_before = time.monotonic() + wait_s

    # -- sending ---------------------------------------------------------------------------------

    def _send(self, provider: Provider) -> bool:
        """Send what is queued and fits; whether any was sent."""
        if self._is_full:
            # Once nothing else of ours is under way, the next turn tries again.
            self._is_full = bool(self._book.batches())
            return False
        if time.monotonic() < self._not_before:
            return False
        self._book.drop_answered()
        self._is_short = False
        sent = False
        for path in (CHAT, TEXT):
            while self._book.has_queued(path):
                with TemporaryFile() as file:
                    batch = self._book.claim(path, file, self._most)
                    if batch is None:
                        self._is_short = True
                        break
                    self._create(provider, batch, file)
                sent = True
        return sent

    def _create(self, provider: Provider, batch: Sent, file: IO[bytes]) -> None:
        """Send a batch. One that was refused is released, one that may be there is not."""
        tries, label = self.spec.retries + 1, f"datakit-{batch.name}"
        may_be = False

        def created() -> str:
            nonlocal may_be
            # The reply to a create that failed may have been all that was lost.
            found = provider.find(batch.name, batch.file, batch.made) if may_be else ""
            try:
                return found or provider.create(batch.name, batch.recipe, batch.path, batch.file)
            except Fault as fault:
                may_be = may_be or fault.policy.again
                raise

        try:
            file_id = provider.patiently(lambda: provider.upload(label, file), tries)
            batch = self._book.note(batch, file=file_id)
            self._book.note(batch, id=provider.patiently(created, tries))
        except Fault:
            if not may_be:
                self._book.release(batch)
            raise
