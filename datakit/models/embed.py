"""Texts to unit vectors: the embedders. `CachedEmbedder` keeps what they give."""

import importlib
import re
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from datakit.errors import InputError, MissingExtra, OutsideError
from datakit.models.devices import Replica, devices_for, encode_over, replicas
from datakit.models.specs import PACKAGED_MODEL, EmbedSpec, HashingSpec, SentenceTransformersSpec
from datakit.models.vector_cache import CachedEmbedder, Embedder, Vectors, unit
from datakit.text import normalise

__all__ = [
    "CachedEmbedder",
    "Embedder",
    "Hashing",
    "SentenceTransformers",
    "Vectors",
    "open_embedder",
]

_WORD = re.compile(r"\w+")


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
        return unit(vectors)


class SentenceTransformers:
    """A sentence-transformers model, loaded with the first text, on every device of its spec."""

    def __init__(self, spec: SentenceTransformersSpec) -> None:
        self._spec = spec
        self._models: list[Replica] = []
        self._precision = spec.resolved_precision()
        self.stored_as = "float32" if self._precision == "float32" else "float16"
        self.identity = spec.resolved_identity()
        if spec.max_tokens is not None:
            self.identity += f"/{spec.max_tokens}"
        if self._precision != "float32":
            self.identity += f"+{self._precision}"

    def encode(self, texts: Sequence[str]) -> Vectors:
        """float32 [n, d]; raises InputError where the precision does not hold the numbers."""
        if not self._models:
            self._models = self._load()
        vectors = encode_over(self._models, texts or [""])[: len(texts)]
        if not np.isfinite(vectors).all():
            raise InputError(
                f"in {self._precision} the embedder {self.identity!r} gives vectors that are not "
                "numbers; set its precision to bfloat16 or float32"
            )
        return unit(vectors)

    def _load(self) -> list[Replica]:
        spec = self._spec
        try:
            import torch
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise MissingExtra(
                "embedding needs sentence-transformers; pip install 'datakit[embed]'"
            ) from error
        is_half_by_itself = spec.precision == "auto" and self._precision != "float32"
        devices = devices_for(spec.devices, is_half_by_itself)
        name = spec.model
        if name == "packaged":
            name = str(importlib.import_module(PACKAGED_MODEL).get_model_path())
        try:
            _silence_loading()
            # On the CPU first: no GPU then holds it in a precision or a number that it need not.
            model: Any = SentenceTransformer(name, revision=spec.revision or None, device="cpu")
        except (OSError, ValueError) as error:
            raise OutsideError(f"cannot load the embedder {name!r}: {error}") from error
        model = model.to(getattr(torch, self._precision)).eval()
        if spec.max_tokens is not None:
            model.max_seq_length = spec.max_tokens
        return replicas(model, devices, None if spec.batch_size == "auto" else spec.batch_size)


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
