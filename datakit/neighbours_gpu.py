"""Candidates for neighbours by half-precision products in torch, on a GPU (or a CPU, in tests).

Half precision only proposes: a pair is a candidate where its half-precision product comes within
`margin` of the floor, and whoever asked decides by the exact float32 sum. So the pairs are those
of the CPU, to the last bit.
"""

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from datakit.errors import InputError, MissingExtra
from datakit.models.embed import Vectors

Ints = NDArray[np.int64]
Device = Literal["cpu", "cuda", "auto"]
"""auto: the GPU where torch sees one, else the CPU. The pairs are the same."""


def accelerator(device: Device) -> str:
    """Where torch is to compute: `cuda`, or an empty string for numpy on the CPU.

    Raises MissingExtra or InputError where `cuda` is asked for and there is none.
    """
    if device == "cpu":
        return ""
    try:
        import torch
    except ImportError as error:
        if device == "cuda":
            raise MissingExtra(
                "device cuda needs torch; pip install 'datakit[embed]', or take auto or cpu"
            ) from error
        return ""
    if torch.cuda.is_available():
        return "cuda"
    if device == "cuda":
        raise InputError("device is cuda, but torch sees no GPU here; take auto or cpu")
    return ""


def margin(width: int) -> float:
    """How far a half-precision product of two rows of unit length may lie from the exact one.

    Each number is rounded to 11 bits (2^-11 of it; 2^-25 where it is subnormal), for both rows:
    by Cauchy and Schwarz at most 2 * 2^-11 in the sum, and 2 * 2^-25 √d. Tensor cores add in
    float32 but may truncate: d * 2^-23. The result is rounded to half again: 2^-11.
    """
    return 3.01 * 2**-11 + 2 * width**0.5 * 2**-25 + width * 2**-23


def candidates(
    vectors: Vectors,
    others: Vectors | None,
    floor: float,
    device: str,
    block: int = 4096,
) -> Iterator[tuple[Ints, Ints]]:
    """Row numbers of all pairs whose cosine may be `floor` or more; i < j where others is None.

    Device memory: both sets in half precision, and block x 4 block halves and marks.
    """
    import torch

    def halves(rows: Vectors) -> Any:
        # torch warns of memory that it might write to, though nothing here does.
        rows = rows if rows.flags.writeable else rows.copy()
        return torch.from_numpy(rows).to(device=device, dtype=torch.float16)

    left = halves(vectors)
    right = left if others is None else halves(others)
    # Rounded down, since the product is compared in half precision.
    least = float(np.nextafter(np.float16(floor - margin(vectors.shape[1])), np.float16(-np.inf)))
    for start in range(0, len(left), block):
        for column in range(start if others is None else 0, len(right), 4 * block):
            with _adding_in_float32():
                product = left[start : start + block] @ right[column : column + 4 * block].T
            found: Any = torch.nonzero(product >= least)
            first, second = found[:, 0] + start, found[:, 1] + column
            if others is None:
                above = first < second
                first, second = first[above], second[above]
            yield first.cpu().numpy(), second.cpu().numpy()


@contextmanager
def _adding_in_float32() -> Generator[None]:
    """Otherwise a GPU may also add in half precision, which `margin` does not cover."""
    import torch

    matmul = torch.backends.cuda.matmul
    before = matmul.allow_fp16_reduced_precision_reduction
    matmul.allow_fp16_reduced_precision_reduction = False
    try:
        yield
    finally:
        matmul.allow_fp16_reduced_precision_reduction = before
