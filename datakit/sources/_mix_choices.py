"""What `sources.mix` takes of its inputs: shares, contradicting labels, licences."""

from collections.abc import Sequence
from fractions import Fraction

import polars as pl

from datakit import licences
from datakit.errors import InputError
from datakit.ids import ID_BYTES
from datakit.sources._mix_inputs import MixInput
from datakit.text import digest

SURVEY = pl.Schema(
    {
        "part": pl.UInt32(),
        "at": pl.UInt32(),
        "input": pl.UInt32(),
        "rank": pl.Int64(),
        "id": pl.String(),
        "key": pl.String(),
        "content": pl.String(),
        "mark": pl.String(),
        "license": pl.String(),
        "pair": pl.String(),
        "forward": pl.Boolean(),
    }
)
"""A row as the first reading sees it. part: number of its range; at: its place there; rank: of its
input, 0 wins; key: id, declared key or content; mark: hash of all but the file's name; pair:
pair_key; forward: which of the two labels."""


def without_conflicts(rows: pl.DataFrame, *, decide: bool) -> pl.DataFrame:
    """Pairs with `reason`, `detail`, `related` of those whose opposite another input holds.

    decide: the rows with the label of the lowest rank stay, where that rank has one label only.
    """
    free = rows.filter(pl.col("reason").is_null())
    group = (
        free.group_by("pair")
        .agg(
            inputs=pl.col("input").n_unique(),
            labels=pl.col("forward").n_unique(),
            winners=pl.col("forward").filter(pl.col("rank") == pl.col("rank").min()).unique(),
        )
        .filter((pl.col("inputs") > 1) & (pl.col("labels") > 1))
        .select(
            "pair",
            wins=pl.when(pl.col("winners").list.len() == 1).then(pl.col("winners").list.first()),
        )
    )
    if not decide:
        group = group.with_columns(wins=pl.lit(None, pl.Boolean()))
    fought = free.join(group, on="pair")
    losing = fought.filter(pl.col("wins").is_null() | (pl.col("wins") != pl.col("forward")))
    # The row it lost to: the opposite label of the best input, of the smallest origin.
    best = fought.sort("rank", "input", "origin").group_by("pair", "forward").first()
    opposite = best.select(
        "pair",
        ~pl.col("forward"),
        by="name",
        winner=pl.struct("id", "origin", "content").map_elements(
            lambda one: one["id"] or digest(["Pair", one["origin"], one["content"]], ID_BYTES),
            return_dtype=pl.String(),
        ),
    )
    lost = losing.join(opposite, on=["pair", "forward"]).select(
        "part",
        "at",
        "winner",
        lost=pl.format(
            "input '{}' holds this pair with the opposite label: row {}", "by", "winner"
        ),
    )
    return (
        rows.join(lost, on=["part", "at"], how="left")
        .with_columns(
            reason=pl.when(pl.col("lost").is_not_null())
            .then(pl.lit("label_conflict"))
            .otherwise("reason"),
            detail=pl.coalesce("lost", "detail"),
            related=pl.coalesce("winner", "related"),
        )
        .drop("lost", "winner")
    )


def taken_of(
    inputs: Sequence[MixInput],
    have: Sequence[int],
    rows: int | None = None,
    *,
    strict: bool = False,
) -> list[int]:
    """How many rows each input gives, of as many as it has.

    With shares s the total is the largest T with s T <= rows up to the cap for every input, and
    each gives s T, rounded by largest remainders. Raises InputError where an input has none, or
    runs short under `strict`.
    """
    most = [
        count if given.cap is None else min(count, given.cap)
        for given, count in zip(inputs, have, strict=True)
    ]
    stated = [Fraction(str(given.share)) for given in inputs if given.share is not None]
    if not stated:
        return most
    shares = [share / sum(stated) for share in stated]
    for given, count, share in zip(inputs, most, shares, strict=True):
        if not count:
            raise InputError(
                f"input {given.called!r} ({given.address!r}) has no row for its share {given.share}"
            )
        need = -(-share * rows // 1) if rows else 0
        if strict and need > count:
            capped = "" if given.cap is None else f" (cap {given.cap:,})"
            raise InputError(
                f"input {given.called!r} ({given.address!r}) has {count:,} rows{capped}, but share "
                f"{given.share} of {rows:,} rows needs {int(need):,}; lower `rows` or the "
                "share, or leave out `strict`"
            )
    total = min(int(count / share) for count, share in zip(most, shares, strict=True))
    total = min(total, rows or total)
    exact = [share * total for share in shares]
    counts = [int(one) for one in exact]
    order = sorted(range(len(counts)), key=lambda i: (counts[i] - exact[i], inputs[i].called))
    for position in order[: total - sum(counts)]:
        counts[position] += 1
    return counts


def check_licences(inputs: Sequence[MixInput], rows: pl.DataFrame, *, commercial: bool) -> None:
    """Raises InputError where the licences of taken rows exclude each other, or commercial use."""
    held = rows.select("input", "license").unique().sort("input", "license")
    names = [(inputs[position].called, name) for position, name in held.iter_rows()]
    clash = licences.clash(name for _, name in names)
    if clash:
        said = [
            f"{called!r} ({name})"
            for called, name in names
            if set(clash) & {licences.canonical(one) for one in licences.parts(name)}
        ]
        raise InputError(
            f"the licences {' and '.join(clash)} exclude each other, and stand in inputs "
            f"{', '.join(said)}; leave one out, or write `require: nothing`"
        )
    if commercial:
        bad = [
            f"{called!r} ({name or 'unknown'})"
            for called, name in names
            if not licences.is_commercial(name)
        ]
        if bad:
            raise InputError(
                f"`require: commercial`, but inputs {', '.join(bad)} forbid commercial use or are "
                "under an unknown licence; state it with `license:`, or leave them out"
            )
