"""What a report needs of each row, taken in part by part.

A version may be far larger than memory. Of each row only the figures of its texts, its counts and
its names are kept, some hundred bytes, so that every number is exact however many rows there are.
"""

import hashlib

import polars as pl

from datakit.records import Candidates, Judged, Pair, Record
from datakit.report.figures import verdict_lines
from datakit.report.lengths import prompt_column, text_lengths

_KEPT = ("id", "split", "license", "source", "measures", "labels")


class Tally:
    """The rows of a version and the verdicts behind them, as far as its report goes."""

    def __init__(self, kind: type[Record]) -> None:
        self.kind = kind
        self._rows = [_lines(kind, pl.DataFrame(schema=kind.table_schema()))]
        self._verdicts = [verdict_lines(pl.DataFrame(schema=Judged.table_schema()), 0)]
        self._judged = 0

    def add(self, rows: pl.DataFrame) -> None:
        """Rows of a record table whose `split` is the assigned one."""
        self._rows.append(_lines(self.kind, rows))
        if issubclass(self.kind, Judged):
            self.add_judged(rows)

    def add_judged(self, rows: pl.DataFrame) -> None:
        """Rows of a `Judged` table that the rows were made from."""
        self._verdicts.append(verdict_lines(rows, self._judged))
        self._judged += rows.height

    @property
    def rows(self) -> pl.DataFrame:
        """One line for each row.

        Columns `id`, `split`, `license`, `source`, `measures`, `labels`, `partly` (kept with
        failures), `prompt` (its hash), `chars.<text>` and `words.<text>` (a number, or a list for
        responses), and who wrote it: `chosen` and `rejected`, or the list `models`.
        """
        return pl.concat(self._rows)

    @property
    def verdicts(self) -> pl.DataFrame:
        """One line for each verdict, without its texts."""
        return pl.concat(self._verdicts)


def _lines(kind: type[Record], rows: pl.DataFrame) -> pl.DataFrame:
    prompts = rows.select(prompt_column(kind)).write_ndjson().encode().splitlines()
    hashes = [hashlib.blake2b(line, digest_size=16).digest() for line in prompts]
    return rows.select(
        *_KEPT,
        *_writers(kind),
        *text_lengths(kind),
        pl.Series("prompt", hashes, dtype=pl.Binary()),
        partly=pl.col("failures").list.len() > 0,
    )


def _writers(kind: type[Record]) -> list[pl.Expr]:
    if issubclass(kind, Pair):
        sides = ("chosen", "rejected")
        return [pl.col(f"{side}_from").struct.field("model").alias(side) for side in sides]
    if issubclass(kind, Candidates):
        model = pl.element().struct.field("model")
        return [pl.col("responses").list.eval(model).alias("models")]
    return []
