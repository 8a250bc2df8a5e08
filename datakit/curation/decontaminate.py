"""Rows that say what a benchmark asks: found by shared n-grams, by embeddings, or by either.

Source: 13-gram overlap as in GPT-3 (2005.14165, appendix C), which drops at any shared n-gram;
    here at a share of the item's n-grams, much as Llama 2 (2307.09288, appendix A.6) goes by the
    share of its tokens. Rephrased items share none (2311.04850): they are found by the cosine to
    the nearest item, as 2510.18554 does at 0.95 for copies. Code rewritten under other names is
    mostly missed: 8 % of rephrased HumanEval at 0.85, 57 % with the near misses from 0.75 on.
Takes: any kind. Every turn and every answer is compared by itself, and the nearest one counts.
Gives: the same kind.
Measures: `benchmark_overlap` (0..1, the largest share of an item's n-grams in one text),
    `benchmark_similarity` (-1..1, cosine to the nearest item); the label `nearest_benchmark`
    (benchmark/item), and `near_miss` (embedding, ngram) of rows worth a look.
Drops: `contaminated`, naming the item; similarity is the share for n-grams, else the cosine.
"""

from functools import lru_cache
from typing import Generic, Literal, Self

import numpy as np
import polars as pl
from pydantic import Field, model_validator

from datakit.curation._benchmarks import ROLES, Items, each_text, fingerprint, read_items
from datakit.curation._overlap import Index
from datakit.curation._texts import Over
from datakit.kit import Kit
from datakit.models.embed import Vectors
from datakit.neighbours import nearest
from datakit.step import EmbedRole, In, Split, TableStep
from datakit.text import near_miss, shorten

_SPAN = 160
_ROUNDING = 1e-6


class Decontaminate(TableStep[In, In], Generic[In]):
    """Drop rows that are too near a benchmark item.

    benchmarks: Parquet or JSON Lines files, or `hub:org/name[/config][:split][@revision]` (split
    `test` by default). columns: their columns for `benchmark` (else the file's name), `item_id`
    (else the row's number) and `text` (several, if each is a text of its own). ngram: words; an
    item with fewer is one n-gram as long as itself, one with fewer than `shortest` is left to the
    embedding. overlap: share of an item's distinct n-grams, threshold: cosine, from which a row is
    contaminated; from review_threshold on, and below `overlap`, it is kept and labelled as a
    `near_miss`. New thresholds compare nothing again.
    """

    incremental = "rows"
    prepared_by = frozenset(
        {"benchmarks", "columns", "method", "over", "ngram", "shortest", "embedder"}
    )

    benchmarks: tuple[str, ...] = Field(min_length=1)
    columns: dict[str, str | tuple[str, ...]] = Field(default={})
    method: Literal["both", "ngram", "embedding"] = "both"
    over: Over = "row"
    ngram: int = Field(default=13, ge=1)  # 13: GPT-3
    shortest: int = Field(default=8, ge=1)  # 8: the least n of GPT-3
    # Of 39,045 public rows that are no benchmark's, 8 share any n-gram with 4,727 items. The 2
    # below 0.2 do by a common phrase; the 6 above say the same, some of them with new numbers.
    overlap: float = Field(default=0.2, gt=0, le=1)
    # For all-MiniLM-L6-v2, over rephrased GSM8K items and 2,877 clean rows, 700 of them of GSM8K's
    # training set: 0.90 is the most precise (.996) but finds 68 %; 0.85 finds 91 % at .993, 0.80
    # 98 % at .981. Between 0.75 and 0.85 a third is clean: a person looks. The table is printed by
    # tests/benchmarks/bench_decontaminate.py.
    threshold: float = Field(default=0.85, gt=0, le=1)
    review_threshold: float | None = Field(default=0.75, gt=0, le=1)
    embedder: EmbedRole = "embedder"

    @model_validator(mode="after")
    def _fields_fit(self) -> Self:
        for role in self.columns:
            if role not in ROLES:
                raise ValueError(f"`columns` has no role {role!r}{near_miss(role, ROLES)}")
        if self.review_threshold is not None and self.review_threshold > self.threshold:
            raise ValueError(
                f"review_threshold {self.review_threshold:g} is above threshold {self.threshold:g}"
            )
        return self

    def fingerprint(self, kit: Kit) -> str:
        return fingerprint(self.benchmarks, kit)

    def prepare(self, frame: pl.DataFrame, kit: Kit) -> pl.DataFrame:
        """The best item of each row by either method, null where there is none.

        `overlap` and `overlap_item`, `span` (the words that both have); `cosine`, `cosine_item`.
        """
        items = read_items(self.benchmarks, self.columns, kit)
        texts = each_text(frame, self.over)
        rows = frame.select("id").with_row_index("row")
        if self.method != "embedding":
            rows = rows.join(_overlaps(texts, items, self.ngram, self.shortest), "row", "left")
        else:
            rows = rows.with_columns(overlap=None, overlap_item=None, span=None)
        if self.method != "ngram":
            vectors = _vectors(items, self.embedder, kit)
            rows = rows.join(_cosines(texts, items, vectors, self.embedder, kit), "row", "left")
        else:
            rows = rows.with_columns(cosine=None, cosine_item=None)
        return rows.sort("row").select(
            "id",
            pl.col("overlap", "cosine").cast(pl.Float64()),
            pl.col("overlap_item", "span", "cosine_item").cast(pl.String()),
        )

    def apply(self, table: pl.LazyFrame, kit: Kit) -> Split:
        """By both methods or one; a row that both find is named by its n-grams."""
        names = ("id", "overlap", "overlap_item", "span", "cosine", "cosine_item")
        by_ngram = (pl.col("overlap") >= self.overlap - _ROUNDING).fill_null(value=False)
        by_cosine = (pl.col("cosine") >= self.threshold - _ROUNDING).fill_null(value=False)
        rows = table.select(names).with_columns(by_ngram=by_ngram, by_cosine=by_cosine).collect()
        hit = pl.col("by_ngram") | pl.col("by_cosine")
        found = rows.filter(hit)
        dropped = found.select(
            "id",
            reason=pl.lit("contaminated"),
            detail=pl.Series(map(_told, found.iter_rows(named=True)), dtype=pl.String()),
            related=pl.when("by_ngram").then("overlap_item").otherwise("cosine_item"),
            similarity=pl.when("by_ngram").then("overlap").otherwise("cosine"),
        )
        floor = self.threshold if self.review_threshold is None else self.review_threshold
        shares = pl.col("overlap") > 0
        kept = rows.filter(~hit).select(
            "id",
            pl.col("cosine").alias("measure.benchmark_similarity"),
            pl.lit(None, pl.Float64()).alias("measure.benchmark_overlap")
            if self.method == "embedding"
            else pl.col("overlap").fill_null(0.0).alias("measure.benchmark_overlap"),
            pl.when(shares)
            .then("overlap_item")
            .otherwise("cosine_item")
            .alias("label.nearest_benchmark"),
            pl.when(shares)
            .then(pl.lit("ngram"))
            .when(pl.col("cosine") >= floor - _ROUNDING)
            .then(pl.lit("embedding"))
            .alias("label.near_miss"),
        )
        return Split(kept, dropped)


