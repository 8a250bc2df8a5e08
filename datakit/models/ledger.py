"""The ledger: every answer that was paid for, in SQLite, found again by what was asked.

The key is a hash of the final single-draw request, the model's identity and the draw number, so
asking for 8 draws where 5 are known sends 3, and neither a new parser nor a new address asks
again. An answer is written before it is used. Of two processes that ask the same at once, the
first written answer counts for both.
"""

import asyncio
import contextlib
import json
import sqlite3
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from datakit.errors import EndpointError, InputError, NotRecorded, OutsideError
from datakit.models.chat import Ask, ChatModel, ChatSpec, Reply, wire_request
from datakit.text import canonical_json, digest, shorten
from datakit.values import Value

_TABLE = """
CREATE TABLE IF NOT EXISTS answers (
    key TEXT PRIMARY KEY, model TEXT NOT NULL, draw INTEGER NOT NULL, request TEXT NOT NULL,
    reply TEXT NOT NULL, input_tokens INTEGER NOT NULL, output_tokens INTEGER NOT NULL,
    written REAL NOT NULL
) WITHOUT ROWID
"""


class Entry(Value):
    """One line of an export: what was asked of whom, and the answer."""

    model: str
    draw: int = 0
    request: dict[str, Any]
    reply: Reply

    @property
    def key(self) -> str:
        """Where the ledger keeps this answer."""
        return answer_key(self.model, self.request, self.draw)


def answer_key(model: str, request: dict[str, Any], draw: int) -> str:
    """Hash of the final request, the model's identity and the draw number."""
    return digest([model, draw, request])


