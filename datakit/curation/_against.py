"""A set that stands already, against which a step compares its rows: a version, or a file.

    against: pairs            the newest version of that dataset
    against: pairs@1.2.0      that version
    against: ../old/1.2.0     the folder of a version
    against: held_out.jsonl   a file of rows: .parquet, .jsonl or .ndjson

A file has columns as a record has them (`prompt`, `chosen`, ..., as texts or lists of turns), or
one column `text`; and `id`, or its rows are named by file and number.
"""

import hashlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import polars as pl

from datakit.curation._texts import Over, text_columns
from datakit.errors import InputError
from datakit.kit import Kit
from datakit.text import digest
from datakit.versions import Version, find_version

_SUFFIXES = (".parquet", ".jsonl", ".ndjson")
_ROWS = 20_000


def reference_name(against: str, kit: Kit) -> str:
    """What the set is called in a message: `pairs@1.2.0`, or the name of the file."""
    return Path(against).name if against.endswith(_SUFFIXES) else _version(against, kit).address


def reference_fingerprint(against: str, kit: Kit) -> str:
    """The digest of the version, or the hash of the file and its name."""
    if not against.endswith(_SUFFIXES):
        return _version(against, kit).manifest.digest
    path = kit.path(against)
    about = path.stat()
    return digest([path.name, _bytes_hash(path, about.st_size, about.st_mtime_ns)])


def standing(table: pl.LazyFrame, against: str, kit: Kit) -> tuple[pl.Series, pl.Series]:
    """Which of our rows stand in the set, and which of its rows do not come from ours.

    Both boolean, in the order of `table` and of the set. A row stands there by its own id, or where
    a row there was made of it; where no row does, because the set holds what later steps make of
    ours, by its roots.
    """
    theirs = _table(against, "row", kit)
    names = [name for name in ("parents", "roots") if name in theirs.collect_schema().names()]
    made_of = pl.concat_list("id", *names) if names else pl.concat_list("id")
    lines = _collected(theirs.select(line=made_of), against).with_row_index("row")
    size = lines.height
    lines = lines.explode("line")
    rows = table.select("id", "roots").collect().with_row_index("row")
    for own in (rows.select("row", line="id"), rows.select("row", line="roots").explode("line")):
        ours = own.join(lines, on="line", how="semi")
        if ours.height:
            come = lines.join(ours, on="line", how="semi")
            return _at(rows.height, ours["row"]), ~_at(size, come["row"])
    return _at(rows.height, rows["row"].clear()), ~_at(size, lines["row"].clear())


def _at(size: int, rows: pl.Series) -> pl.Series:
    """True at these rows of `size`."""
    return pl.int_range(size, dtype=pl.UInt32, eager=True).is_in(rows.cast(pl.UInt32).implode())


def reference_rows(against: str, over: Over, wanted: pl.Series, kit: Kit) -> Iterator[pl.DataFrame]:
    """`id` and the columns that are compared, some thousand rows at a time, in its order.

    wanted: which of its rows, as booleans. Raises InputError where it cannot be read, or has no
    column to compare.
    """
    table = _table(against, over, kit)
    names = table.collect_schema().names()
    columns = [name for name in text_columns(over) if name in names]
    if not columns:
        given = [name for name in names if name not in ("id", "_row")]
        needed = f"`over: {over}` needs one of {', '.join(text_columns(over))} or `text`"
        raise InputError(f"`against: {against}`: {needed}; it has {', '.join(given)}")
    for start in range(0, wanted.len(), _ROWS):
        some = wanted.slice(start, _ROWS)
        if some.any():
            rows = _collected(table.slice(start, _ROWS).select("id", *columns), against)
            # A row of a file without any text is none to compare with.
            has_text = pl.any_horizontal(pl.col(columns).is_not_null())
            yield rows.filter(some).filter(has_text)


def _table(against: str, over: Over, kit: Kit) -> pl.LazyFrame:
    """All rows, with `id`; a file's `text` stands for whatever is compared."""
    if not against.endswith(_SUFFIXES):
        return _version(against, kit).scan()
    path = kit.path(against)
    try:
        if path.suffix == ".parquet":
            table = pl.scan_parquet(path)
        else:
            table = pl.read_ndjson(path, infer_schema_length=None).lazy()
        names = table.collect_schema().names()
    except (pl.exceptions.PolarsError, OSError) as error:
        raise _unreadable(against, error) from error
    table = table.with_row_index("_row", offset=1)
    place = pl.format("{}#{}", pl.lit(path.name), pl.col("_row"))
    given = [pl.col("id").cast(pl.String)] if "id" in names else []
    table = table.with_columns(pl.coalesce(*given, place).alias("id"))
    if "text" in names and not set(names) & set(text_columns("row")):
        table = table.with_columns(pl.col("text").alias(text_columns(over)[0]))
    return table


def _version(against: str, kit: Kit) -> Version:
    # A folder is seen from the recipe, like every other path in it.
    address = str(kit.path(against)) if "/" in against else against
    try:
        return find_version(kit.outputs, address)
    except InputError as error:
        raise InputError(
            f"`against: {against}`: {error}; leave `against` out until a version exists"
        ) from error


def _collected(table: pl.LazyFrame, against: str) -> pl.DataFrame:
    try:
        return table.collect()
    except (pl.exceptions.PolarsError, OSError) as error:
        raise _unreadable(against, error) from error


def _unreadable(against: str, error: Exception) -> InputError:
    first = str(error).partition("\n")[0]
    return InputError(f"`against: {against}`: cannot be read: {first}")


@lru_cache(maxsize=256)
def _bytes_hash(path: Path, size: int, mtime_ns: int) -> str:
    del size, mtime_ns
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
