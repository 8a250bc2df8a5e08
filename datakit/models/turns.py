"""Local models take turns: each is up in some passes of a run and not in others."""

import time

from datakit.errors import Pending, RowError, Unanswered
from datakit.models.book import Book
from datakit.models.chat import ChatModel, Reply, Request
from datakit.models.faults import Fault
from datakit.models.ledger import Ledger
from datakit.models.specs import VLLMSpec


class InTurns:
    """A local model. While it is not up, a request leaves its row pending for `reason`.

    A request that failed is not asked again in the same run, or two models that cannot answer a
    row would be up in turns for ever. up: what asks it where it is up.
    """

    def __init__(
        self, spec: VLLMSpec, up: ChatModel | None, book: Book, run: str, reason: str
    ) -> None:
        self.identity = spec.resolved_identity()
        self._spec = spec
        self._up = up
        self._ledger = book.ledger
        self._run = run
        self._reason = reason

    async def answer(self, request: Request) -> Reply:
        """As ChatModel does; raises Pending where the model is not up."""
        failed = _failure(self._ledger, request.key, self._run)
        if failed is not None:
            raise failed
        if self._up is None:
            raise Pending(self._reason, f"{self.identity} is not up in this pass")
        try:
            return await self._asked(self._up, request)
        except RowError as error:
            _write_failure(self._ledger, request, self._run, self._spec, error)
            raise

    async def _asked(self, up: ChatModel, request: Request) -> Reply:
        """The reply; waits for a server that is being started again, as long as a start may take.

        One that is given up refuses the request, which ends the wait.
        """
        until = 0.0
        while True:
            try:
                return await up.answer(request)
            except Unanswered as error:
                until = until or time.monotonic() + self._spec.start_timeout_s
                if error.reason not in ("connection", "cut") or time.monotonic() > until:
                    raise

    async def close(self) -> None:
        if self._up is not None:
            await self._up.close()


def _failure(ledger: Ledger, key: str, run: str) -> Exception | None:
    """What became of a request in this run, where it failed."""
    with ledger.outside():
        sql = "SELECT failed, said FROM queue WHERE key = ? AND run = ? AND failed != ''"
        row = ledger.db.execute(sql, (key, run)).fetchone()
    return None if row is None else Fault(row[0], row[1]).error(1)


def _write_failure(
    ledger: Ledger, request: Request, run: str, spec: VLLMSpec, error: RowError
) -> None:
    """Keep a failure where those of batches are kept: in the queue, among what is not sent."""
    path = "/v1/chat/completions" if request.is_chat else "/v1/completions"
    whose = (spec.resolved_identity(), spec.model, path, request.draw, request.text)
    place = (request.step, request.depth, run, time.time(), "", 0, error.reason, error.detail)
    with ledger.transaction():
        ledger.db.execute(
            "INSERT OR REPLACE INTO queue VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (request.key, *whose, *place),
        )
