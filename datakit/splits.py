"""Which split a row belongs to: decided by the cluster of its root prompt, once and for ever.

A root prompt is the source row at the start of a row's line; its cluster is every root that a
duplicate step joined it to, and every root with the same first user turn. A cluster has the split
of its oldest member in the version before; a new one goes by the hash of its first member. A
newcomer that touches two splits is dropped, so that neither split leaks into the other and no
published row ever moves.

All of this looks at every row at once, so ids are packed and splits are numbers (`Names`).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from datakit.clusters import components
from datakit.errors import InputError
from datakit.ids import Ids, joined, packed, places, spelled
from datakit.neighbours import Pairs
from datakit.text import digest
from datakit.values import SPLIT_NAME

ROOTS = pl.Schema({"root": pl.String(), "key": pl.String(), "split": pl.String()})
"""Every root that ever had a split: its id, the hash of its first user turn, the split."""

Codes = NDArray[np.int16]
"""Splits as numbers [n]; 0 is none."""

_BATCH = 10_000


class Names:
    """The splits that occur, as numbers in the order in which they came."""

    def __init__(self) -> None:
        self._known = {"": 0}

    def codes(self, names: Iterable[str]) -> Codes:
        """The numbers of splits."""
        known = self._known
        return np.array([known.setdefault(name, len(known)) for name in names], np.int16)

    def spelled(self, codes: Codes) -> list[str]:
        """The splits with these numbers."""
        names = list(self._known)
        return [names[code] for code in codes.tolist()]

    def __len__(self) -> int:
        return len(self._known)


@dataclass(frozen=True)
class Roots:
    """Roots with the hash of their first user turn and a split, all [n].

    The split is the one that they have, or for new ones the one that their source declares.
    """

    id: Ids
    key: Ids
    split: Codes

    def __getitem__(self, some: NDArray[np.bool_] | NDArray[np.int64]) -> "Roots":
        return Roots(self.id[some], self.key[some], self.split[some])

    @staticmethod
    def joined(runs: Iterable["Roots"]) -> "Roots":
        """Runs of roots as one; of equal ones the first stays."""
        found = list(runs)
        split = np.concatenate([np.zeros(0, np.int16), *(one.split for one in found)])
        both = Roots(joined(one.id for one in found), joined(one.key for one in found), split)
        first = np.unique(both.id, return_index=True)[1]
        return both[np.sort(first)]


@dataclass(frozen=True)
class Splits:
    """What was decided.

    roots: all that have a split, the version before included; rows: the split of each row, 0 for
    one that bridges two splits.
    """

    names: Names
    roots: Roots
    rows: Codes


def assign_splits(
    rows: Iterable[pl.Series],
    roots: Roots,
    duplicates: tuple[Ids, Ids],
    previous: Roots,
    names: Names,
    shares: Mapping[str, float],
    seed: int,
) -> Splits:
    """The split of every row.

    rows: the roots of each row (a list), part by part. roots: those of the source, in its order.
    duplicates: pairs of roots, on either side. previous: the roots of the version before. names:
    of the splits of both. shares: split to share, adding up to 1.
    """
    for name in names.spelled(np.unique(roots.split)):
        if name and not SPLIT_NAME.fullmatch(name):
            raise InputError(f"the source declares a split {name!r}; names are of a-z, 0-9 and _")
    new = roots[~np.isin(roots.id, previous.id)]
    cluster = _clusters(new, duplicates)
    drawable = names.codes(shares)
    old, declared = _touched(new, cluster, duplicates, previous, names)
    touched = old | declared
    count = touched.sum(axis=1)
    chosen = np.where(count == 1, touched.argmax(axis=1), 0).astype(np.int16)
    heads = np.flatnonzero((count == 0) & (cluster == np.arange(len(cluster))))
    parts = list(shares.values())
    for some in np.array_split(heads, len(heads) // _BATCH + 1):
        chosen[some] = [drawable[_draw(key, parts, seed)] for key in spelled(new.key[some])]
    split = chosen[cluster]
    # What a source holds out stays held out, unless the version before published it otherwise.
    around = old[cluster]
    around[np.arange(len(around)), new.split] = False
    train = names.codes(["train"])[0]
    held_out = (new.split != 0) & (new.split != train) & ~around.any(axis=1)
    split[held_out] = new.split[held_out]
    decided = Roots(new.id, new.key, split)[split != 0]
    known = Roots.joined([previous, decided])
    return Splits(names=names, roots=known, rows=_of_rows(rows, known))


def _clusters(new: Roots, duplicates: tuple[Ids, Ids]) -> NDArray[np.int64]:
    """The first member of each newcomer's cluster: published roots never join two clusters."""
    one, other = (places(side, new.id) for side in duplicates)
    near = (one >= 0) & (other >= 0)
    _, first, same = np.unique(new.key, return_index=True, return_inverse=True)
    ends = (
        np.concatenate([one[near], np.arange(len(new.id))]),
        np.concatenate([other[near], first[same]]),
    )
    return components(len(new.id), Pairs(*ends, np.zeros(0, np.float32)))


