"""What a report needs of each row, taken in part by part.

A version may be far larger than memory. Names and verdicts are counted; of each row only its id, a
hash of its prompt, the lengths of its texts and its measures are kept, as plain numbers: some ten
bytes each, so that every figure is exact however many rows there are.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from datakit.ids import Ids, joined, packed
from datakit.records import Candidates, Judged, Pair, Record
from datakit.report.figures import Floats, JudgeCounts, verdict_lines
from datakit.report.lengths import prompt_column, text_lengths
from datakit.tables import pieces


class Tally:
    """The rows of a version and the verdicts behind them, as far as its report goes.

    models: how often each (chosen, rejected) of pairs or (model,) of responses stands; labels: for
    each name how often each value stands; partly: rows kept with failures.
    """

    def __init__(self, kind: type[Record]) -> None:
        self.kind = kind
        self.height = 0
        self.partly = 0
        self.splits: Counter[str] = Counter()
        self.origins: Counter[tuple[str, str]] = Counter()
        self.models: Counter[tuple[str, ...]] = Counter()
        self.labels: dict[str, Counter[str]] = {}
        self.judge = JudgeCounts()
        self._ids: list[Ids] = []
        self._prompts: list[npt.NDArray[np.uint64]] = []
        self._lengths: dict[str, list[npt.NDArray[np.uint32]]] = {}
        self._measures: dict[str, list[tuple[npt.NDArray[np.uint32], Floats]]] = {}
        self._take_lengths(pl.DataFrame(schema=kind.table_schema()))

    def add(self, rows: pl.DataFrame) -> None:
        """Rows of a record table whose `split` is the assigned one."""
        for piece in pieces(rows):
            self._add(piece)
        if issubclass(self.kind, Judged):
            self.add_judged(rows)

    def _add(self, rows: pl.DataFrame) -> None:
        self.partly += int((rows["failures"].list.len() > 0).sum())
        self.splits.update(rows["split"].to_list())
        self.origins.update(zip(rows["source"].to_list(), rows["license"].to_list(), strict=True))
        self.models.update(_writers(self.kind, rows))
        self._ids.append(packed(rows["id"].to_list()))
        self._prompts.append(_hashes(rows.select(prompt_column(self.kind))))
        self._take_lengths(rows)
        for name, _, values in _named(rows, "labels"):
            self.labels.setdefault(name, Counter()).update(values.to_list())
        for name, places, values in _named(rows, "measures"):
            at = places.to_numpy().astype(np.uint32) + np.uint32(self.height)
            self._measures.setdefault(name, []).append((at, values.to_numpy()))
        self.height += rows.height

    def add_judged(self, rows: pl.DataFrame) -> None:
        """Rows of a `Judged` table that the rows were made from."""
        for piece in pieces(rows):
            self.judge.add(verdict_lines(piece, 0))

    def _take_lengths(self, rows: pl.DataFrame) -> None:
        for column in rows.select(*text_lengths(self.kind)).iter_columns():
            flat = column.explode().drop_nulls() if column.dtype == pl.List else column.fill_null(0)
            values = flat.to_numpy().astype(np.uint32)
            self._lengths.setdefault(column.name, []).append(values)

    @property
    def ids(self) -> Ids:
        """The id of each row."""
        return joined(self._ids)

    @property
    def prompts(self) -> int:
        """How many different prompts there are."""
        return len(np.unique(np.concatenate(self._prompts))) if self._prompts else 0

    @property
    def measure_names(self) -> list[str]:
        """The measures that occur, sorted."""
        return sorted(self._measures)

    def measured(self, name: str) -> Floats:
        """The values of a measure, in order, of the rows that have it."""
        return np.concatenate([values for _, values in self._measures[name]])

    def measure_of_each(self, name: str) -> Floats:
        """A measure of each row, NaN where it has none."""
        found = np.full(self.height, np.nan)
        for places, values in self._measures[name]:
            found[places] = values
        return found

    def lengths(self, name: str) -> Floats:
        """`chars.<text>` or `words.<text>` of all rows, responses one by one."""
        return np.concatenate(self._lengths[name]).astype(np.float64)


def _hashes(rows: pl.DataFrame) -> npt.NDArray[np.uint64]:
    lines = rows.write_ndjson().encode().splitlines()
    found = b"".join(hashlib.blake2b(line, digest_size=8).digest() for line in lines)
    return np.frombuffer(found, np.uint64)


def _named(rows: pl.DataFrame, column: str) -> Iterable[tuple[str, pl.Series, pl.Series]]:
    """(name, places of the rows that have it, their values) of measures or labels."""
    if not rows[column].list.len().sum():
        return
    place = pl.int_range(pl.len(), dtype=pl.UInt32()).alias("place")
    flat = rows.select(place, column).explode(column).drop_nulls().unnest(column)
    for (name,), some in flat.drop_nulls().group_by("name", maintain_order=True):
        yield str(name), some["place"], some["value"]


def _writers(kind: type[Record], rows: pl.DataFrame) -> Iterable[tuple[Any, ...]]:
    if issubclass(kind, Pair):
        sides: Sequence[str] = ("chosen_from", "rejected_from")
        return rows.select(pl.col(side).struct.field("model").alias(side) for side in sides).rows()
    if issubclass(kind, Candidates):
        model = pl.element().struct.field("model")
        models = rows.select(pl.col("responses").list.eval(model)).to_series()
        return ((one,) for one in models.explode().drop_nulls().to_list())
    return ()
