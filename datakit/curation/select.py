"""The most informative subset of a table, under a budget, quotas and rows that must stay.

Source: one interface to published ways of choosing. `entropy`: greedy log-determinant (Nemhauser
    1978; 1709.05135): each next row is the one that the kept ones predict least. `facility`:
    facility location (Lin and Bilmes 2009): every row has a similar one that stays. `k_center`:
    the farthest row next (Gonzalez 1985; 1708.00489). `deita`: by falling score, unless similar
    to a kept row (2312.15685). `isa`: by the entropy that leaves with a row (2411.10545).
    `magpie_longest`: Magpie's filter (2406.08464). `highest`, `lowest` (BLEUBERI, 2505.11080),
    `longest` and `random`: the baselines that a choice has to beat.
Takes: any kind.
Gives: the same kind.
Measures: `order` (0 = taken first; not with `random`). `gain` with `entropy` (nats, >= 0),
    `facility` (>= 0, summed cosine by which rows are served better) and `k_center` (0..2, cosine
    distance to the rows taken before): what the row added when it was taken; the numbers in their
    order are the gain curve. With `isa`: `log_likelihood` (nats), `delta_entropy` (nats, -e..0),
    `rank` (0 = first among all rows).
Drops: `not_selected`, naming the nearest row that stays and the cosine similarity to it.
"""

import random
from typing import Generic, Literal, Self

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field, field_validator, model_validator

from datakit.curation._choice import (
    listed,
    room_for,
    token_costs,
    value_of,
    weight_columns,
    weights,
)
from datakit.curation._deita import score_first
from datakit.curation._entropy import Kernel, entropy, rbf_entropy
from datakit.curation._facility import facility
from datakit.curation._greedy import Blend, Taken
from datakit.curation._isa import Order, delta_entropy, isa_order, log_likelihoods
from datakit.curation._k_center import k_center
from datakit.curation._policies import in_order, percentiles
from datakit.curation._room import Floats, Room, Short
from datakit.curation._texts import Over, embedded, row_texts, vectors_of
from datakit.errors import InputError
from datakit.kit import Kit
from datakit.models.embed import Vectors
from datakit.neighbours import nearest
from datakit.step import EmbedRole, In, Split, TableStep

Method = Literal[
    "entropy",
    "facility",
    "k_center",
    "deita",
    "isa",
    "magpie_longest",
    "highest",
    "lowest",
    "longest",
    "random",
]
Quotas = dict[str, dict[str, int | float] | str]
Listed = dict[str, str | tuple[str, ...]]
_WHY: dict[Method, str] = {
    "entropy": "the rows that stay already say it",
    "facility": "the rows that stay serve it well enough",
    "k_center": "it is nearer to the rows that stay than those were to each other",
    "deita": "its score is not among the highest",
    "isa": "its rank is beyond the budget",
    "magpie_longest": "longer answers fill the budget",
    "highest": "its weight is not among the highest",
    "lowest": "its weight is not among the lowest",
    "longest": "longer texts fill the budget",
    "random": "not drawn",
}
_BLENDED = ("entropy", "facility", "k_center", "isa")
_BY_WEIGHT = ("deita", "highest", "lowest")
_GAINS = ("entropy", "facility", "k_center")


