"""Rows of several inputs of one kind, mixed to target shares.

Source: data mixtures as trainers define them (shares per source, as in LLaMA, 2302.13971 table 1).
    Inputs are versions, files and sets on the Hub. Each is read twice: once to count, to find
    repeated and contradicting rows and to draw, once to give the rows that are taken.
Takes: nothing.
Gives: the kind that `kind` names, input after input. A row of a version keeps its id; that of any
    other row follows from its input's name and its key or content, so that another input changes
    no id. Which rows are taken depends on the seed and on the rows, never on their order.
Measures: a measure `m` of input `a` becomes `a.m`. `weight` (> 0) where an input states one; a
    Label has its own column for it, which is multiplied instead.
Drops: `repeated_row` (the same key twice in an input, or the same row in two versions),
    `label_conflict` (a pair whose opposite another input holds; the detail names that row),
    `not_taken` (a good row beyond its input's share or cap: `raw` is its origin, the row itself
    stays in the input), and what the inputs reject.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, Self

import polars as pl
from pydantic import Field, model_validator

from datakit.kit import Kit
from datakit.records import KINDS, Candidates, Label, Message, Pair, Record
from datakit.sources._layouts import check_mapping
from datakit.sources._mix_choices import SURVEY, check_licences, taken_of, without_conflicts
from datakit.sources._mix_inputs import MixInput, kit_of, open_input, rows_of
from datakit.step import Range, Reject, SourceStep
from datakit.text import digest

_RESERVED = ("label", "splits")


class Mix(SourceStep[Record]):
    """Reads several inputs as one.

    shares are of the mixed rows and add up to 1; all inputs state one, or none does, and then all
    rows are taken up to the caps. The total is the largest for which no input runs short, at most
    `rows`; with `strict` an input that runs short of `rows` is an error. conflicts: of pairs with
    opposite labels in two inputs drop all, or keep the input listed first, or that of the highest
    `priority` (a winner that contradicts itself decides nothing: all are dropped). require:
    `compatible` refuses licences that exclude each other, `commercial` also those that forbid
    commercial use or are unknown.
    """

    kind: Literal["Prompt", "Conversation", "Edit", "Candidates", "Judged", "Pair", "Label"]
    inputs: tuple[MixInput, ...] = Field(min_length=1)
    rows: int | None = Field(default=None, ge=1)
    strict: bool = False
    conflicts: Literal["drop_both", "keep_first", "highest_priority"] = "drop_both"
    require: Literal["nothing", "compatible", "commercial"] = "compatible"

    @model_validator(mode="after")
    def _inputs_go_together(self) -> Self:
        names = [given.called for given in self.inputs]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two inputs are called {name!r}; give one another `name:`")
            if name in _RESERVED:
                raise ValueError(f"no input can be called {name!r}; give it another `name:`")
        stated = [given.share for given in self.inputs if given.share is not None]
        if stated and len(stated) < len(self.inputs):
            missing = next(given.called for given in self.inputs if given.share is None)
            raise ValueError(f"all inputs state a share, or none does; {missing!r} has none")
        if stated and abs(sum(stated) - 1) > 1e-6:
            raise ValueError(f"shares must add up to 1, not to {sum(stated):g}")
        if self.rows is not None and not stated:
            raise ValueError("`rows` is the total that shares are of, and no input states a share")
        if self.strict and self.rows is None:
            raise ValueError("`strict` needs `rows`, the total that no input may run short of")
        for given in self.inputs:
            if given.columns and self.kind != "Judged":
                check_mapping(self.kind, given.columns)
        return self

    def gives(self, taken: type[Record] | None) -> type[Record]:
        del taken
        return KINDS[self.kind]

    def is_private(self, kit: Kit) -> bool:
        return self.private or any(
            open_input(given, self.kind, kit).is_private(kit_of(given, kit))
            for given in self.inputs
        )

    def fingerprint(self, kit: Kit) -> str:
        """Of the inputs; what their ranges hold is in the ranges."""
        return digest(
            [
                open_input(given, self.kind, kit).fingerprint(kit_of(given, kit))
                for given in self.inputs
            ]
        )

    def ranges(self, kit: Kit) -> Iterator[Range]:
        """The ranges of the inputs, in order; the fingerprint of one also covers its fates."""
        yield from (part for part, _, _ in _planned(self.model_dump_json(), kit).parts)

    async def read(self, part: Range, kit: Kit) -> Iterable[Record | Reject]:
        return self._arranged(part, _planned(self.model_dump_json(), kit), kit)

    def _arranged(self, part: Range, plan: "Plan", kit: Kit) -> Iterator[Record | Reject]:
        """The rows of one range that are taken, and why the others are not."""
        number = next(at for at, one in enumerate(plan.parts) if one[0] == part)
        _, position, inner = plan.parts[number]
        given = self.inputs[position]
        weighted = any(one.weight != 1 for one in self.inputs)
        fates = plan.fates[number].iter_rows(named=True)
        source = open_input(given, self.kind, kit)
        for at, row in rows_of(source, inner, kit_of(given, kit)):
            if isinstance(row, Reject):
                yield row.model_copy(update={"place": f"{given.called}: {row.place}"})
                continue
            fate = next(fates)
            if fate["reason"]:
                lost = row if row.id else row.identified(fate["origin"])
                is_spare = fate["reason"] == "not_taken"
                yield Reject(
                    place=f"{given.called}: {inner.name or given.address}, from row "
                    f"{inner.first_row}, number {at + 1}",
                    reason=fate["reason"],
                    detail=fate["detail"],
                    related=fate["related"],
                    raw=fate["origin"] if is_spare else lost.model_dump_json(),
                )
            else:
                weight = given.weight if weighted else None
                yield arranged(row, given, fate["origin"], weight, kit.measure("weight"))


def arranged(row: Record, given: MixInput, origin: str, weight: float | None, name: str) -> Record:
    """A taken row: its id, its licence, its measures under its input's name, its weight."""
    of_version = bool(row.id)
    update: dict[str, Any] = {"license": row.license or given.license}
    measures = row.measures
    if of_version:
        # A file's measures are named so from the start.
        measures = {f"{given.called}.{one}": value for one, value in measures.items()}
        update["signed"] = tuple(f"{given.called}.{one}" for one in row.signed)
    if isinstance(row, Candidates):
        update["responses"] = tuple(
            one.model_copy(
                update={"measures": {f"{given.called}.{key}": v for key, v in one.measures.items()}}
            )
            for one in row.responses
        )
    if weight is not None and isinstance(row, Label):
        update["weight"] = row.weight * weight
    elif weight is not None:
        measures = measures | {name: weight}
    made = row.model_copy(update=update | {"measures": measures})
    if of_version:
        return made
    made = made.identified(origin)
    return made.model_copy(update={"roots": (made.id,)})


