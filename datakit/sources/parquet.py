"""Rows of Parquet files.

Source: one Parquet file, all of a folder (`*.parquet`, also in folders below), or a glob. Public
    preference sets come in many layouts; the columns are known by their names or mapped by
    `columns`.
Takes: nothing.
Gives: the kind that `kind` names, a row for each row; with `group_by` one Candidates for each
    group of rows.
Measures: `<alias>.<column>` for each column mapped by `measures`, as the source states it; in a
    Pair a column of one side ends in `.chosen` or `.rejected`.
Drops: rows that are no valid record, as `null_value`, `wrong_type`, `empty_text`, `unknown_role`,
    `prefix_mismatch` or `invalid_row`; each with file, row and column.
"""

import hashlib
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import Field

from datakit.errors import InputError
from datakit.kit import Kit
from datakit.records import Record
from datakit.sources._arrow import schema_types, table_rows
from datakit.sources._table import ROWS_PER_RANGE, Numbered, TabularSource, find_files, stem
from datakit.step import Range, Reject
from datakit.text import digest

SUFFIXES = (".parquet",)


class Parquet(TabularSource):
    """Reads Parquet files."""

    path: str = Field(min_length=1)

    def ranges(self, kit: Kit) -> Iterator[Range]:
        """Runs of row groups; with `group_by` everything at once, since a group may be anywhere."""
        found = [
            one for name, path in find_files(kit, self.path, SUFFIXES) for one in _runs(name, path)
        ]
        if self.group_by is None:
            yield from found
        elif found:
            marks = [[one.name, one.start, one.stop, one.fingerprint] for one in found]
            yield Range(name="", fingerprint=digest(marks))

    async def read(self, part: Range, kit: Kit) -> Iterable[Record | Reject]:
        files = dict(find_files(kit, self.path, SUFFIXES))
        parts = [part]
        if self.group_by is not None:
            parts = [one for name, path in files.items() for one in _runs(name, path)]
        return self.converted(row for one in parts for row in self._rows(one, files[one.name], kit))

    def _rows(self, part: Range, path: Path, kit: Kit) -> Iterator[Numbered]:
        file = _open(part.name, path)
        types = schema_types(file.schema_arrow)
        layout = self.layout(part.name, stem(part.name, SUFFIXES), "row", types, kit)
        number = part.first_row
        for group in range(part.start, part.stop):
            table = _read_group(part.name, file, group)
            for row in table_rows(layout, number, table):
                yield layout, number, row
                number += 1


def _runs(name: str, path: Path) -> Iterator[Range]:
    """Runs of row groups of about ROWS_PER_RANGE rows."""
    if not path.stat().st_size:
        return
    metadata = _open(name, path).metadata
    # The name is in the rows and in their rejects: a renamed file is read again.
    fingerprint = digest([name, _hash(path)])
    start, first_row, rows = 0, 1, 0
    for group in range(metadata.num_row_groups):
        rows += metadata.row_group(group).num_rows
        if rows >= ROWS_PER_RANGE or (rows and group + 1 == metadata.num_row_groups):
            yield Range(
                name=name, start=start, stop=group + 1, first_row=first_row, fingerprint=fingerprint
            )
            start, first_row, rows = group + 1, first_row + rows, 0


def _open(name: str, path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{name}: cannot be read as Parquet ({str(path)!r}): {error}") from error


def _read_group(name: str, file: Any, group: int) -> Any:
    import pyarrow as pa

    try:
        return file.read_row_group(group)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{name}: row group {group} is broken: {error}") from error


def _hash(path: Path) -> str:
    """Hex blake2b of a file's bytes, read once as long as size and time stand."""
    about = path.stat()
    return _bytes_hash(path, about.st_size, about.st_mtime_ns)


@lru_cache(maxsize=4096)
def _bytes_hash(path: Path, size: int, mtime_ns: int) -> str:
    del size, mtime_ns
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