class Ledger:
    """Answers in `<folder>/ledger.sqlite`; safe for many processes, one thread each."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "ledger.sqlite"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(self.path, timeout=60, isolation_level=None)
            # WAL and synchronous=normal: 21,000 durable-against-kill writes/s instead of 300.
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.execute(_TABLE)
        except (sqlite3.Error, OSError) as error:
            raise OutsideError(
                f"cannot open the ledger {str(self.path)!r}: {error}; choose another --state folder"
            ) from error

    def get(self, key: str) -> Reply | None:
        """The answer under `key`, or None."""
        with self._outside():
            row = self._db.execute("SELECT reply FROM answers WHERE key = ?", (key,)).fetchone()
        return Reply.model_validate_json(row[0]) if row else None

    def put(self, entry: Entry) -> Reply:
        """Write an answer and return the one that stands: the first written."""
        key = entry.key
        reply = entry.reply
        row = (
            key,
            entry.model,
            entry.draw,
            canonical_json(entry.request),
            reply.model_dump_json(),
            reply.input_tokens,
            reply.output_tokens,
            time.time(),
        )
        with self._outside():
            cursor = self._db.execute(
                "INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row
            )
        standing = reply if cursor.rowcount else self.get(key)
        assert standing is not None
        return standing

    @contextlib.contextmanager
    def _outside(self) -> Generator[None]:
        """A lock that does not end, or a full disk, is no bug of a step."""
        try:
            yield
        except sqlite3.Error as error:
            raise OutsideError(
                f"the ledger {str(self.path)!r} cannot be used: {error}; free it (another import, "
                "a full disk) and run the same command again"
            ) from error

    def entries(self, model: str | None = None) -> Iterator[Entry]:
        """Every answer in key order, of one model identity where named."""
        where, values = ("WHERE model = ?", (model,)) if model else ("", ())
        sql = f"SELECT model, draw, request, reply FROM answers {where} ORDER BY key"  # noqa: S608
        for name, draw, request, reply in self._db.execute(sql, values):
            yield Entry(
                model=name,
                draw=draw,
                request=json.loads(request),
                reply=Reply.model_validate_json(reply),
            )

    def stats(self) -> list[dict[str, Any]]:
        """Answers and tokens for each model identity."""
        sql = (
            "SELECT model, COUNT(*), SUM(input_tokens), SUM(output_tokens) "
            "FROM answers GROUP BY model ORDER BY model"
        )
        names = ("model", "answers", "input_tokens", "output_tokens")
        return [dict(zip(names, row, strict=True)) for row in self._db.execute(sql)]

    def export(self, path: Path, model: str | None = None) -> int:
        """Write the answers to a JSONL file; returns how many."""
        count = 0
        with path.open("w", encoding="utf-8") as file:
            for entry in self.entries(model):
                file.write(canonical_json(entry.model_dump(mode="json")) + "\n")
                count += 1
        return count

    def load(self, path: Path) -> tuple[int, int]:
        """Read a JSONL export, all or nothing; returns (answers in the file, new ones).

        Raises InputError that names the file and the line of the first bad entry.
        """
        try:
            file = path.open("rb")
        except OSError as error:
            raise InputError(f"cannot read the ledger export {str(path)!r}: {error}") from error
        before = self._db.total_changes
        count = 0
        with file:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                for number, line in enumerate(file, start=1):
                    if not line.strip():
                        continue
                    try:
                        self.put(Entry.model_validate_json(line))
                    except ValueError as error:
                        first = (
                            error.errors()[0]["msg"]
                            if isinstance(error, ValidationError)
                            else error
                        )
                        shown = shorten(line.decode(errors="replace"), 80)
                        raise InputError(
                            f"{path}, line {number}: not a ledger entry: {first}; {shown!r}"
                        ) from error
                    count += 1
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")
        return count, self._db.total_changes - before

    def close(self) -> None:
        """Close the database."""
        self._db.close()

    @classmethod
    def opened(cls, folder: Path) -> "closing[Ledger]":
        """A ledger that is closed at the end of a `with`."""
        return closing(cls(folder))


class Meter:
    """Counts of one run, for progress and the manifest."""

    def __init__(self) -> None:
        self.sent = 0
        self.replayed = 0
        self.failed = 0
        self.input_tokens = 0
        self.output_tokens = 0

    def paid(self, reply: Reply) -> None:
        """Count an answer that came over the wire."""
        self.sent += 1
        self.input_tokens += reply.input_tokens
        self.output_tokens += reply.output_tokens


class Ledgered:
    """A chat model whose answers are looked up first and written down before they are used.

    Equal requests that are under way at the same time are sent once. With `offline`, a request
    that the ledger does not know raises NotRecorded, which stops the run.
    """

    def __init__(
        self, inner: ChatModel, spec: ChatSpec, ledger: Ledger, meter: Meter, offline: bool
    ) -> None:
        self.identity = inner.identity
        self._inner = inner
        self._spec = spec
        self._ledger = ledger
        self._meter = meter
        self._offline = offline
        self._under_way: dict[str, asyncio.Future[Reply]] = {}
        self._window = asyncio.Semaphore(spec.max_in_flight)
        self._first = asyncio.Lock()
        self._tried = False
        self._refusal: EndpointError | None = None

    async def answer(self, ask: Ask) -> Reply:
        request = wire_request(self._spec, ask)
        key = answer_key(self.identity, request, ask.draw)
        known = self._ledger.get(key)
        if known is not None:
            self._meter.replayed += 1
            return known
        if self._offline:
            raise NotRecorded(
                f"no recorded answer of {self.identity!r} to {_last_words(request)!r}, and "
                "nothing may be sent (offline, or a model without base_url); run without "
                "--offline, give the model a base_url, or import the answers with "
                "`datakit ledger import`"
            )
        while key in self._under_way:
            other = self._under_way[key]
            await asyncio.wait([other])
            # Who asked first may have been cancelled: then it is for one of those who wait to ask.
            if not other.cancelled():
                return other.result()
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._under_way[key] = future
        try:
            reply = await self._send(ask)
            self._meter.paid(reply)
            entry = Entry(model=self.identity, draw=ask.draw, request=request, reply=reply)
            standing = self._ledger.put(entry)
            future.set_result(standing)
            return standing
        except asyncio.CancelledError:
            future.cancel()
            raise
        except BaseException as error:
            future.set_exception(error)
            future.exception()  # seen: whoever waits gets it, nobody waiting is no warning
            raise
        finally:
            del self._under_way[key]

    async def _send(self, ask: Ask) -> Reply:
        """The first request goes alone, so that a wrong key costs one call and not a window."""
        if not self._tried:
            async with self._first:
                if self._refusal is not None:
                    raise self._refusal
                if not self._tried:
                    try:
                        return await self._inner.answer(ask)
                    except EndpointError as error:
                        self._refusal = error
                        raise
                    finally:
                        self._tried = self._refusal is None
        async with self._window:
            return await self._inner.answer(ask)

    async def close(self) -> None:
        await self._inner.close()


def _last_words(request: dict[str, Any]) -> str:
    if "prompt" in request:
        return shorten(str(request["prompt"])[-80:], 80)
    return shorten(request["messages"][-1]["content"], 80)