class Select(TableStep[In, In], Generic[In]):
    """Keep a budget of rows. Ties go to the lower id: the order of the table does not matter.

    keep: how many rows (an integer), or which share of them (a fraction below 1). tokens: instead,
    how many tokens; a row has 4/3 of its words, or the measure `tokens_by`. Rows are taken in the
    order of the method while they fit: one that does not is passed over.
    quotas: `{column: {value: rows or share of the budget}}` for a text column of the record or a
    label, or `{column: even}`; met exactly under `keep`, a bound under `tokens`; rows of other
    values share the rest. short: what happens where a value has too few rows.
    must_keep: `{column: value or values}`: rows that have one of them in every column named are
    taken first and count. only, floor: other rows may be taken only with such values, and with a
    weight over the floor.
    weight: a measure, or several, which are multiplied. A row is taken for (1 - strength) x gain /
    unit + strength x place, place being its percentile by weight (0..1, 1 = highest) and unit a
    gain worth having: n / budget for `facility`, that of a first row for `entropy`, 1 otherwise
    (for `isa`, gain is the percentile by its order).
    noise: the variance that is added to each row by `entropy`; the larger, the less the last
    details of a row count. kernel: linear, or `rbf`, exp((cosine - 1) / width²). neighbours: of
    each row, for `facility` over 4,096 rows. threshold: of `deita`, a cosine similarity. order: how
    `isa` reads the sign of its change, see the paper; dimensions: of its Gaussians.
    """

    version = 2
    prepared_by = frozenset({"over", "embedder"})

    keep: int | float | None = Field(default=None, gt=0)
    tokens: int | None = Field(default=None, gt=0)
    tokens_by: str | None = None
    method: Method = "entropy"
    over: Over = "prompt"
    quotas: Quotas = Field(default_factory=dict, max_length=1)
    short: Short = "refuse"
    must_keep: Listed = Field(default_factory=dict)
    only: Listed = Field(default_factory=dict)
    floor: float | None = None
    weight: str | tuple[str, ...] | None = None
    strength: float = Field(default=0.5, ge=0, le=1)
    noise: float = Field(default=0.1, gt=0)
    kernel: Kernel = "linear"
    width: float = Field(default=1.0, gt=0)
    neighbours: int = Field(default=32, ge=2)
    threshold: float = Field(default=0.9, gt=0, le=1)  # 0.9: Deita, as a similarity
    order: Order = "signed"
    dimensions: int = Field(default=32, ge=1)
    embedder: EmbedRole = "embedder"

    @field_validator("keep")
    @classmethod
    def _rows_or_share(cls, keep: int | float | None) -> int | float | None:
        if isinstance(keep, float) and keep >= 1:
            raise ValueError(f"{keep:g} is neither a number of rows nor a fraction below 1")
        return keep

    @field_validator("quotas")
    @classmethod
    def _shares(cls, quotas: Quotas) -> Quotas:
        for column, wanted in quotas.items():
            if isinstance(wanted, str):
                if wanted != "even":
                    raise ValueError(f"{column}: {wanted!r} is neither `even` nor quotas by value")
                continue
            for value, one in wanted.items():
                if one < 0 or (isinstance(one, float) and not one <= 1):
                    raise ValueError(
                        f"{column} {value!r}: {one:g} is neither a number of rows nor a share"
                    )
            shares = sum(one for one in wanted.values() if isinstance(one, float))
            if shares > 1 + 1e-9:
                raise ValueError(f"the shares of {column} sum to {shares:g}, which is over 1")
        return quotas

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if (self.keep is None) == (self.tokens is None):
            raise ValueError("give a budget: either `keep` or `tokens`")
        if self.tokens_by is not None and self.tokens is None:
            raise ValueError("`tokens_by` belongs to `tokens`")
        if self.weight is None:
            if self.method in _BY_WEIGHT or self.floor is not None:
                what = "floor" if self.floor is not None else f"method: {self.method}"
                raise ValueError(f"`{what}` needs `weight: <measure>`")
        elif self.floor is None and self.method not in _BLENDED + _BY_WEIGHT:
            raise ValueError(f"`method: {self.method}` goes by no weight; leave `weight` out")
        return self

    def prepare(self, frame: pl.DataFrame, kit: Kit) -> pl.DataFrame:
        """`vector`: float32 [d] of unit length; what policies and budgets go by.

        `words`: of the whole row; `length`: characters of what is compared; `answer_length`:
        characters of the answer, null where there is none; `open_end`: the prompt ends in a colon.
        """
        whole = pl.Series(row_texts(frame, "row"), dtype=pl.String())
        over = pl.Series(row_texts(frame, self.over), dtype=pl.String())
        return embedded(frame, self.over, self.embedder, kit).with_columns(
            words=whole.str.count_matches(r"\S+").cast(pl.Int64),
            length=over.str.len_chars().cast(pl.Int64),
            answer_length=_lengths(frame),
            open_end=_open_ends(frame),
        )

    def apply(self, table: pl.LazyFrame, kit: Kit) -> Split:
        rows = self._rows(table)
        if not rows.height:
            return Split(rows.select("id"), rows.select("id", reason=pl.lit("not_selected")))
        vectors = _with_empty_texts(vectors_of(rows))
        rows = rows.drop("vector")
        weight = weights(rows, self._weights) if self._weights else None
        must = listed(rows, self.must_keep) if self.must_keep else np.zeros(rows.height, bool)
        why = self._shut_out(rows, weight)
        first = np.flatnonzero(must)
        eligible = must | (why.to_numpy() == "")
        cost = None if self.tokens is None else (self.tokens, token_costs(rows, self.tokens_by))
        budget = None if cost else self._budget(rows.height)
        room = room_for(rows, eligible, first, budget, cost, self.quotas, self.short)
        if cost and not room.open.any() and eligible.any():
            least = float(cost[1][eligible].min())
            raise InputError(
                f"`tokens: {self.tokens:,}` has room for no row; the shortest has {least:,.0f}"
            )
        taken, measures = self._taken(rows, vectors, weight, room, first, kit)
        kept = rows[taken.rows.tolist()].select("id").with_columns(measures)
        return Split(kept, self._dropped(rows.with_columns(why=why), vectors, taken))

    @property
    def _weights(self) -> tuple[str, ...]:
        if self.weight is None:
            return ()
        return (self.weight,) if isinstance(self.weight, str) else self.weight

    def _rows(self, table: pl.LazyFrame) -> pl.DataFrame:
        """What the choice goes by, in the order of ids, which settles every tie."""
        columns = dict.fromkeys([*self.quotas, *self.must_keep, *self.only])
        names = dict.fromkeys([*self._weights, *((self.tokens_by,) if self.tokens_by else ())])
        prepared = ("id", "vector", "words", "length", "answer_length", "open_end")
        schema = table.collect_schema() if columns else pl.Schema()
        values = [value_of(one, schema).alias(f"of.{one}") for one in columns]
        return table.select(*prepared, *values, *weight_columns(list(names))).collect().sort("id")

    def _budget(self, rows: int) -> int:
        assert self.keep is not None
        budget = round(self.keep * rows) if self.keep < 1 else int(self.keep)
        return min(max(budget, 1), rows)

    def _shut_out(self, rows: pl.DataFrame, weight: Floats | None) -> pl.Series:
        """Why a row may not be taken, empty where it may."""
        why = np.full(rows.height, "", object)
        if self.method == "magpie_longest":
            if rows["answer_length"].null_count() == rows.height:
                raise InputError(
                    "`method: magpie_longest` goes by answers, and these rows have none"
                )
            why[rows["open_end"].to_numpy()] = "its prompt ends in a colon"
        if self.floor is not None and weight is not None:
            why[~(weight > self.floor)] = f"its weight is not over the floor of {self.floor:g}"
        if self.only:
            names = ", ".join(self.only)
            why[~listed(rows, self.only)] = f"`only` does not list its {names}"
        return pl.Series("why", why.tolist(), pl.String())

    def _taken(
        self,
        rows: pl.DataFrame,
        vectors: Vectors,
        weight: Floats | None,
        room: Room,
        first: NDArray[np.int64],
        kit: Kit,
    ) -> tuple[Taken, list[pl.Series]]:
        """The rows taken, and the measures of each."""
        blend = Blend()
        if weight is not None and self.method in _BLENDED:
            blend = Blend(1 - self.strength, self.strength * percentiles(weight))
        more: dict[str, Floats] = {}
        match self.method:
            case "entropy" if self.kernel == "linear":
                taken = entropy(vectors, room, first, self.noise, blend)
            case "entropy":
                taken = rbf_entropy(vectors, room, first, self.noise, self.width, blend)
            case "facility":
                taken = facility(vectors, room, first, self.neighbours, blend)
            case "k_center":
                taken = k_center(vectors, room, first, blend)
            case "isa":
                draw = np.random.default_rng(kit.rng("", "isa").getrandbits(64))
                likely = log_likelihoods(vectors, draw, self.dimensions)
                rank = np.empty(rows.height)
                rank[isa_order(likely, self.order)] = np.arange(rows.height)
                more = {
                    "log_likelihood": likely,
                    "delta_entropy": delta_entropy(likely),
                    "rank": rank,
                }
                taken = in_order(blend.keys(percentiles(-rank), 1.0, _all(rows)), room, first)
            case "deita":
                assert weight is not None
                score = np.where(np.isnan(weight), -np.inf, weight)
                taken = score_first(vectors, score, room, first, self.threshold)
            case _:
                taken = in_order(self._worth(rows, weight, kit), room, first)
        measures = [pl.Series(f"measure.{name}", of[taken.rows]) for name, of in more.items()]
        if self.method in _GAINS:
            measures.append(pl.Series("measure.gain", taken.gains, pl.Float64()))
        if self.method != "random":
            measures.append(pl.Series("measure.order", range(len(taken.rows)), pl.Float64()))
        return taken, measures

    def _worth(self, rows: pl.DataFrame, weight: Floats | None, kit: Kit) -> Floats:
        """What the baselines order rows by, falling."""
        if self.method in ("highest", "lowest"):
            assert weight is not None
            signed = weight if self.method == "highest" else -weight
            return np.where(np.isnan(signed), -np.inf, signed)
        if self.method == "random":
            draw: random.Random = kit.rng("", "select")
            return np.array(draw.sample(range(rows.height), rows.height), np.float64)
        name = "length" if self.method == "longest" else "answer_length"
        return rows[name].fill_null(-1).cast(pl.Float64).to_numpy()

    def _dropped(self, rows: pl.DataFrame, vectors: Vectors, taken: Taken) -> pl.DataFrame:
        left = np.setdiff1d(np.arange(rows.height), taken.rows)
        lost = rows[left.tolist()]
        usual = pl.lit(_WHY[self.method])
        related, similarity = pl.lit(None, pl.String), pl.lit(None, pl.Float64)
        if len(taken.rows) and len(left):
            index, cosine = nearest(vectors[left], vectors[taken.rows])
            related = pl.Series(rows["id"].to_numpy()[taken.rows][index], dtype=pl.String())
            similarity = pl.Series(cosine, dtype=pl.Float64())
        why = pl.when(pl.col("why") == "").then(usual).otherwise("why")
        if self.method == "deita" and len(taken.rows):
            close = pl.lit(f"a row that stays has a cosine of over {self.threshold:g} to it")
            is_close = (pl.col("why") == "") & (pl.lit(similarity) > self.threshold)
            why = pl.when(is_close).then(close).otherwise(why)
        return lost.select(
            "id",
            reason=pl.lit("not_selected"),
            detail=why,
            related=related,
            similarity=similarity,
        )


def _all(rows: pl.DataFrame) -> NDArray[np.int64]:
    return np.arange(rows.height)


def _lengths(frame: pl.DataFrame) -> pl.Series:
    try:
        texts = row_texts(frame, "response")
    except InputError:
        return pl.Series([None] * frame.height, dtype=pl.Int64())
    return pl.Series(texts, dtype=pl.String()).str.len_chars().cast(pl.Int64)


def _open_ends(frame: pl.DataFrame) -> pl.Series:
    try:
        texts = row_texts(frame, "prompt")
    except InputError:
        return pl.Series([False] * frame.height, dtype=pl.Boolean())
    return pl.Series(texts, dtype=pl.String()).str.strip_chars_end().str.ends_with(":")


def _with_empty_texts(vectors: Vectors) -> Vectors:
    """Rows with no direction have one of their own: they are alike, and like no other."""
    empty = np.logical_not(vectors.any(axis=1))
    if not empty.any():
        return vectors
    return np.concatenate([vectors, empty.astype(np.float32)[:, None]], axis=1)