def _touched(
    new: Roots,
    cluster: NDArray[np.int64],
    duplicates: tuple[Ids, Ids],
    previous: Roots,
    names: Names,
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """For each cluster the splits of its published neighbours, and those that are declared.

    Both [new, names], in the rows of the clusters' first members.
    """
    old = np.zeros((len(new.id), len(names)), np.bool_)
    declared = old.copy()
    for one, other in (duplicates, duplicates[::-1]):
        ours, theirs = places(one, new.id), places(other, previous.id)
        met = (ours >= 0) & (theirs >= 0)
        old[cluster[ours[met]], previous.split[theirs[met]]] = True
    same = places(previous.key, new.key)
    old[cluster[same[same >= 0]], previous.split[same >= 0]] = True
    stated = new.split != 0
    declared[cluster[stated], new.split[stated]] = True
    return old, declared


def _draw(key: str, shares: Sequence[float], seed: int) -> int:
    """The place of a share, by the hash of a root's key; the same key always draws the same."""
    place = int(digest(["split", seed, key])[:13], 16) / 16**13
    for number, share in enumerate(shares):
        place -= share
        if place < 0:
            return number
    return len(shares) - 1


def _of_rows(rows: Iterable[pl.Series], known: Roots) -> Codes:
    """A row whose roots all have one split has that split; any other bridges splits."""
    order = np.argsort(known.id)
    known = known[order]
    found = [np.zeros(0, np.int16)]
    for part in rows:
        counts = part.list.len().cast(pl.Int64).to_numpy()
        roots = packed(part.explode().drop_nulls().to_list())
        place = np.searchsorted(known.id, roots).clip(max=max(0, len(known.id) - 1))
        split = np.zeros(len(roots), np.int16)
        if len(known.id):
            split = np.where(known.id[place] == roots, known.split[place], split)
        codes = np.zeros(len(counts), np.int16)
        some = counts > 0
        if some.any():
            starts = (np.cumsum(counts) - counts)[some]
            least, most = np.minimum.reduceat(split, starts), np.maximum.reduceat(split, starts)
            codes[some] = np.where(least == most, least, 0)
        found.append(codes)
    return np.concatenate(found)


def read_roots(path: Path, names: Names) -> Roots:
    """The roots of a version, as `root_frames` wrote them."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        batches = file.iter_batches(_BATCH, columns=ROOTS.names())
        lists = ([batch.column(name).to_pylist() for name in ROOTS.names()] for batch in batches)
        return Roots.joined(
            Roots(packed(root), packed(key), names.codes(split)) for root, key, split in lists
        )


def root_frames(splits: Splits) -> Iterator[pl.DataFrame]:
    """The roots in ROOTS, some thousand at a time; one frame at least."""
    for start in range(0, max(1, len(splits.roots.id)), _BATCH):
        some = splits.roots[np.arange(start, min(start + _BATCH, len(splits.roots.id)))]
        names = splits.names.spelled(some.split)
        columns = {"root": spelled(some.id), "key": spelled(some.key), "split": names}
        yield pl.DataFrame(columns, schema=ROOTS)
