"""Texts to unit vectors, each distinct text once: embedders and the vector cache."""

import hashlib
import importlib
import re
import sqlite3
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from datakit.errors import InputError, MissingExtra, OutsideError
from datakit.models.specs import PACKAGED_MODEL, EmbedSpec, HashingSpec, SentenceTransformersSpec
from datakit.text import normalise

Vectors = NDArray[np.float32]

_WORD = re.compile(r"\w+")


class Embedder(Protocol):
    """`encode` gives float32 [n, d] of unit length, row i for text i."""

    @property
    def identity(self) -> str: ...

    def encode(self, texts: Sequence[str]) -> Vectors: ...


class Hashing:
    """Words and character trigrams hashed into `dimensions` buckets; no model."""

    def __init__(self, spec: HashingSpec) -> None:
        self._size = spec.dimensions
        self.identity = f"hashing-{spec.dimensions}"

    def encode(self, texts: Sequence[str]) -> Vectors:
        vectors = np.zeros((len(texts), self._size), np.float32)
        for row, text in enumerate(texts):
            folded = normalise(text)
            padded = f" {folded} "
            grams = _WORD.findall(folded) + [padded[i : i + 3] for i in range(len(padded) - 2)]
            for gram in grams:
                vectors[row, zlib.crc32(gram.encode()) % self._size] += 1
        return _unit(vectors)


class SentenceTransformers:
    """A sentence-transformers model, loaded with the first text."""

    def __init__(self, spec: SentenceTransformersSpec) -> None:
        self._spec = spec
        self._model: Any = None
        self.identity = spec.resolved_identity()
        if spec.max_tokens is not None:
            self.identity += f"/{spec.max_tokens}"

    def encode(self, texts: Sequence[str]) -> Vectors:
        if self._model is None:
            self._model = self._load()
        vectors = self._model.encode(
            list(texts),
            batch_size=self._spec.batch_size,
            normalize_embeddings=True,
            convert_to_numpy=True,
            show_progress_bar=False,
        )
        return _unit(np.asarray(vectors, np.float32))

    def _load(self) -> Any:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise MissingExtra(
                "embedding needs sentence-transformers; pip install 'datakit[embed]'"
            ) from error
        name = self._spec.model
        if name == "packaged":
            name = str(importlib.import_module(PACKAGED_MODEL).get_model_path())
        try:
            _silence_loading()
            model = SentenceTransformer(
                name, revision=self._spec.revision or None, device=self._spec.device
            )
        except (OSError, ValueError) as error:
            raise OutsideError(f"cannot load the embedder {name!r}: {error}") from error
        if self._spec.max_tokens is not None:
            model.max_seq_length = self._spec.max_tokens
        return model


def _silence_loading() -> None:
    """Keep the loader's own progress bar out of ours."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def open_embedder(spec: EmbedSpec) -> Embedder:
    """The embedder of a spec; nothing is loaded yet."""
    match spec:
        case HashingSpec():
            return Hashing(spec)
        case SentenceTransformersSpec():
            return SentenceTransformers(spec)
        case _:
            raise InputError(f"model {spec.model!r} answers requests, it does not embed")


class CachedEmbedder:
    """An embedder that never embeds a text twice: vectors by text hash in `vectors.sqlite`."""

    def __init__(self, inner: Embedder, folder: Path) -> None:
        self._inner = inner
        self.identity = inner.identity
        path = folder / "vectors.sqlite"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, timeout=60, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS vectors (embedder TEXT, text BLOB, vector BLOB, "
                "PRIMARY KEY (embedder, text)) WITHOUT ROWID"
            )
        except (sqlite3.Error, OSError) as error:
            raise OutsideError(f"cannot open the vectors {str(path)!r}: {error}") from error

    def encode(self, texts: Sequence[str]) -> Vectors:
        """float32 [n, d], unit length."""
        try:
            return self._encoded(texts)
        except sqlite3.Error as error:
            raise OutsideError(f"the vector cache cannot be used: {error}") from error

    def _encoded(self, texts: Sequence[str]) -> Vectors:
        keys = [hashlib.blake2b(text.encode(), digest_size=16).digest() for text in texts]
        known = self._known(set(keys))
        missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in known}
        if missing:
            fresh = self._inner.encode(list(missing.values()))
            known |= dict(zip(missing, fresh, strict=True))
            rows = [
                (self.identity, key, vector.tobytes())
                for key, vector in zip(missing, fresh, strict=True)
            ]
            self._db.execute("BEGIN IMMEDIATE")
            self._db.executemany("INSERT OR IGNORE INTO vectors VALUES (?, ?, ?)", rows)
            self._db.execute("COMMIT")
        if not keys:
            return np.zeros((0, 1), np.float32)
        return np.stack([known[key] for key in keys])

    def _known(self, keys: set[bytes]) -> dict[bytes, NDArray[np.float32]]:
        found: dict[bytes, NDArray[np.float32]] = {}
        ordered = sorted(keys)
        for start in range(0, len(ordered), 500):
            some = ordered[start : start + 500]
            marks = ",".join("?" * len(some))
            sql = f"SELECT text, vector FROM vectors WHERE embedder = ? AND text IN ({marks})"  # noqa: S608
            for key, blob in self._db.execute(sql, [self.identity, *some]):
                found[key] = np.frombuffer(blob, np.float32)
        return found

    def close(self) -> None:
        """Close the cache."""
        self._db.close()


def _unit(vectors: Vectors) -> Vectors:
    """Rows scaled to length one; a zero row stays zero."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > 0)
