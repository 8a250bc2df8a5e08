"""Repetition: texts that say the same again and again.

Source: Gopher (Rae et al. 2021, 2112.11446, table A1), whose bounds are: repeated lines 0.30 of the
    lines and 0.20 of the characters, most frequent 2-, 3- and 4-gram 0.20, 0.18 and 0.16 of the
    characters, repeated 5- to 10-grams 0.15, 0.14, 0.13, 0.12, 0.11 and 0.10 of the characters.
    They are made for web pages: short answers repeat more, so measure first.
Takes: any kind.
Gives: the same kind.
Measures: by side (`.prompt`, `.chosen`, `.rejected`, `.response`, ...; of candidates
    `.response.min`, `.response.max`), shares in 0..1: `repeated_lines` (of the lines that are not
    blank, those that stand earlier in the text), `repeated_line_characters` (their characters),
    `repeated_share` (of the characters of all words, those in an n-gram of words that stands
    earlier in the text, each counted once), `top_share` (the same of every place of the most
    frequent n-gram of `top_n` words, where it stands twice or more); and `longest_run` (words: the
    longest run of one and the same word). Words are compared without case; each character of a
    script without spaces is a word.
Drops: `repeated_lines`, `repeated_line_characters`, `repeated_ngrams`, `top_ngram`, `long_run`,
    only where a bound is set.
"""

from typing import Generic

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field

from datakit.curation._sides import Rule, bounds, check_has, columns_of, over_sides, split
from datakit.curation._texts import Over
from datakit.findings import WORD, sided_texts
from datakit.kit import Kit
from datakit.step import FrameStep, In, Split

Hashes = NDArray[np.uint64]
Ints = NDArray[np.int64]

_MEASURES = (
    ("repeated_lines", "repeated_lines"),
    ("repeated_line_characters", "repeated_line_characters"),
    ("repeated_share", "repeated_ngrams"),
    ("top_share", "top_ngram"),
    ("longest_run", "long_run"),
)
_TEXT_BYTES = 16_000_000
"""Text that is taken apart at a time: its words take some ten times as much."""


class Repetition(FrameStep[In, In], Generic[In]):
    """Measure repetition, and drop rows above the bounds that are set. Bounds are inclusive.

    over: the sides that the bounds are about, each by itself. n: words of the n-grams of
    `repeated_share`. top_n: words of those of `top_share`.
    """

    over: Over = "response"
    n: int = Field(default=5, ge=2, le=20)
    top_n: int = Field(default=3, ge=1, le=20)
    max_repeated_lines: float | None = Field(default=None, ge=0, le=1)
    max_repeated_line_characters: float | None = Field(default=None, ge=0, le=1)
    max_repeated_share: float | None = Field(default=None, ge=0, le=1)
    max_top_share: float | None = Field(default=None, ge=0, le=1)
    max_longest_run: int | None = Field(default=None, ge=1)

    def apply(self, frame: pl.DataFrame, kit: Kit) -> Split:
        texts = sided_texts(frame)
        names = [name for name, _ in _MEASURES]
        found = [repetition(piece["text"], self.n, self.top_n) for piece in _pieces(texts)]
        empty = pl.DataFrame(schema=dict.fromkeys(names, pl.Float64()))
        measured = texts.select("row", "side").hstack(pl.concat([empty, *found]))
        wide = over_sides(frame, measured, names)
        rules: list[Rule] = []
        for name, reason in _MEASURES:
            most: float | None = getattr(self, f"max_{name}")
            if most is not None:
                check_has(frame, self.over)
                rules += bounds(columns_of(wide, name, self.over), None, most, "", reason)
        return split(wide, rules)


def _pieces(texts: pl.DataFrame) -> list[pl.DataFrame]:
    """The texts in slices of about _TEXT_BYTES, however long each is."""
    ends = texts["text"].str.len_bytes().cast(pl.Int64()).cum_sum() // _TEXT_BYTES
    return (
        texts.group_by(ends.alias("piece"), maintain_order=True)
        .agg(pl.all())
        .explode("row", "side", "text")
        .partition_by("piece", maintain_order=True)
        if texts.height
        else []
    )


def repetition(texts: pl.Series, n: int, top_n: int) -> pl.DataFrame:
    """The five measures of each text, as columns named after them."""
    lines = _line_shares(texts)
    words = (
        pl.DataFrame({"text": texts})
        .with_row_index("place")
        .select("place", word=pl.col("text").str.to_lowercase().str.extract_all(WORD))
        .explode("word")
        .drop_nulls("word")
    )
    place = words["place"].to_numpy().astype(np.int64)
    hashes = words["word"].hash(seed=0).to_numpy().astype(np.uint64)
    sizes = words["word"].str.len_chars().to_numpy().astype(np.int64)
    count = len(texts)
    whole = np.maximum(np.bincount(place, sizes, minlength=count), 1)
    repeated = _repeated_characters(place, hashes, sizes, n, count) / whole
    top = _top_characters(place, hashes, sizes, top_n, count) / whole
    runs = _longest_runs(place, hashes, count)
    found = {"repeated_share": repeated, "top_share": top, "longest_run": runs.astype(np.float64)}
    return lines.hstack([pl.Series(name, values) for name, values in found.items()])