def _overlaps(texts: pl.DataFrame, items: Items, ngram: int, shortest: int) -> pl.DataFrame:
    """`row`, `overlap`, `overlap_item` and `span` of the rows that share any n-gram."""
    found = _index(items, ngram, shortest).match(texts["text"].to_list())
    rows = texts["row"].gather(found["text"])
    best = found.with_columns(row=rows).sort(
        "row", "share", "item", "text", descending=[False, True, False, False]
    )
    best = best.unique("row", keep="first", maintain_order=True)
    return best.select(
        "row",
        "span",
        overlap="share",
        overlap_item=pl.Series(
            np.array(items.names, object)[best["item"].to_numpy()], dtype=pl.String()
        ),
    )


def _cosines(
    texts: pl.DataFrame, items: Items, vectors: Vectors, role: str, kit: Kit
) -> pl.DataFrame:
    """`row`, `cosine` and `cosine_item` of the rows with any text."""
    said = texts.unique("text", keep="first", maintain_order=True).select("text")
    if not said.height:
        index, cosine = np.zeros(0, np.int64), np.zeros(0, np.float32)
    else:
        index, cosine = nearest(kit.embed(role, said["text"].to_list()), vectors)
    names = np.array(items.names, object)[index]
    found = said.with_columns(
        pl.Series("cosine", cosine, pl.Float64()),
        pl.Series("cosine_item", names, pl.String()),
    )
    return (
        texts.join(found, on="text")
        .sort("row", "cosine", "cosine_item", descending=[False, True, False])
        .unique("row", keep="first", maintain_order=True)
        .select("row", "cosine", "cosine_item")
    )


@lru_cache(maxsize=2)
def _index(items: Items, ngram: int, shortest: int) -> Index:
    return Index(items.texts, ngram, shortest)


@lru_cache(maxsize=2)
def _vectors(items: Items, role: str, kit: Kit) -> Vectors:
    """float32 [items, d], looked up once for all parts of a run."""
    return kit.embed(role, items.texts)


def _told(row: dict[str, object]) -> str:
    """What a person wants to know of a hit: method, item, how near, the words."""
    said: list[str] = []
    if row["by_ngram"]:
        span = shorten(str(row["span"]), _SPAN)
        said.append(
            f"ngram: {row['overlap']:.0%} of the n-grams of {row['overlap_item']}, as {span!r}"
        )
    if row["by_cosine"]:
        said.append(f"embedding: cosine {row['cosine']:.3f} to {row['cosine_item']}")
    return shorten("; ".join(said), 600)
