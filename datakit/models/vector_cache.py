"""The vector cache: each distinct text embedded once ever, by model, in `vectors.sqlite`.

A vector is kept by the 16-byte hash of its text and by its embedder's identity. The identity says
all that changes a vector: the model, where it cuts texts, and the arithmetic where that is not
float32. So vectors of two precisions never mix, and the device is no part of it.
"""

import fcntl
import hashlib
import os
import sqlite3
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from datakit.errors import InputError, OutsideError

Vectors = NDArray[np.float32]
Rows = NDArray[np.int64]
Progress = Callable[[int, int], None]
"""Hears (texts embedded so far, texts to embed) of one call."""

_FIRST_CHUNK = 64
_MOST_IN_CHUNK = 65_536
_CHUNK_S = (2.0, 8.0)
"""A chunk that took less is doubled, one that took more is halved: a kill loses seconds."""
_LOOKUP = 65_536
_FETCH = 4_096

_TABLES = """
CREATE TABLE IF NOT EXISTS embedder (
    id INTEGER PRIMARY KEY, identity TEXT UNIQUE NOT NULL, width INTEGER NOT NULL,
    dtype TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS embedding (
    id INTEGER PRIMARY KEY, embedder INTEGER NOT NULL, text BLOB NOT NULL, vector BLOB NOT NULL
);
CREATE UNIQUE INDEX IF NOT EXISTS embedding_of_text ON embedding (embedder, text)
"""
# Rows in order of arrival and a small index: vectors inside an index ordered by hash took three
# times the room and nine times the time to write.


class Embedder(Protocol):
    """`encode` gives float32 [n, d] of unit length, row i for text i."""

    @property
    def identity(self) -> str: ...

    def encode(self, texts: Sequence[str]) -> Vectors: ...


class _Known(NamedTuple):
    """An embedder that has vectors here: its number, and how they are written."""

    id: int
    width: int
    dtype: str


