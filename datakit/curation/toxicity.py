"""Toxicity: rows above a score that is already there, under a label, or with listed words.

Source: thresholds over a classifier's score, as for Perspective or Detoxify scores in
    RealToxicityPrompts (2009.11462, which calls 0.5 and more toxic); word lists as in C4
    (1910.10683). No model is asked here: the score comes from another step or from the source.
Takes: any kind.
Gives: the same kind.
Measures: with a `wordlist`: `listed` by side (`.prompt`, `.chosen`, `.rejected`, `.response`, ...;
    of candidates `.response.min`, `.response.max`): number of places where a listed word stands.
Drops: `toxic_score`, `toxic_label`, `listed_words`, `no_score`, naming measures and counts, never
    the words.
"""

import re
from pathlib import Path
from typing import Generic, Literal, Self

import polars as pl
from pydantic import Field, model_validator

from datakit.curation._sides import Rule, bounds, check_has, columns_of, over_sides, split
from datakit.curation._texts import Over
from datakit.errors import InputError
from datakit.findings import listed_pattern, sided_texts
from datakit.kit import Kit
from datakit.step import FrameStep, In, Split
from datakit.tables import measure
from datakit.text import digest

_PATTERN_WORDS = 500
"""Words in one pattern: larger ones grow beyond what the regex engine takes."""


class Toxicity(FrameStep[In, In], Generic[In]):
    """Drop rows by scores, labels or words.

    measures: full names of scores (`tox.score.chosen`); a row is dropped where any is above
    `max_score`. missing: what becomes of a row that lacks one. label, labels: the full name of a
    label, and its values that drop a row. wordlist: a text file, one word or phrase a line, `#`
    begins a comment; compared as whole words in lower case. over: where words count. max_listed:
    how many places with such a word a text may have; without it they are only counted.
    """

    measures: tuple[str, ...] = ()
    max_score: float = Field(default=0.5, allow_inf_nan=False)
    missing: Literal["keep", "drop"] = "keep"
    label: str | None = None
    labels: tuple[str, ...] = ()
    wordlist: str | None = None
    over: Over = "row"
    max_listed: int | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not (self.measures or self.label or self.wordlist):
            raise ValueError("give `measures`, `label` or `wordlist`")
        if (self.label is None) != (not self.labels):
            raise ValueError("`label` and `labels` go together")
        if self.max_listed is not None and self.wordlist is None:
            raise ValueError("`max_listed` needs a `wordlist`")
        return self

    def fingerprint(self, kit: Kit) -> str:
        """Of the words, not of the file: a comment changes nothing."""
        return digest(_words(kit.path(self.wordlist))) if self.wordlist else ""

    def apply(self, frame: pl.DataFrame, kit: Kit) -> Split:
        wide = frame.select("id")
        rules: list[Rule] = []
        if self.wordlist:
            check_has(frame, self.over)
            wide = self._listed(frame, _words(kit.path(self.wordlist)))
            columns = columns_of(wide, "listed", self.over)
            rules += bounds(columns, None, self.max_listed, "", "listed_words")
        for name in self.measures:
            column = f"_{name}"
            wide = wide.hstack(frame.select(measure(name).alias(column)))
            for rule in bounds([column], None, self.max_score, "", "toxic_score"):
                rules.append(Rule(rule.reason, rule.broken, rule.detail.str.strip_prefix("_")))
            if self.missing == "drop":
                said = pl.lit(f"the row has no measure {name!r}")
                rules.append(Rule("no_score", pl.col(column).is_null(), said))
        if self.label is not None:
            wide = wide.hstack(frame.select(_label(self.label).alias("_label")))
            said = pl.format("the label {} is {}", pl.lit(self.label), pl.col("_label"))
            rules.append(Rule("toxic_label", pl.col("_label").is_in(self.labels), said))
        return split(wide, rules)

    def _listed(self, frame: pl.DataFrame, words: list[str]) -> pl.DataFrame:
        texts = sided_texts(frame).with_columns(text=pl.col("text").str.to_lowercase())
        # The exact patterns are slow and few texts have any of the words, so first a quick look.
        parts = [word.split()[0] for word in words]
        quick = texts.with_columns(maybe=pl.col("text").str.contains_any(parts))
        counts = [
            pl.col("text").str.count_matches(listed_pattern(words[start : start + _PATTERN_WORDS]))
            for start in range(0, len(words), _PATTERN_WORDS)
        ]
        some = quick.filter("maybe").select("row", "side", listed=pl.sum_horizontal(counts))
        none = quick.filter(~pl.col("maybe")).select("row", "side", listed=pl.lit(0, pl.UInt32()))
        return over_sides(frame, pl.concat([some, none], how="vertical_relaxed"), ["listed"])


def _label(name: str) -> pl.Expr:
    field = pl.element().struct.field
    return (
        pl.col("labels")
        .list.eval(pl.element().filter(field("name") == name))
        .list.first()
        .struct.field("value")
    )


def _words(path: Path) -> list[str]:
    """The words of a list, sorted, each once. Raises InputError where there is none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"word list {str(path)!r} cannot be read as UTF-8: {error}") from error
    bare = (re.sub(r"\s+", " ", line.partition("#")[0]).strip().lower() for line in lines)
    words = sorted({word for word in bare if word})
    if not words:
        raise InputError(f"word list {str(path)!r} holds no word")
    return words