@dataclass(frozen=True)
class Plan:
    """What becomes of every row.

    parts: each range of the mix, the number of its input, and the range there; fates: by part the
    `origin`, `reason` (empty where taken) and `detail` of its rows, in order.
    """

    parts: tuple[tuple[Range, int, Range], ...]
    fates: tuple[pl.DataFrame, ...]


@lru_cache(maxsize=1)
def _planned(step: str, kit: Kit) -> Plan:
    """The plan of a step, given as JSON; made once for each kit, which is once for each run."""
    mix = Mix.model_validate_json(step)
    inner: list[tuple[int, Range]] = []
    frames = [pl.DataFrame(schema=SURVEY)]
    for position, given in enumerate(mix.inputs):
        source, own = open_input(given, mix.kind, kit), kit_of(given, kit)
        rank = -given.priority if mix.conflicts == "highest_priority" else position
        for part in source.ranges(own):
            seen = [
                (len(inner), at, position, rank, *_seen(row, given))
                for at, row in rows_of(source, part, own)
                if isinstance(row, Record)
            ]
            frames.append(pl.DataFrame(seen, schema=SURVEY, orient="row"))
            inner.append((position, part))
    fates = _fates(mix, pl.concat(frames), kit)
    parts: list[tuple[Range, int, Range]] = []
    by_part: list[pl.DataFrame] = []
    held = fates.partition_by("part", as_dict=True, include_key=False, maintain_order=True)
    for number, (position, part) in enumerate(inner):
        mine = held.get((number,), fates.clear().drop("part"))
        told = hashlib.blake2b(mine.write_ndjson().encode(), digest_size=16).hexdigest()
        name = f"{mix.inputs[position].called}:{part.name}"
        mark = digest([name, part.fingerprint, told])
        parts.append((part.model_copy(update={"name": name, "fingerprint": mark}), position, part))
        by_part.append(mine)
    return Plan(tuple(parts), tuple(by_part))


