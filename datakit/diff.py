"""What changed between two versions of a dataset, and the smallest version number that says so.

Major: more than 5 % of the rows relabelled or removed, or a column removed or of another type.
Minor: rows or columns added, or fewer relabelled, removed or rescored. Patch: the same rows.
"""

import numpy as np
import polars as pl

from datakit.export import Hashes
from datakit.ids import Ids, packed, places
from datakit.values import Value
from datakit.versions import number

_SMALL = 0.05
_BATCH = 10_000


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


def compare(before: pl.LazyFrame, after: pl.LazyFrame, hashes: tuple[Hashes, Hashes]) -> Change:
    """Compare two published tables of one kind.

    hashes: those of the rows of each side, in any order. Rows that another id tells apart but that
    say the same about the same pair count as rescored.
    """
    schemas = before.collect_schema(), after.collect_schema()
    changed = [name for name, dtype in schemas[0].items() if schemas[1].get(name) != dtype]
    old, new = hashes
    place = places(old["id"], new["id"])
    stays = place >= 0
    rescored = int((old["hash"][stays] != new["hash"][place[stays]]).sum())
    gone, come = old["id"][~stays], new["id"][places(new["id"], old["id"]) < 0]
    added, removed, relabelled = len(come), len(gone), 0
    if all("pair_key" in schema for schema in schemas) and added and removed:
        left, right = _keys(before, gone), _keys(after, come)
        met = left.join(right, on="key", suffix="_after").unique("id")
        relabelled = met.filter(pl.col("label") != pl.col("label_after")).height
        rescored += met.height - relabelled
        added = right.join(left, on="key", how="anti").height
        removed -= met.height
    return Change(
        rows_before=len(old),
        rows_after=len(new),
        added=added,
        removed=removed,
        relabelled=relabelled,
        rescored=rescored,
        columns_added=tuple(sorted(set(schemas[1]) - set(schemas[0]))),
        columns_removed=tuple(sorted(changed)),
    )


def _keys(table: pl.LazyFrame, wanted: Ids) -> pl.DataFrame:
    """`id`, `key` (what is compared) and `label` (hash of what is preferred) of some rows."""
    preferred = pl.struct("prompt", "chosen").struct.json_encode().hash()
    lines = table.select("id", key="pair_key", label=preferred)
    found = [pl.DataFrame(schema={"id": pl.String(), "key": pl.String(), "label": pl.UInt64()})]
    rows = table.select(pl.len()).collect().item()
    for start in range(0, rows, _BATCH):
        some = lines.slice(start, _BATCH).collect()
        here = np.isin(packed(some["id"].to_list()), wanted)
        found.append(some.filter(pl.Series(here)))
    return pl.concat(found)


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
