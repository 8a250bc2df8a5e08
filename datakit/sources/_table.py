"""What the sources of tabular rows share: the fields of their steps, groups, rejects."""

import glob
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, ValidationError, model_validator

from datakit.errors import InputError, Rejected
from datakit.kit import Kit
from datakit.records import KINDS, Record
from datakit.sources._cells import compact_json
from datakit.sources._layouts import ColumnTypes, Layout, Row, check_mapping, find_columns
from datakit.sources._records import RECORDS, Member, group_record, member
from datakit.step import Reject, SourceStep

ROWS_PER_RANGE = 20_000
RAW_CHARACTERS = 100_000

Numbered = tuple[Layout, int, Row | Reject]
"""A row (or what is none), its number in its file, and how to read it."""


class TabularSource(SourceStep[Record]):
    """A source whose rows have columns.

    kind: what each row is; columns: role to column, for names that are not known by themselves;
    group_by: rows with equal values here are the responses of one Candidates; license, source: of
    rows without a column for it (`source` is the file's stem where nothing is said).
    """

    kind: Literal["Prompt", "Conversation", "Edit", "Candidates", "Pair", "Label"]
    columns: dict[str, str | tuple[str, ...]] = Field(default={})
    group_by: str | tuple[str, ...] | None = None
    license: str = ""
    source: str = ""

    @model_validator(mode="after")
    def _mapping_is_sound(self) -> Self:
        check_mapping(self.kind, self.columns)
        if self.group_by is not None and self.kind != "Candidates":
            raise ValueError(f"group_by makes Candidates, not {self.kind}")
        if self.group_by is not None and "responses" in self.columns:
            raise ValueError("group_by takes one response from each row: map `response`")
        return self

    def gives(self, taken: type[Record] | None) -> type[Record]:
        del taken
        return KINDS[self.kind]

    def layout(self, file: str, stem: str, unit: str, types: ColumnTypes, kit: Kit) -> Layout:
        """How rows of these columns are read. Raises InputError where they cannot be."""
        columns = find_columns(file, self.kind, self.columns, types)
        for name in self.group_columns():
            if name not in types:
                raise InputError(
                    f"{file}: no column {name!r} to group by; columns: {', '.join(types)}"
                )
        if self.group_by is not None and "response" not in columns:
            raise InputError(
                f"{file}: group_by takes one response from each row; map it with "
                f"`columns: {{response: NAME}}`; columns: {', '.join(types)}"
            )
        return Layout(
            file, unit, self.kind, columns, self.license, self.source or stem, kit.measure("")
        )

    def group_columns(self) -> tuple[str, ...]:
        """The columns of `group_by`."""
        if self.group_by is None:
            return ()
        return (self.group_by,) if isinstance(self.group_by, str) else self.group_by

    def converted(self, rows: Iterable[Numbered]) -> Iterable[Record | Reject]:
        """Rows in order, each as its record or as the reject that says why not."""
        if self.group_by is not None:
            return self._grouped(rows)
        return (_record(layout, number, row) for layout, number, row in rows)

    def _grouped(self, rows: Iterable[Numbered]) -> list[Record | Reject]:
        """The rejected rows, then the groups in the order of their first row."""
        rejects: list[Record | Reject] = []
        groups: dict[tuple[str, ...], list[tuple[int, Member]]] = {}
        for layout, number, row in rows:
            if isinstance(row, Reject):
                rejects.append(row)
                continue
            try:
                key, one = self._group_key(row), member(layout, row)
                _same_prompt(groups.get(key), one)
            except (Rejected, ValidationError) as error:
                rejects.append(reject(layout.place(number), row, error))
            else:
                groups.setdefault(key, []).append((number, one))
        found: list[Record | Reject] = []
        for numbered in groups.values():
            members = [one for _, one in numbered]
            try:
                found.append(group_record(members, self.group_columns()))
            except (Rejected, ValidationError) as error:
                found += [reject(one.layout.place(at), one.row, error) for at, one in numbered]
        return [*rejects, *found]

    def _group_key(self, row: Row) -> tuple[str, ...]:
        for name in self.group_columns():
            if row.get(name) is None:
                raise Rejected("null_value", f"column {name!r}, the group, is null")
        return tuple(compact_json(row[name]) for name in self.group_columns())


def reject(place: str, row: object, error: Rejected | ValidationError) -> Reject:
    """The reject of a row (or of a text that is none); its detail begins with `place`."""
    if isinstance(error, Rejected):
        reason, detail = error.reason, error.detail
    else:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        said = first["msg"].removeprefix("Value error, ")
        reason, detail = "invalid_row", f"{where}: {said}".removeprefix(": ")
    raw = row if isinstance(row, str) else compact_json(row)
    return Reject(place=place, reason=reason, detail=_sound(f"{place}: {detail}"), raw=_sound(raw))


def find_files(kit: Kit, path: str, suffixes: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """(name, path) of the files that a file, folder or glob names, in the order of their names.

    A name is seen from the folder, so that it does not depend on where that lies. A glob is seen
    from the recipe's folder. Raises InputError where there are none.
    """
    if glob.has_magic(path):
        parts = Path(path).parts
        start = next(i for i, part in enumerate(parts) if glob.has_magic(part))
        folder = kit.path(str(Path(*parts[:start])))
        found = folder.glob(str(Path(*parts[start:])))
    else:
        given = kit.path(path)
        if given.is_file():
            yield given.name, given
            return
        folder = given
        found = (one for suffix in suffixes for one in given.rglob(f"*{suffix}"))
    files = {one.relative_to(folder).as_posix(): one for one in found if one.is_file()}
    if not files:
        raise InputError(f"no file for {path!r} in {str(folder)!r} ({', '.join(suffixes)})")
    for name in sorted(files):
        yield name, files[name]


def stem(name: str, suffixes: Sequence[str]) -> str:
    """A file's name without its folder and suffix."""
    last = name.rpartition("/")[2]
    return next((last.removesuffix(one) for one in suffixes if last.endswith(one)), last)


def _same_prompt(members: Sequence[tuple[int, Member]] | None, one: Member) -> None:
    if members is None:
        return
    number, first = members[0]
    if first.prompt != one.prompt:
        place = first.layout.place(number)
        raise Rejected("prefix_mismatch", f"the prompt is not that of its group, in {place}")


def _record(layout: Layout, number: int, row: Row | Reject) -> Record | Reject:
    if isinstance(row, Reject):
        return row
    try:
        return RECORDS[layout.kind](layout, row)
    except (Rejected, ValidationError) as error:
        return reject(layout.place(number), row, error)


def _sound(text: str) -> str:
    """At most RAW_CHARACTERS; half of a surrogate pair, which no file can hold, made visible."""
    return text[:RAW_CHARACTERS].encode("utf-8", "backslashreplace").decode()
