"""Language: which one each text is in, and rows in another than wanted.

Source: langid.py (Lui and Baldwin 2012, ACL demonstrations): naive Bayes over byte n-grams, 140
    languages, in the package py3langid, which carries its model; as in the pipelines that keep a
    set of languages (CCNet 1911.00359).
Takes: any kind.
Gives: the same kind.
Measures: `confidence` by side (0..1: probability of the language that was found; of candidates the
    least of all responses as `.response`), and over the whole row the least of all sides.
    As labels: `language` by side (ISO 639 code such as `en`, `und` where the text is too short or
    the confidence too low, `mul` where responses of candidates differ) and of the whole row.
Drops: `language` (none of those allowed), `mixed_languages` (`same: true`), `undetermined` (only
    where asked for).
"""

import re
from functools import cache
from typing import Any, Generic, Literal

import polars as pl
from pydantic import Field, field_validator

from datakit.curation._sides import Rule, check_has, split
from datakit.curation._texts import Over
from datakit.errors import MissingExtra
from datakit.findings import ANSWERS, PROMPTS, SIDES, sided_texts
from datakit.kit import Kit
from datakit.step import FrameStep, In, Split

_HEAD = 400
"""Characters that are looked at: more changed no label of 827 texts, and take time each."""
_NONE, _MANY = "und", "mul"  # ISO 639-2


class Language(FrameStep[In, In], Generic[In]):
    """Label languages, and drop rows by them.

    allow: codes of the languages that stay; empty for all. over: the sides that must be in one of
    them. same: whether all sides must be in one language. min_confidence, min_letters: below them
    a text's language is undetermined, and it breaks no rule unless `undetermined` is `drop`.
    A text in two languages counts as the one that has more of it.
    """

    allow: tuple[str, ...] = ()
    over: Over = "row"
    same: bool = False
    min_confidence: float = Field(default=0.5, ge=0, le=1)
    min_letters: int = Field(default=20, ge=0)
    undetermined: Literal["keep", "drop"] = "keep"

    @field_validator("allow")
    @classmethod
    def _codes(cls, allow: tuple[str, ...]) -> tuple[str, ...]:
        for code in allow:
            if not re.fullmatch("[a-z]{2,3}", code):
                raise ValueError(f"{code!r} is no language code; give one such as 'en'")
        return allow

    def apply(self, frame: pl.DataFrame, kit: Kit) -> Split:
        check_has(frame, self.over)
        texts = sided_texts(frame)
        found = texts.select("row", "side").hstack(self._found(texts["text"]))
        wide = frame.select("id").with_row_index("row")
        labels = ["language"]
        for side in SIDES:
            here = found.filter(pl.col("side") == side)
            if here.height:
                labels.append(f"language.{side}")
                joined = _joined(here).select("row", pl.exclude("row").name.suffix(f".{side}"))
                wide = wide.join(joined, on="row", how="left", maintain_order="left")
        wanted = {"prompt": PROMPTS, "response": ANSWERS, "row": SIDES}[self.over]
        bad = found.filter(pl.col("side").is_in(wanted)).group_by("row").agg(self._broken())
        for more in (_joined(found), bad):
            wide = wide.join(more, on="row", how="left", maintain_order="left")
        return split(wide.drop("row"), self._rules(), labels)

    def _broken(self) -> list[pl.Expr]:
        """Whether any text is in a language that is not allowed, and whether in none."""
        known = pl.col("language").is_in([*self.allow, _NONE])
        return [
            (~known).any().alias("_foreign"),
            (pl.col("language") == _NONE).any().alias("_none"),
        ]

    def _rules(self) -> list[Rule]:
        said = pl.format("the row is in {}", pl.col("language"))
        rules: list[Rule] = []
        if self.allow:
            rules.append(Rule("language", pl.col("_foreign"), said))
        if self.same:
            rules.append(Rule("mixed_languages", pl.col("language") == _MANY, said))
        if self.undetermined == "drop":
            rules.append(Rule("undetermined", pl.col("_none"), said))
        return rules

    def _found(self, texts: pl.Series) -> pl.DataFrame:
        """`language` and `confidence` of each text; each distinct beginning is looked at once."""
        heads = pl.DataFrame({"head": texts.str.head(_HEAD)})
        distinct = heads.unique(maintain_order=True)
        letters = distinct["head"].str.count_matches(r"\p{L}")
        # A character of Chinese or Japanese says as much as several letters.
        dense = distinct["head"].str.count_matches(r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}]")
        enough = (letters + 3 * dense >= max(1, self.min_letters)).to_list()
        guesses = [
            _guess(text) if looked else (_NONE, 0.0)
            for text, looked in zip(distinct["head"].to_list(), enough, strict=True)
        ]
        table = distinct.with_columns(
            pl.Series("language", [name for name, _ in guesses], pl.String()),
            pl.Series("confidence", [sure for _, sure in guesses], pl.Float64()),
        ).with_columns(
            language=pl.when(pl.col("confidence") >= self.min_confidence)
            .then("language")
            .otherwise(pl.lit(_NONE))
        )
        joined = heads.join(table, on="head", how="left", maintain_order="left")
        return joined.select("language", "confidence")


def _joined(found: pl.DataFrame) -> pl.DataFrame:
    """The one language of all texts of a row, or `mul`, and the least confidence of any."""
    known = pl.col("language").filter(pl.col("language") != _NONE)
    return found.group_by("row").agg(
        language=pl.when(known.n_unique() > 1)
        .then(pl.lit(_MANY))
        .otherwise(known.first().fill_null(_NONE)),
        confidence=pl.min("confidence"),
    )


def _guess(text: str) -> tuple[str, float]:
    """The language of a text and its probability."""
    name, sure = _identifier().classify(text)
    return (_NONE, 0.0) if name == "zxx" else (str(name), float(sure))


@cache
def _identifier() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise MissingExtra(
            "naming languages needs py3langid; pip install 'datakit[language]'"
        ) from error
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
