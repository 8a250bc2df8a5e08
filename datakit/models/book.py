"""The book that a run keeps: answers and attempts on their way into the ledger, and its counts.

What arrives within a few milliseconds is written in one transaction, and nobody gets an answer
before it is written: thousands of durable answers a second for the price of hundreds of commits.
"""

import asyncio
import time
from collections import Counter, defaultdict

from datakit.models.budget import Allowance, charge
from datakit.models.chat import Reply, Request
from datakit.models.ledger import Answer, Attempt, Ledger

_GATHER_S = 0.01
"""How long answers are gathered before they are written together."""


class Meter:
    """Counts of one run, for progress and the end.

    usd counts what was paid, wasted_usd the part of it that went into failed attempts (estimated:
    a reply that is cut has no bill), saved_usd what the replayed answers would have cost;
    is_priced is False where a model that was asked has no known price. By step and role: `known`
    counts the answers that were replayed, `outstanding` the requests, and their characters, that a
    plan would send.
    """

    def __init__(self) -> None:
        self.sent = 0
        self.replayed = 0
        self.failed = 0
        self.input_tokens = 0
        self.output_tokens = 0
        self.usd = 0.0
        self.wasted_usd = 0.0
        self.saved_usd = 0.0
        self.is_priced = True
        self.known: Counter[tuple[str, str]] = Counter()
        self.outstanding: dict[tuple[str, str], tuple[int, int]] = {}


class Book:
    """Writes for one session of a run; of one event loop.

    recipe and run name what the attempts are charged to.
    """

    def __init__(
        self, ledger: Ledger, meter: Meter, recipe: str, run: str, allowance: Allowance | None
    ) -> None:
        self.ledger = ledger
        self.meter = meter
        self.allowance = allowance
        self._recipe = recipe
        self._run = run
        self._answers: list[Answer] = []
        self._attempts: list[Attempt] = []
        self._writers: list[asyncio.Future[bool]] = []
        self._timer: asyncio.TimerHandle | None = None
        self.under_way: dict[str, asyncio.Future[Reply]] = {}
        self._replayed: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0, 0, 0.0])

    def replayed(self, model: str, role: str, step: str, reply: Reply, usd: float) -> None:
        """Count an answer that was known, and what it would have cost."""
        self.meter.replayed += 1
        self.meter.saved_usd += usd
        self.meter.known[step, role] += 1
        sums = self._replayed[step, model]
        sums[0] += 1
        sums[1] += reply.input_tokens
        sums[2] += reply.output_tokens
        sums[3] += usd

    async def write(
        self, model: str, request: Request, reply: Reply, used: tuple[int, int], usd: float
    ) -> Reply:
        """Write an answer down and return the one that stands: the first written.

        used: input and output tokens that are charged.
        """
        meter = self.meter
        meter.sent += 1
        meter.input_tokens += used[0]
        meter.output_tokens += used[1]
        meter.usd += usd
        self._answers.append(Answer(request.key, model, request.draw, request.text, reply))
        self._attempt(model, request, "ok", *used, usd)
        written: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._writers.append(written)
        if await written:
            return reply
        standing = self.ledger.get(request.key)
        assert standing is not None
        return standing

    def failed(
        self, model: str, request: Request, outcome: str, tokens: tuple[int, int], usd: float
    ) -> None:
        """Note a failed attempt, and what it is thought to have cost."""
        self.meter.failed += 1
        self.meter.usd += usd
        self.meter.wasted_usd += usd
        self._attempt(model, request, outcome, *tokens, usd)

    def flush(self) -> Exception | None:
        """Write all that waits; whoever waits for it goes on, or gets the error, which is given.

        What could not be written waits for the next time, at the latest for the end of the run.
        """
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        answers, attempts, writers = self._answers, self._attempts, self._writers
        self._answers, self._attempts, self._writers = [], [], []
        try:
            with self.ledger.transaction():
                all_new = self.ledger.put(answers) == len(answers)
                self._write(attempts)
        except Exception as error:
            self._answers, self._attempts = answers + self._answers, attempts + self._attempts
            for writer in writers:
                if not writer.done():
                    writer.set_exception(error)
            return error
        for writer in writers:
            if not writer.done():
                writer.set_result(all_new)
        return None

    def close(self) -> None:
        """Write the rest, and what replaying saved."""
        for (step, model), (count, tokens_in, tokens_out, usd) in self._replayed.items():
            whole = int(count), int(tokens_in), int(tokens_out)
            self._attempts.append(
                Attempt(
                    time.time(), self._run, self._recipe, step, model, "", "replayed", *whole, usd
                )
            )
        self._replayed.clear()
        if self._answers or self._attempts:
            error = self.flush()
            if error is not None:
                raise error
        if self.allowance is not None:
            self.allowance.close()

    def _attempt(
        self,
        model: str,
        request: Request,
        outcome: str,
        input_tokens: int,
        output_tokens: int,
        usd: float,
    ) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_GATHER_S, self.flush)
        self._attempts.append(
            Attempt(
                time.time(),
                self._run,
                self._recipe,
                request.step,
                model,
                request.key,
                outcome,
                1,
                input_tokens,
                output_tokens,
                usd,
            )
        )

    def _write(self, attempts: list[Attempt]) -> None:
        if not attempts:
            return
        self.ledger.db.executemany(
            "INSERT INTO attempts VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", attempts
        )
        charge(self.ledger, attempts)
        if self.allowance is not None:
            paid = [one for one in attempts if one.outcome != "replayed"]
            self.allowance.written(
                sum(one.usd for one in paid),
                sum(one.input_tokens + one.output_tokens for one in paid),
            )
