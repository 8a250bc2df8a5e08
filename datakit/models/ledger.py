"""The ledger: every answer that was paid for, in SQLite, found again by what was asked.

The key is a hash of the final single-draw request, the model's identity and the draw number, so
asking for 8 draws where 5 are known sends 3, and neither a new parser nor a new address asks
again. An answer is written before it is used. Of two processes that ask the same at once, the
first written answer counts for both.

Beside the answers stand the attempts: what each request cost, the failed ones too, and what
answers that were known saved.
"""

import contextlib
import json
import sqlite3
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from datakit.errors import InputError, OutsideError
from datakit.models.chat import Reply, answer_key
from datakit.text import canonical_json, shorten
from datakit.values import Value

_TABLES = """
CREATE TABLE IF NOT EXISTS answers (
    key TEXT PRIMARY KEY, model TEXT NOT NULL, draw INTEGER NOT NULL, request TEXT NOT NULL,
    reply TEXT NOT NULL, input_tokens INTEGER NOT NULL, output_tokens INTEGER NOT NULL,
    written REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS attempts (
    at REAL NOT NULL, run TEXT NOT NULL, recipe TEXT NOT NULL, step TEXT NOT NULL,
    model TEXT NOT NULL, key TEXT NOT NULL, outcome TEXT NOT NULL, answers INTEGER NOT NULL,
    input_tokens INTEGER NOT NULL, output_tokens INTEGER NOT NULL, usd REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS spent (
    scope TEXT PRIMARY KEY, usd REAL NOT NULL, tokens INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS leases (
    owner TEXT NOT NULL, scope TEXT NOT NULL, pid INTEGER NOT NULL, usd REAL NOT NULL,
    tokens INTEGER NOT NULL, PRIMARY KEY (owner, scope)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS buckets (
    name TEXT PRIMARY KEY, level REAL NOT NULL, at REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS queue (
    key TEXT PRIMARY KEY, model TEXT NOT NULL, name TEXT NOT NULL, path TEXT NOT NULL,
    draw INTEGER NOT NULL, request TEXT NOT NULL, step TEXT NOT NULL, depth INTEGER NOT NULL,
    run TEXT NOT NULL, asked REAL NOT NULL, batch TEXT NOT NULL, tries INTEGER NOT NULL,
    failed TEXT NOT NULL, said TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS queue_by_batch ON queue (batch, model, run);
CREATE INDEX IF NOT EXISTS queue_by_run ON queue (run, model, failed);
CREATE TABLE IF NOT EXISTS batches (
    name TEXT PRIMARY KEY, id TEXT NOT NULL, file TEXT NOT NULL, url TEXT NOT NULL,
    model TEXT NOT NULL, path TEXT NOT NULL, recipe TEXT NOT NULL, run TEXT NOT NULL,
    worker INTEGER NOT NULL, requests INTEGER NOT NULL, made REAL NOT NULL,
    collected INTEGER NOT NULL
) WITHOUT ROWID;
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
        return answer_key(self.model, canonical_json(self.request), self.draw)


class Answer(NamedTuple):
    """An answer on its way into the ledger; `request` is canonical JSON."""

    key: str
    model: str
    draw: int
    request: str
    reply: Reply


class Attempt(NamedTuple):
    """One request that was sent, or so many `answers` that were known already.

    outcome: `ok`, `replayed`, or the kind of the failure. usd: what it cost, or would have cost.
    """

    at: float
    run: str
    recipe: str
    step: str
    model: str
    key: str
    outcome: str
    answers: int
    input_tokens: int
    output_tokens: int
    usd: float


class Ledger:
    """Answers in `<folder>/ledger.sqlite`; safe for many processes, one thread each."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "ledger.sqlite"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.db = sqlite3.connect(self.path, timeout=60, isolation_level=None)
            _prepare(self.db)
        except (sqlite3.Error, OSError) as error:
            raise OutsideError(
                f"cannot open the ledger {str(self.path)!r}: {error}; choose another --state folder"
            ) from error

    def get(self, key: str) -> Reply | None:
        """The answer under `key`, or None."""
        try:
            row = self.db.execute("SELECT reply FROM answers WHERE key = ?", (key,)).fetchone()
        except sqlite3.Error as error:
            raise self._unusable(error) from error
        return Reply.model_validate_json(row[0]) if row else None

    def put(self, answers: Sequence[Answer]) -> int:
        """Write answers, in the caller's transaction or one of its own; returns how many are new.

        The first written answer to a request stands.
        """
        now = time.time()
        rows = [
            (
                one.key,
                one.model,
                one.draw,
                one.request,
                one.reply.model_dump_json(),
                one.reply.input_tokens,
                one.reply.output_tokens,
                now,
            )
            for one in answers
        ]
        before = self.db.total_changes
        with self.transaction():
            self.db.executemany(
                "INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows
            )
        return self.db.total_changes - before

    @contextlib.contextmanager
    def transaction(self) -> Generator[None]:
        """All that is written inside, or nothing; joins one that is open already."""
        with self.outside():
            if self.db.in_transaction:
                yield
                return
            self.db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self.db.execute("COMMIT")
            except BaseException:
                # A full disk may have ended it already.
                if self.db.in_transaction:
                    self.db.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def outside(self) -> Generator[None]:
        """A lock that does not end, or a full disk, is no bug of a step."""
        try:
            yield
        except sqlite3.Error as error:
            raise self._unusable(error) from error

    def _unusable(self, error: sqlite3.Error) -> OutsideError:
        return OutsideError(
            f"the ledger {str(self.path)!r} cannot be used: {error}; free it (another import, "
            "a full disk) and run the same command again"
        )

    def entries(self, model: str | None = None) -> Iterator[Entry]:
        """Every answer in key order, of one model identity where named."""
        where, values = ("WHERE model = ?", (model,)) if model else ("", ())
        sql = f"SELECT model, draw, request, reply FROM answers {where} ORDER BY key"  # noqa: S608
        for row in self.db.execute(sql, values):
            yield _entry(row)

    def stats(self) -> list[dict[str, Any]]:
        """Answers and tokens for each model identity."""
        sql = (
            "SELECT model, COUNT(*), SUM(input_tokens), SUM(output_tokens) "
            "FROM answers GROUP BY model ORDER BY model"
        )
        names = ("model", "answers", "input_tokens", "output_tokens")
        return [dict(zip(names, row, strict=True)) for row in self.db.execute(sql)]

    def spending(self) -> list[dict[str, Any]]:
        """For each recipe and model: requests sent, dollars paid, wasted on failures, and saved."""
        sql = (
            "SELECT recipe, model, SUM(outcome != 'replayed'), "
            "SUM(CASE WHEN outcome != 'replayed' THEN usd ELSE 0 END), "
            "SUM(outcome NOT IN ('ok', 'replayed')), "
            "SUM(CASE WHEN outcome NOT IN ('ok', 'replayed') THEN usd ELSE 0 END), "
            "SUM(CASE WHEN outcome = 'replayed' THEN answers ELSE 0 END), "
            "SUM(CASE WHEN outcome = 'replayed' THEN usd ELSE 0 END) "
            "FROM attempts GROUP BY recipe, model ORDER BY recipe, model"
        )
        names = [
            "recipe",
            "model",
            "sent",
            "paid_usd",
            "failed",
            "wasted_usd",
            "replayed",
            "saved_usd",
        ]
        return [dict(zip(names, row, strict=True)) for row in self.db.execute(sql)]

    def newest(self, model: str | None, count: int) -> list[tuple[str, Entry, float]]:
        """Key, entry and time of the answers written last, newest first."""
        where, values = ("WHERE model = ?", (model,)) if model else ("", ())
        sql = (
            "SELECT key, model, draw, request, reply, written "  # noqa: S608
            f"FROM answers {where} ORDER BY written DESC, key LIMIT ?"
        )
        rows = self.db.execute(sql, (*values, count)).fetchall()
        return [(row[0], _entry(row[1:5]), row[5]) for row in rows]

    def find(self, prefix: str) -> tuple[str, Entry, list[Attempt]]:
        """The one answer whose key begins with `prefix`, and all attempts at it.

        Raises InputError where none or several do.
        """
        rows = self.db.execute(
            "SELECT key, model, draw, request, reply FROM answers "
            "WHERE key >= ? AND key < ? LIMIT 2",
            (prefix, f"{prefix}g"),
        ).fetchall()
        if len(rows) != 1:
            raise InputError(
                f"{'no answer has' if not rows else 'several answers have'} a key that begins "
                f"with {prefix!r} in {str(self.path)!r}; see `datakit ledger list`"
            )
        key = rows[0][0]
        tries = self.db.execute("SELECT * FROM attempts WHERE key = ? ORDER BY at", (key,))
        return key, _entry(rows[0][1:]), [Attempt(*row) for row in tries]

    def prune(self, model: str | None, before: float | None, unusable: bool, really: bool) -> int:
        """Forget answers that meet every condition given; returns how many do.

        before: written before this time (seconds since 1970). unusable: empty, cut by their
        length, or filtered. Without `really` nothing is removed.
        """
        is_unusable = (
            "(json_extract(reply, '$.finish_reason') IN ('length', 'content_filter') "
            "OR trim(json_extract(reply, '$.text')) = '') AND ?"
        )
        asked: list[tuple[str, object]] = [
            ("model = ?", model),
            ("written < ?", before),
            (is_unusable, unusable or None),
        ]
        where = " AND ".join(sql for sql, value in asked if value is not None)
        values = [value for _, value in asked if value is not None]
        if not where:
            raise InputError("name what to prune: --model, --before or --unusable")
        sql = f"FROM answers WHERE {where}"
        count: int = self.db.execute(f"SELECT COUNT(*) {sql}", values).fetchone()[0]
        if really:
            with self.transaction():
                self.db.execute(f"DELETE {sql}", values)
        return count

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
        count = new = 0
        with file, self.transaction():
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    answer = answer_of(Entry.model_validate_json(line))
                except ValueError as error:
                    first = (
                        error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
                    )
                    shown = shorten(line.decode(errors="replace"), 80)
                    raise InputError(
                        f"{path}, line {number}: not a ledger entry: {first}; {shown!r}"
                    ) from error
                new += self.put([answer])
                count += 1
        return count, new

    def close(self) -> None:
        """Close the database."""
        self.db.close()

    @classmethod
    def opened(cls, folder: Path) -> "closing[Ledger]":
        """A ledger that is closed at the end of a `with`."""
        return closing(cls(folder))


def _prepare(db: sqlite3.Connection) -> None:
    """Make the tables. Who comes to a new file at the same time waits his turn.

    SQLite does not wait for a lock, whatever the timeout, where the journal's mode is changed.
    """
    until = time.monotonic() + 60
    while True:
        try:
            # WAL and synchronous=normal: 21,000 durable-against-kill writes/s instead of 300.
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=NORMAL")
            # Each checkpoint waits for the disk, and all answers with it: one for some 64 MB.
            db.execute("PRAGMA wal_autocheckpoint=16000")
            db.executescript(_TABLES)
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > until:
                raise
            time.sleep(0.02)


def _entry(row: Sequence[Any]) -> Entry:
    """The entry in a row of (model, draw, request, reply)."""
    model, draw, request, reply = row
    return Entry(
        model=model,
        draw=draw,
        request=json.loads(request),
        reply=Reply.model_validate_json(reply),
    )


def answer_of(entry: Entry) -> Answer:
    """The answer of an exported entry, ready to be written."""
    return Answer(entry.key, entry.model, entry.draw, canonical_json(entry.request), entry.reply)