def _seen(row: Record, given: MixInput) -> tuple[str, str, str, str, str, str, bool]:
    """id, key, content, mark, license, pair and forward of a row."""
    content = "" if row.id else row.content
    key = row.id or (f"key:{row.origin}" if row.origin else content)
    text = row.model_dump_json(exclude={"source"})
    mark = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    pair, forward = "", False
    if isinstance(row, Pair):
        pair = row.pair_key
        sides = (row.chosen, row.rejected)
        if row.pair_kind == "prompt":
            sides = (row.prompt, row.prompt_rejected)
        forward = _said(sides[0]) < _said(sides[1])
    return row.id, key, content, mark, row.license or given.license, pair, forward


def _said(turns: Sequence[Message]) -> list[tuple[str, str]]:
    return [(turn.role, turn.content) for turn in turns]


def _fates(mix: Mix, survey: pl.DataFrame, kit: Kit) -> pl.DataFrame:
    """`part`, `origin`, `reason`, `detail` and `related` of every row, in order of reading."""
    names = [given.called for given in mix.inputs]
    called = pl.col("input").replace_strict(dict(enumerate(names)), return_dtype=pl.String())
    rows = survey.sort("input", "key", "mark", "part", "at").with_columns(
        name=called, number=pl.col("at").cum_count().over("input", "key")
    )
    is_version = pl.col("id") != ""
    rows = rows.with_columns(
        origin=pl.when(is_version)
        .then("id")
        .otherwise(pl.format("{}/{}#{}", "name", "key", "number")),
        keeper=pl.col("name").sort_by("rank", "input").first().over("key"),
    )
    repeated = (
        pl.when(is_version & (pl.col("keeper") != pl.col("name")))
        .then(pl.format("the same row stands in input '{}'", "keeper"))
        .when(pl.col("key").str.starts_with("key:") & (pl.col("number") > 1))
        .then(pl.format("the {} stands on another row of input '{}' too", "key", "name"))
    )
    rows = rows.with_columns(detail=repeated, related=pl.lit("")).with_columns(
        reason=pl.when(pl.col("detail").is_not_null()).then(pl.lit("repeated_row"))
    )
    if mix.kind == "Pair":
        rows = without_conflicts(rows, decide=mix.conflicts != "drop_both")
    rows = _drawn(mix, rows, kit)
    if mix.require != "nothing":
        taken = rows.filter(pl.col("reason").is_null())
        check_licences(mix.inputs, taken, commercial=mix.require == "commercial")
    return rows.sort("part", "at").select(
        "part", "origin", pl.col("reason", "detail", "related").fill_null("")
    )


def _drawn(mix: Mix, rows: pl.DataFrame, kit: Kit) -> pl.DataFrame:
    """Rows with `reason` and `detail` of those beyond their input's share or cap."""
    free = rows.filter(pl.col("reason").is_null())
    found = dict(free.group_by("input").len().iter_rows())
    have = [found.get(position, 0) for position in range(len(mix.inputs))]
    spare = [pl.DataFrame(schema={"part": pl.UInt32(), "at": pl.UInt32(), "spare": pl.String()})]
    for position, count in enumerate(taken_of(mix.inputs, have, mix.rows, strict=mix.strict)):
        if count < have[position]:
            mine = free.filter(pl.col("input") == position)
            draws = [kit.rng(origin, "mix").random() for origin in mine["origin"]]
            left = mine.with_columns(draw=pl.Series(draws)).sort("draw", "origin")[count:]
            said = f"{count:,} of {have[position]:,} rows of this input are taken"
            spare.append(left.select("part", "at", spare=pl.lit(said)))
    return (
        rows.join(pl.concat(spare), on=["part", "at"], how="left")
        .with_columns(
            reason=pl.when(pl.col("spare").is_not_null())
            .then(pl.lit("not_taken"))
            .otherwise("reason"),
            detail=pl.coalesce("spare", "detail"),
        )
        .drop("spare")
    )
