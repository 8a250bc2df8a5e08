"""What changed between two versions of a dataset, and the smallest version number that says so.

Major: more than 5 % of the rows relabelled or removed, or a column removed or of another type.
Minor: rows or columns added, or fewer relabelled, removed or rescored. Patch: the same rows.
"""

import polars as pl

from datakit.values import Value
from datakit.versions import number

_SMALL = 0.05


class Change(Value):
    """Counts of one comparison.

    relabelled: same prompt and answers, another label; rescored: the same row with other measures
    or provenance; configs: others than `default` whose rows changed.
    """

    rows_before: int = 0
    rows_after: int = 0
    added: int = 0
    removed: int = 0
    relabelled: int = 0
    rescored: int = 0
    columns_added: tuple[str, ...] = ()
    columns_removed: tuple[str, ...] = ()
    configs: tuple[str, ...] = ()

    @property
    def level(self) -> str:
        """`major`, `minor` or `patch`."""
        if self.columns_removed or self.removed + self.relabelled > _SMALL * self.rows_before:
            return "major"
        rows = self.added + self.removed + self.relabelled + self.rescored
        if rows or self.columns_added or self.configs:
            return "minor"
        return "patch"

    def summary(self) -> str:
        """One sentence for the manifest and the changelog."""
        counts = [
            f"{count:,} {what}"
            for count, what in (
                (self.added, "added"),
                (self.removed, "removed"),
                (self.relabelled, "relabelled"),
                (self.rescored, "rescored"),
            )
            if count
        ]
        fields = [f"column {name!r} added" for name in self.columns_added]
        fields += [f"column {name!r} removed" for name in self.columns_removed]
        fields += [f"config {name!r} changed" for name in self.configs]
        said = ", ".join([*(["rows: " + ", ".join(counts)] if counts else []), *fields])
        return said or "the same rows; card, recipe or files changed"


def compare(
    before: pl.LazyFrame, after: pl.LazyFrame, hashes: tuple[pl.DataFrame, pl.DataFrame]
) -> Change:
    """Compare two published tables of one kind.

    hashes: for each side a frame of `id` and `hash`, the hash of the whole row. Rows that another
    id tells apart but that say the same about the same pair count as rescored.
    """
    schemas = before.collect_schema(), after.collect_schema()
    changed = [name for name, dtype in schemas[0].items() if schemas[1].get(name) != dtype]
    paired = all("pair_key" in schema for schema in schemas)
    old, new = (_keys(table, paired) for table in (before, after))
    gone = old.join(new, on="id", how="anti")
    come = new.join(old, on="id", how="anti")
    met = gone.join(come, on="key", suffix="_after").unique("id")
    relabelled = met.filter(pl.col("label") != pl.col("label_after")).height
    same = hashes[0].join(hashes[1], on="id", suffix="_after")
    rescored = same.filter(pl.col("hash") != pl.col("hash_after")).height
    return Change(
        rows_before=old.height,
        rows_after=new.height,
        added=come.join(gone, on="key", how="anti").height,
        removed=gone.height - met.height,
        relabelled=relabelled,
        rescored=rescored + met.height - relabelled,
        columns_added=tuple(sorted(set(schemas[1]) - set(schemas[0]))),
        columns_removed=tuple(sorted(changed)),
    )


def _keys(table: pl.LazyFrame, paired: bool) -> pl.DataFrame:
    """`id`, `key` (what is compared) and `label` (what is preferred) of each row."""
    if not paired:
        return table.select("id", key="id", label=pl.lit("")).collect()
    preferred = pl.struct("prompt", "chosen").struct.json_encode()
    return table.select("id", key="pair_key", label=preferred).collect()


def next_version(before: str, change: Change) -> str:
    """The number after `before` that `change` asks for."""
    major, minor, patch = number(before)
    match change.level:
        case "major":
            return f"{major + 1}.0.0"
        case "minor":
            return f"{major}.{minor + 1}.0"
        case _:
            return f"{major}.{minor}.{patch + 1}"