class CachedEmbedder:
    """An embedder that never embeds a text twice, by whatever process it was embedded.

    Vectors are written chunk by chunk as they are made. Processes that share the folder take turns
    by chunk and look again before each, so that none repeats what another has just done. progress:
    told before the first chunk and after each. Raises OutsideError where the file cannot be used.
    """

    def __init__(self, inner: Embedder, folder: Path, progress: Progress | None = None) -> None:
        self._inner = inner
        self._progress = progress or _unheard
        self.identity = inner.identity
        # Half precision has no more to keep than two bytes hold.
        self._dtype = str(getattr(inner, "stored_as", "float32"))
        self._lock = folder / f"vectors-{_hash(self.identity).hex()[:12]}.lock"
        path = folder / "vectors.sqlite"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, timeout=60, isolation_level=None)
            self._db.execute("PRAGMA page_size=16384")
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            # The index of a million texts stays in memory, and is not rewritten every 16 MB.
            self._db.execute("PRAGMA cache_size=-65536")
            self._db.execute("PRAGMA wal_autocheckpoint=8192")
            self._make_tables()
            self._db.execute("CREATE TEMP TABLE wanted (row INTEGER PRIMARY KEY, text BLOB)")
        except (sqlite3.Error, OSError) as error:
            raise OutsideError(f"cannot open the vectors {str(path)!r}: {error}") from error

    def encode(self, texts: Sequence[str]) -> Vectors:
        """float32 [n, d], unit length."""
        if not texts:
            return np.zeros((0, 1), np.float32)
        try:
            return self._encoded(texts)
        except sqlite3.Error as error:
            raise OutsideError(f"the vector cache cannot be used: {error}") from error

    def close(self) -> None:
        """Close the cache."""
        self._db.close()

    def _encoded(self, texts: Sequence[str]) -> Vectors:
        keys = [_hash(text) for text in texts]
        first = first_of_equals(keys)
        is_first = first == np.arange(len(keys))
        rows = np.flatnonzero(is_first)
        known = self._known()
        out = None if known is None else np.empty((len(keys), known.width), np.float32)
        if out is not None:
            rows = self._read(out, keys, rows)
        if rows.size:
            out = self._embedded(texts, keys, rows, out)
        assert out is not None
        copies = np.flatnonzero(~is_first)
        for start in range(0, len(copies), _LOOKUP):
            some = copies[start : start + _LOOKUP]
            out[some] = out[first[some]]
        return out

    def _embedded(
        self, texts: Sequence[str], keys: Sequence[bytes], rows: Rows, out: Vectors | None
    ) -> Vectors:
        """`out` with the vectors of `rows`, made chunk by chunk, the longest texts first."""
        lengths = np.fromiter((len(texts[row]) for row in rows), np.int64, len(rows))
        rows = rows[np.argsort(-lengths, kind="stable")]
        done, size = 0, _FIRST_CHUNK
        self._progress(0, len(rows))
        while done < len(rows):
            some: Rows = rows[done : done + size]
            with self._turn():
                began = time.monotonic()
                if out is None and (known := self._known()) is not None:
                    out = np.empty((len(keys), known.width), np.float32)
                left: Rows = some if out is None else self._read(out, keys, some)
                if left.size:
                    fresh = self._inner.encode([texts[int(row)] for row in left])
                    fresh = self._write([keys[row] for row in left], fresh)
                    if out is None:
                        out = np.empty((len(keys), fresh.shape[1]), np.float32)
                    out[left] = fresh
                took = time.monotonic() - began
            done += len(some)
            self._progress(done, len(rows))
            if took < _CHUNK_S[0]:
                size = min(2 * size, _MOST_IN_CHUNK)
            elif took > _CHUNK_S[1]:
                size = max(size // 2, 1)
        assert out is not None
        return out

    def _known(self) -> _Known | None:
        sql = "SELECT id, width, dtype FROM embedder WHERE identity = ?"
        found = self._db.execute(sql, [self.identity]).fetchone()
        return None if found is None else _Known(*found)

    def _read(self, out: Vectors, keys: Sequence[bytes], rows: Rows) -> Rows:
        """Fill `out` at those of `rows` that are known; gives those that are not, in order."""
        known = self._known()
        assert known is not None
        is_found = np.zeros(len(rows), np.bool_)
        for start in range(0, len(rows), _LOOKUP):
            some = rows[start : start + _LOOKUP]
            self._db.execute("BEGIN")
            try:
                wanted = ((place, keys[row]) for place, row in enumerate(some))
                self._db.executemany("INSERT INTO wanted VALUES (?, ?)", wanted)
                cursor = self._db.execute(
                    "SELECT w.row, e.vector FROM wanted w CROSS JOIN embedding e "
                    "ON e.embedder = ? AND e.text = w.text",
                    [known.id],
                )
                while found := cursor.fetchmany(_FETCH):
                    places = np.fromiter((place for place, _ in found), np.int64, len(found))
                    written = b"".join(vector for _, vector in found)
                    out[some[places]] = _from_bytes(written, known)
                    is_found[start + places] = True
            finally:
                self._undo()
        return rows[~is_found]

    def _write(self, keys: Sequence[bytes], fresh: Vectors) -> Vectors:
        """Keep the vectors; gives them as they will be read."""
        width = fresh.shape[1]
        self._db.execute("BEGIN IMMEDIATE")
        try:
            self._db.execute(
                "INSERT OR IGNORE INTO embedder (identity, width, dtype) VALUES (?, ?, ?)",
                [self.identity, width, self._dtype],
            )
            known = self._known()
            assert known is not None
            if known.width != width:
                raise InputError(
                    f"the embedder {self.identity!r} gives vectors of {width} numbers, and the "
                    f"cache has its vectors of {known.width}; the model was replaced behind its "
                    "name: give it another identity (models.<role>.identity or revision)"
                )
            kept = np.ascontiguousarray(fresh, known.dtype)
            self._db.executemany(
                "INSERT OR IGNORE INTO embedding (embedder, text, vector) VALUES (?, ?, ?)",
                ((known.id, key, row.tobytes()) for key, row in zip(keys, kept, strict=True)),
            )
            self._db.execute("COMMIT")
        finally:
            self._undo()
        return _from_bytes(kept.tobytes(), known)

    @contextmanager
    def _turn(self) -> Generator[None]:
        """Wait until no other process embeds with this model; a killed one holds up nobody."""
        held = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(held, fcntl.LOCK_EX)
            yield
        finally:
            os.close(held)

    def _undo(self) -> None:
        """End a transaction that was not committed."""
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")

    def _make_tables(self) -> None:
        if self._has("embedding_of_text") and not self._has("vectors"):
            return
        self._db.execute("BEGIN IMMEDIATE")
        try:
            for statement in _TABLES.split(";"):
                self._db.execute(statement)
            if self._has("vectors"):
                self._take_over()
            self._db.execute("COMMIT")
        finally:
            self._undo()

    def _has(self, name: str) -> bool:
        sql = "SELECT 1 FROM sqlite_master WHERE name = ?"
        return self._db.execute(sql, [name]).fetchone() is not None

    def _take_over(self) -> None:
        """Bring over the vectors of a file as 0.1 wrote it."""
        self._db.execute(
            "INSERT OR IGNORE INTO embedder (identity, width, dtype) "
            "SELECT embedder, max(length(vector)) / 4, 'float32' FROM vectors GROUP BY embedder"
        )
        self._db.execute(
            "INSERT OR IGNORE INTO embedding (embedder, text, vector) "
            "SELECT e.id, v.text, v.vector FROM vectors v JOIN embedder e "
            "ON e.identity = v.embedder AND length(v.vector) = 4 * e.width"
        )
        self._db.execute("DROP TABLE vectors")


def first_of_equals(keys: Sequence[bytes]) -> Rows:
    """int64 [n]: for each of these 16-byte keys, the place at which an equal one first stands."""
    halves: Any = np.frombuffer(b"".join(keys), ">u8").reshape(-1, 2).astype(np.uint64)
    order = np.lexsort((halves[:, 1], halves[:, 0]))  # stable: the first of equals stands first
    ranked = halves[order]
    is_new = np.ones(len(order), np.bool_)
    is_new[1:] = (ranked[1:] != ranked[:-1]).any(axis=1)
    first = np.empty(len(order), np.int64)
    first[order] = order[is_new][np.cumsum(is_new) - 1]
    return first


def unit(vectors: Vectors) -> Vectors:
    """Rows scaled to length one; a zero row stays zero."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > 0)


def _from_bytes(written: bytes, known: _Known) -> Vectors:
    """float32 [n, d] from rows as they are kept; what is kept in two bytes is scaled again."""
    kept = np.frombuffer(written, known.dtype).reshape(-1, known.width)
    return kept if kept.dtype == np.float32 else unit(kept.astype(np.float32))


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _unheard(done: int, of: int) -> None:
    del done, of