def _line_shares(texts: pl.Series) -> pl.DataFrame:
    lines = (
        pl.DataFrame({"text": texts})
        .with_row_index("place")
        .select("place", line=pl.col("text").str.split("\n"))
        .explode("line")
        .with_columns(pl.col("line").str.strip_chars())
        .filter(pl.col("line") != "")
        .with_columns(size=pl.col("line").str.len_chars())
    )
    again = ~pl.struct("place", "line").is_first_distinct()
    shares = (
        lines.with_columns(again=again)
        .group_by("place")
        .agg(
            repeated_lines=pl.col("again").mean(),
            repeated_line_characters=(pl.col("size") * pl.col("again")).sum() / pl.sum("size"),
        )
    )
    every = pl.DataFrame({"place": pl.Series(range(len(texts)), dtype=pl.UInt32())})
    joined = every.join(shares, on="place", how="left", maintain_order="left")
    return joined.drop("place").fill_null(0.0)


def _grams(place: Ints, hashes: Hashes, n: int) -> tuple[Ints, Hashes]:
    """Where an n-gram begins, and its hash, in which the text takes part: none crosses two."""
    starts = (
        np.flatnonzero(place[: len(place) - n + 1] == place[n - 1 :])
        if len(place) >= n
        else (np.zeros(0, np.int64))
    )
    mixed = place[starts].astype(np.uint64)
    for step in range(n):
        mixed = _mix(mixed * np.uint64(0x9E3779B97F4A7C15) + hashes[starts + step])
    return starts, mixed


def _mix(values: Hashes) -> Hashes:
    """The finaliser of splitmix64, which is one to one."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _groups(grams: Hashes) -> tuple[Ints, Ints, Ints, Ints]:
    """Equal n-grams side by side, where each group begins, its size, and its first place."""
    order = np.argsort(grams)
    ranked = grams[order]
    begins = np.flatnonzero(np.append(True, ranked[1:] != ranked[:-1])[: len(ranked)])
    times = np.diff(np.append(begins, len(ranked)))
    first = np.minimum.reduceat(order, begins) if len(order) else order
    return order, begins, times, first


def _repeated_characters(place: Ints, hashes: Hashes, sizes: Ints, n: int, count: int) -> Ints:
    """Characters in words of an n-gram that stands earlier in its text, each word once."""
    starts, grams = _grams(place, hashes, n)
    again = np.ones(len(starts), np.bool_)
    again[_groups(grams)[-1]] = False
    return _covered_characters(place, sizes, starts[again], n, count)


def _top_characters(place: Ints, hashes: Hashes, sizes: Ints, n: int, count: int) -> Ints:
    """Characters in words of the most frequent n-gram of each text, each word once.

    Of equally frequent ones the longest counts, of those the first.
    """
    starts, grams = _grams(place, hashes, n)
    order, begins, times, earliest = _groups(grams)
    several = np.flatnonzero(times > 1)
    first = starts[earliest[several]]
    ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
    ranked = np.lexsort((first, ends[first] - ends[first + n], -times[several], place[first]))
    _, best = np.unique(place[first][ranked], return_index=True)
    top = several[ranked[best]]
    within = np.arange(times[top].sum()) - np.repeat(np.cumsum(times[top]) - times[top], times[top])
    held = order[np.repeat(begins[top], times[top]) + within]
    return _covered_characters(place, sizes, starts[held], n, count)


def _covered_characters(place: Ints, sizes: Ints, starts: Ints, n: int, count: int) -> Ints:
    """Characters of each text in words of the n-grams that begin at `starts`, each word once."""
    change = np.bincount(starts, minlength=len(place) + 1)
    change -= np.bincount(starts + n, minlength=len(place) + 1)
    covered = np.cumsum(change)[:-1] > 0
    return np.bincount(place, sizes * covered, minlength=count).astype(np.int64)


def _longest_runs(place: Ints, hashes: Hashes, count: int) -> Ints:
    """Words in the longest run of one word of each text."""
    longest = np.zeros(count, np.int64)
    if len(place):
        other = (place[1:] != place[:-1]) | (hashes[1:] != hashes[:-1])
        starts = np.concatenate([np.zeros(1, np.int64), np.flatnonzero(other) + 1])
        lengths = np.diff(np.append(starts, len(place)))
        np.maximum.at(longest, place[starts], lengths)
    return longest
