"""A model on one or several devices: batches by tokens, halved when a GPU's memory runs out."""

import copy
import importlib.util
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datakit.errors import InputError, OutsideError

_CUDA_TOKENS = 65_536
_CPU_TOKENS = 1_024
"""Tokens of a batch, padding counted; measured in tests/benchmarks/bench_embed.py."""
_CUDA_BLOCK = 4_096
_CPU_BLOCK = 1_024
_BLOCK_CHARACTERS = 4_000_000
"""Texts, and their characters, that are made into tokens at once."""


def has_cuda() -> bool:
    """Whether this torch is built for CUDA and an NVIDIA GPU is visible; loads no torch."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None and listed.strip() in ("", "-1", "NoDevFiles"):
        return False
    if not any(Path("/dev").glob("nvidia[0-9]*")):
        return False
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        return False
    version = Path(torch.origin).with_name("version.py")
    lines = version.read_text().splitlines() if version.is_file() else []
    built = [line for line in lines if line.startswith("cuda")]
    return any("None" not in line.partition("=")[2] for line in built)


def devices_for(named: Sequence[str], needs_cuda: bool) -> tuple[str, ...]:
    """The devices to use: those that are named, else every CUDA GPU, else what torch has.

    needs_cuda: vectors are named as those of a GPU. Raises InputError for what is not there.
    """
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = f"torch {torch.__version__} finds {count or 'no'} CUDA GPU{'s' * (count != 1)}"
    for name in named:
        try:
            device = torch.device(name)
        except RuntimeError as error:
            raise InputError(f"device {name!r} is none that torch knows: {error}") from error
        if device.type == "cuda" and (device.index or 0) >= count:
            raise InputError(
                f"device {name!r} is asked for, and {found}; name another, or install a CUDA build "
                "of torch and its driver"
            )
    if named:
        return tuple(named)
    if count:
        return tuple(f"cuda:{number}" for number in range(count))
    if needs_cuda:
        raise InputError(
            f"this machine has an NVIDIA GPU, and {found}; mend the driver, or set `device: cpu` "
            "for the embedder"
        )
    from sentence_transformers.util import get_device_name

    return (str(get_device_name()),)


class Replica:
    """A sentence-transformers model on one device.

    batch_size: texts at a time; None goes by tokens. After running out of memory the half is tried,
    and kept.
    """

    def __init__(self, model: Any, device: str, batch_size: int | None) -> None:
        self.is_cuda = device.startswith("cuda")
        self.turn = threading.Lock()
        self._model = model.to(device)
        self._device = device
        self._texts = batch_size
        self._tokens = _CUDA_TOKENS if self.is_cuda else _CPU_TOKENS

    def tokens(self, texts: list[str]) -> dict[str, Any] | None:
        """The features of a block, or None for a model that takes its texts only whole."""
        model = self._model
        if not hasattr(model, "preprocess") or model.default_prompt_name or model.truncate_dim:
            return None
        features: dict[str, Any] = model.preprocess(texts)
        mask = features.get("attention_mask")
        arrays = [one for one in features.values() if hasattr(one, "shape")]
        # Tokens without padding between texts, or no tokens at all, cannot be cut into batches.
        if mask is None or mask.ndim != 2 or any(one.shape != mask.shape for one in arrays):
            return None
        return features if mask.shape[0] == len(texts) else None

    def vectors(self, texts: list[str], features: dict[str, Any] | None) -> NDArray[np.float32]:
        """float32 [n, d] of a block's texts; raises OutsideError where one text is too much."""
        if features is None:
            return self._whole(texts)
        import torch

        lengths = features["attention_mask"].sum(1)
        order = torch.argsort(lengths, descending=True, stable=True)
        made: list[Any] = []
        start = 0
        while start < len(order):
            longest = int(lengths[order[start]])
            rows = order[start : start + self._fitting(longest)]
            if (some := self._forward(features, rows)) is None:
                self._halve(len(rows), longest)
                continue
            made.append(some)
            start += len(rows)
        # Brought over once a block: until here the GPU is not waited for.
        ordered = torch.cat(made).float().cpu().numpy()
        vectors = np.empty_like(ordered)
        vectors[order.numpy()] = ordered
        return vectors

    def _fitting(self, longest: int) -> int:
        return self._texts or max(self._tokens // max(longest, 1), 1)

    def _halve(self, texts: int, longest: int) -> None:
        if texts == 1:
            said = f"one text of {longest} tokens" if longest else "one text"
            raise OutsideError(
                f"the memory of {self._device} does not hold {said}; free some of it, or lower "
                "max_tokens of the embedder"
            )
        if self._texts is None:
            self._tokens = texts * longest // 2
        else:
            self._texts = texts // 2

    def _forward(self, features: dict[str, Any], rows: Any) -> Any:
        """[n, d] on the device, or None where its memory ran out."""
        import torch

        columns = torch.nonzero(features["attention_mask"][rows].any(0)).flatten()
        used = slice(int(columns[0]), int(columns[-1]) + 1) if len(columns) else slice(0, 1)
        batch = {
            name: value[rows][:, used].to(self._device, non_blocking=True)
            if isinstance(value, torch.Tensor)
            else value
            for name, value in features.items()
        }
        try:
            with torch.inference_mode():
                return self._model(batch)["sentence_embedding"]
        except torch.cuda.OutOfMemoryError:
            pass
        # Outside the handler: the error's frames held the memory.
        del batch
        torch.cuda.empty_cache()
        return None

    def _whole(self, texts: list[str]) -> NDArray[np.float32]:
        """By the model's own loop, for models that need more than tokens and a mask."""
        import torch

        while True:
            size = self._texts or 32
            try:
                made = self._model.encode(
                    texts, batch_size=size, convert_to_tensor=True, show_progress_bar=False
                )
                return np.asarray(made.float().cpu().numpy(), np.float32)
            except torch.cuda.OutOfMemoryError:
                pass
            torch.cuda.empty_cache()
            self._texts = size
            self._halve(min(size, len(texts)), 0)


def replicas(model: Any, devices: Sequence[str], batch_size: int | None) -> list[Replica]:
    """A copy of the model on each device."""
    copies = [model, *(copy.deepcopy(model) for _ in devices[1:])]
    return [Replica(one, device, batch_size) for one, device in zip(copies, devices, strict=True)]


def encode_over(models: Sequence[Replica], texts: Sequence[str]) -> NDArray[np.float32]:
    """float32 [n, d]: blocks of texts, the longest first, go to whichever device is free.

    A GPU has two threads: one makes tokens while the other computes. Raises what they raise.
    """
    on_cuda = any(one.is_cuda for one in models)
    left = _blocks(texts, _CUDA_BLOCK if on_cuda else _CPU_BLOCK)
    out: list[NDArray[np.float32]] = []
    taking, stop = threading.Lock(), threading.Event()

    def work(model: Replica) -> None:
        while not stop.is_set():
            with taking:  # tokenizers are not safe to share between threads
                rows = next(left, None)
                if rows is None:
                    return
                some = [texts[int(row)] for row in rows]
                features = models[0].tokens(some)
            with model.turn:
                vectors = model.vectors(some, features)
            with taking:
                if not out:
                    out.append(np.empty((len(texts), vectors.shape[1]), np.float32))
                out[0][rows] = vectors

    workers = [model for model in models for _ in range(2 if model.is_cuda else 1)]
    if len(workers) == 1:
        work(workers[0])
        return out[0]
    with ThreadPoolExecutor(len(workers)) as pool:
        running = [pool.submit(work, model) for model in workers]
        try:
            for one in running:
                one.result()
        finally:
            stop.set()
    return out[0]


def _blocks(texts: Sequence[str], most: int) -> Iterator[NDArray[np.int64]]:
    """Rows by falling length, cut at `most` texts and at so many characters."""
    lengths = np.fromiter(map(len, texts), np.int64, len(texts))
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        fitting = max(_BLOCK_CHARACTERS // max(int(lengths[order[start]]), 1), 1)
        yield order[start : start + min(fitting, most)]
        start += min(fitting, most)
