"""Ids in little room: twelve bytes side by side instead of 24 letters each.

A version may have more rows than memory has room for their texts, but what is compared over all of
them (ids, hashes) fits when it is packed. Packed ids sort as their letters do.
"""

from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from datakit.errors import BugError

ID_BYTES = 12

Ids = NDArray[np.bytes_]
"""Packed ids [n]. Take them out by `spelled` only: numpy cuts zero bytes off a single one."""

_TYPE = np.dtype(f"S{ID_BYTES}")


def packed(ids: Sequence[str]) -> Ids:
    """Ids, given as hex."""
    if any(len(one) != 2 * ID_BYTES for one in ids):
        raise BugError(f"an id is no hash of {ID_BYTES} bytes in hex")
    return np.frombuffer(bytes.fromhex("".join(ids)), _TYPE)


def spelled(ids: Ids) -> list[str]:
    """Packed ids as hex."""
    text, width = ids.tobytes().hex(), 2 * ID_BYTES
    return [text[start : start + width] for start in range(0, len(text), width)]


def joined(runs: Iterable[Ids]) -> Ids:
    """Runs of packed ids as one."""
    return np.concatenate(list(chain([packed([])], runs)))


def places(wanted: Ids, among: Ids) -> NDArray[np.int64]:
    """For each wanted id a place at which it stands in `among`; -1 where it does not."""
    if not len(among):
        return np.full(len(wanted), -1)
    order = np.argsort(among, kind="stable")
    nearest = np.searchsorted(among, wanted, sorter=order).clip(max=len(among) - 1)
    found = order[nearest]
    return np.where(among[found] == wanted, found, -1)
