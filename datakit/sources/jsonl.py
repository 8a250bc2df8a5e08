"""Rows of JSON Lines files, one JSON object a line.

Source: one file (`.jsonl`, `.ndjson`, either also with `.gz`; a `.json` file of lines or of one
    list), all of a folder, or a glob. The columns are the keys of the first 1,000 lines, known by
    their names or mapped by `columns`.
Takes: nothing.
Gives: the kind that `kind` names, a row for each line; with `group_by` one Candidates for each
    group of lines.
Measures: `<alias>.<column>` for each column mapped by `measures`, as the source states it; in a
    Pair a column of one side ends in `.chosen` or `.rejected`.
Drops: lines that are no JSON object in UTF-8 (`broken_line`), and rows that are no valid record
    (`null_value`, `wrong_type`, `empty_text`, `unknown_role`, `prefix_mismatch`, `invalid_row`);
    each with file, line and column. Blank lines are no rows.
"""

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import cast

from pydantic import Field

from datakit.errors import InputError, Rejected
from datakit.kit import Kit
from datakit.records import Record
from datakit.sources._layouts import Layout, Row, value_types
from datakit.sources._table import Numbered, TabularSource, find_files, reject, stem
from datakit.step import Range, Reject
from datakit.text import digest

SUFFIXES = (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz", ".json")
RANGE_BYTES = 16_000_000
RANGE_LINES = 5_000
SAMPLE_LINES = 1_000


class Jsonl(TabularSource):
    """Reads JSON Lines."""

    path: str = Field(min_length=1)

    def ranges(self, kit: Kit) -> Iterator[Range]:
        """Runs of lines; with `group_by` everything at once, since a group may be anywhere."""
        files = find_files(kit, self.path, SUFFIXES)
        if self.group_by is None:
            for name, path in files:
                yield from _runs(name, path)
            return
        marks = [one.fingerprint for name, path in files for one in _runs(name, path)]
        if marks:
            yield Range(name="", fingerprint=digest(marks))

    async def read(self, part: Range, kit: Kit) -> Iterable[Record | Reject]:
        files = dict(find_files(kit, self.path, SUFFIXES))
        parts = [part]
        if self.group_by is not None:
            parts = [one for name, path in files.items() for one in _runs(name, path)]
        return self.converted(row for one in parts for row in self._rows(one, files[one.name], kit))

    def _rows(self, part: Range, path: Path, kit: Kit) -> Iterator[Numbered]:
        about = path.stat()
        types = _types(part.name, path, about.st_size, about.st_mtime_ns)
        unit = _unit(path)
        if types:
            layout = self.layout(part.name, stem(part.name, SUFFIXES), unit, types, kit)
        else:  # not one good line: all are rejected as they are
            layout = Layout(part.name, unit, self.kind, {})
        for number, row in _parsed(part, path):
            yield layout, number, row


@lru_cache(maxsize=256)
def _types(name: str, path: Path, size: int, mtime_ns: int) -> dict[str, frozenset[str]]:
    """What the columns hold, looked at once as long as size and time of the file stand."""
    del size, mtime_ns
    # The columns are looked for in the first range only, so that lines added later cannot change
    # how it was read.
    first = next(_runs(name, path))
    known = (row for _, row in _parsed(first, path) if isinstance(row, dict))
    return value_types(islice(known, SAMPLE_LINES))


def _runs(name: str, path: Path) -> Iterator[Range]:
    """Runs of whole lines of about RANGE_BYTES, each with the hash of its own bytes only.

    A file that grows keeps all its ranges but the last. A run of short lines ends at RANGE_LINES,
    since a row in memory is far larger than its line.
    """
    start, first_row, size, lines = 0, 1, 0, 0
    # The name is in the rows and in their rejects: a renamed file is read again.
    mark = hashlib.blake2b(name.encode(), digest_size=16)
    whole = _unit(path) == "item"

    def so_far() -> Range:
        return Range(
            name=name,
            start=start,
            stop=start + size,
            first_row=first_row,
            fingerprint=mark.hexdigest(),
        )

    for line in _lines(name, path, 0):
        mark.update(line)
        size += len(line)
        lines += 1
        if (size >= RANGE_BYTES or lines == RANGE_LINES) and not whole:
            yield so_far()
            start, first_row, size, lines = start + size, first_row + lines, 0, 0
            mark = hashlib.blake2b(name.encode(), digest_size=16)
    if size:
        yield so_far()


def _parsed(part: Range, path: Path) -> Iterator[tuple[int, Row | Reject]]:
    """(number, object) of each line or item; what is none is rejected."""
    if _unit(path) == "item":
        yield from _items(part.name, path)
        return
    left = part.stop - part.start
    for number, line in enumerate(_lines(part.name, path, part.start), start=part.first_row):
        if line.strip():
            yield number, _object(f"{part.name}, line {number}", line)
        left -= len(line)
        if left <= 0:
            return


def _object(place: str, line: bytes) -> Row | Reject:
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        problem = f"not UTF-8 at byte {error.start + 1}"
    except (ValueError, RecursionError) as error:
        problem = f"not valid JSON: {error}"
    else:
        if isinstance(value, dict):
            return cast("Row", value)
        problem = f"a JSON {type(value).__name__}, not an object"
    raw = line.decode("utf-8", "backslashreplace")
    return reject(place, raw, Rejected("broken_line", problem))


def _items(name: str, path: Path) -> Iterator[tuple[int, Row | Reject]]:
    """The items of a file that holds one list."""
    try:
        items: list[object] = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name}: not a valid JSON list ({str(path)!r}): {error}") from error
    for number, item in enumerate(items, start=1):
        if isinstance(item, dict):
            yield number, cast("Row", item)
        else:
            fault = Rejected("broken_line", f"a JSON {type(item).__name__}, not an object")
            yield number, reject(f"{name}, item {number}", item, fault)


def _unit(path: Path) -> str:
    """What a row is called: a `.json` file holds one list, or lines like the others."""
    if path.suffix != ".json":
        return "line"
    with path.open("rb") as file:
        head = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    return "item" if head.startswith(b"[") else "line"


def _lines(name: str, path: Path, start: int) -> Iterator[bytes]:
    """The lines from byte `start` (of the unpacked text) on, with their ends."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            file.seek(start)
            yield from file
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{name}: cannot be read ({str(path)!r}): {error}") from error
