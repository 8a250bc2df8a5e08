"""Which split a row belongs to: decided by the cluster of its root prompt, once and for ever.

A root prompt is the source row at the start of a row's line; its cluster is every root that a
duplicate step joined it to, and every root with the same first user turn. A cluster has the split
of its oldest member in the version before; a new one goes by the hash of its first member. A
newcomer that touches two splits is dropped, so that neither split leaks into the other and no
published row ever moves.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import polars as pl

from datakit.clusters import components
from datakit.errors import InputError
from datakit.neighbours import Pairs
from datakit.text import digest
from datakit.values import SPLIT_NAME

ROOTS = pl.Schema({"root": pl.String(), "key": pl.String(), "split": pl.String()})
"""Every root that ever had a split: its id, the hash of its first user turn, the split."""


@dataclass(frozen=True)
class Splits:
    """roots: ROOTS, the version before included; rows: `id` and `split`; bridging: `id`."""

    roots: pl.DataFrame
    rows: pl.DataFrame
    bridging: pl.DataFrame


def assign_splits(
    rows: pl.DataFrame,
    roots: pl.DataFrame,
    duplicates: pl.DataFrame,
    previous: pl.DataFrame,
    shares: Mapping[str, float],
    seed: int,
) -> Splits:
    """The split of every row.

    rows: `id`, `roots` (list). roots: `root`, `key`, `declared` (the source's own split or empty),
    in source order. duplicates: `one`, `other` (root ids). previous: ROOTS of the version before.
    shares: split to share, adding up to 1.
    """
    for name in roots["declared"].unique():
        if name and not SPLIT_NAME.fullmatch(name):
            raise InputError(f"the source declares a split {name!r}; names are of a-z, 0-9 and _")
    new = roots.join(previous, on="root", how="anti", maintain_order="left")
    new = new.with_row_index("node")
    clustered = new.with_columns(cluster=pl.Series(_clusters(new, duplicates), dtype=pl.Int64()))
    touched = _touched(clustered, duplicates, previous)
    decided = clustered.join(touched, on="cluster", how="left").sort("node")
    drawn = decided.group_by("cluster", maintain_order=True).agg(pl.col("key").first())
    drawn = drawn.with_columns(
        drawn=pl.Series([_draw(key, shares, seed) for key in drawn["key"]], dtype=pl.String())
    )
    # What a source holds out stays held out, unless the version before published it otherwise.
    held_out = ~pl.col("declared").is_in(["", "train"]) & (
        pl.col("old").list.set_difference(pl.concat_list("declared")).list.len() == 0
    )
    splits = (
        pl.when(held_out)
        .then(pl.col("declared"))
        .when(pl.col("splits").list.len() == 1)
        .then(pl.col("splits").list.first())
        .when(pl.col("splits").list.len() == 0)
        .then(pl.col("drawn"))
    )
    fresh = decided.join(drawn.drop("key"), on="cluster", how="left").with_columns(split=splits)
    known = pl.concat([previous, fresh.filter(pl.col("split").is_not_null()).select(ROOTS.names())])
    return _of_rows(rows, known)


def _clusters(new: pl.DataFrame, duplicates: pl.DataFrame) -> np.ndarray:
    """Components of the newcomers alone: published roots never join two clusters."""
    number = new.select("root", "node")
    joined = duplicates.join(number, left_on="one", right_on="root").join(
        number, left_on="other", right_on="root", suffix="_other"
    )
    first = pl.col("node").first().over("key")
    same = new.select("node", node_other=first).filter(pl.col("node") != pl.col("node_other"))
    edges = pl.concat([joined.select("node", "node_other"), same])
    ends = [edges[name].to_numpy().astype(np.int64) for name in ("node", "node_other")]
    return components(new.height, Pairs(ends[0], ends[1], np.ones(len(ends[0]), np.float32)))


def _touched(new: pl.DataFrame, duplicates: pl.DataFrame, previous: pl.DataFrame) -> pl.DataFrame:
    """For each cluster: the splits of its published neighbours, alone and with the declared ones.

    Columns `cluster`, `old` and `splits` (lists).
    """
    both = pl.concat([duplicates, duplicates.select(one="other", other="one")])
    neighbours = (
        new.select("cluster", one="root")
        .join(both, on="one")
        .join(previous, left_on="other", right_on="root")
    )
    same = new.select("cluster", "key").join(previous, on="key")
    old = pl.concat([neighbours.select("cluster", "split"), same.select("cluster", "split")])
    declared = new.filter(pl.col("declared") != "").select("cluster", split="declared")
    every = (
        pl.concat([old.with_columns(old=True), declared.with_columns(old=False)])
        .group_by("cluster")
        .agg(
            old=pl.col("split").filter(pl.col("old")).unique().sort(),
            splits=pl.col("split").unique().sort(),
        )
    )
    none = pl.lit([], pl.List(pl.String()))
    return (
        new.select("cluster")
        .unique()
        .join(every, on="cluster", how="left")
        .with_columns(pl.col("old").fill_null(none), pl.col("splits").fill_null(none))
    )


def _draw(key: str, shares: Mapping[str, float], seed: int) -> str:
    """A split by the hash of a root's key; the same key always draws the same."""
    place = int(digest(["split", seed, key])[:13], 16) / 16**13
    for split, share in shares.items():
        place -= share
        if place < 0:
            return split
    return next(reversed(list(shares)))


def _of_rows(rows: pl.DataFrame, known: pl.DataFrame) -> Splits:
    """A row whose roots all have one split has that split; any other bridges splits."""
    found = (
        rows.select("id", "roots")
        .with_row_index("row")
        .explode("roots")
        .join(known.select("root", "split"), left_on="roots", right_on="root", how="left")
        .group_by("row", "id")
        .agg(splits=pl.col("split").drop_nulls().unique().sort(), lost=pl.col("split").has_nulls())
        .sort("row")
    )
    whole = (pl.col("splits").list.len() == 1) & ~pl.col("lost")
    clear = found.filter(whole).select("id", split=pl.col("splits").list.first())
    bridging = found.filter(~whole).select("id")
    return Splits(roots=known, rows=clear, bridging=bridging)
