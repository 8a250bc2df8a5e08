"""What `sources.mix` reads from: an address, and the source step that reads such an address."""

import copy
import glob
import re
from collections.abc import Coroutine, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ConfigDict, Field, ValidationError

from datakit.errors import BugError, InputError
from datakit.kit import Kit
from datakit.records import Record
from datakit.sources import dataset, hub, jsonl, parquet
from datakit.step import Range, Reject, SourceStep
from datakit.values import Number, Value

T = TypeVar("T")

NAME = r"^([a-z][a-z0-9_]*)?$"
_HUB = re.compile(
    r"hub:(?P<dataset>[\w.-]+/[\w.-]+)(/(?P<config>[^:@/]+))?(:(?P<split>[^:@]+))?"
    r"(@(?P<revision>.+))?"
)
_VERSION = re.compile(r"[a-z0-9][a-z0-9_-]*(@[\w.-]+)?")
_FILES: dict[str, type[SourceStep[Record]]] = {
    **dict.fromkeys(parquet.SUFFIXES, parquet.Parquet),
    **dict.fromkeys(jsonl.SUFFIXES, jsonl.Jsonl),
}


class MixInput(Value):
    """One input of a mix.

    from: `name[@x.y.z]`, a path, folder or glob, or `hub:org/name[/config][:split][@revision]`;
    name: what its measures begin with, by default made of the address; share: of the mixed rows;
    cap: at most so many rows; license: of rows that state none; weight: of each row in training;
    priority: the higher wins under `conflicts: highest_priority`; columns: role to column.
    """

    model_config = ConfigDict(serialize_by_alias=True, validate_by_name=True)

    address: str = Field(alias="from", min_length=1)
    name: str = Field(default="", pattern=NAME)
    share: Number | None = Field(default=None, gt=0, le=1)
    cap: int | None = Field(default=None, ge=1)
    license: str = ""
    weight: Number = Field(default=1.0, gt=0)
    priority: int = 0
    columns: dict[str, str | tuple[str, ...]] = Field(default={})
    private: bool = False

    @property
    def called(self) -> str:
        """`name`, or one made of the address: `hub:org/My-Set@v1` is `my_set`."""
        if self.name:
            return self.name
        found = _HUB.fullmatch(self.address)
        if found:
            last = found["dataset"].partition("/")[2]
        elif _VERSION.fullmatch(self.address):
            last = self.address.partition("@")[0]
        else:
            named = [
                part
                for part in Path(self.address).parts
                if re.search(r"\w", part) and not glob.has_magic(part)
            ]
            last = named[-1].partition(".")[0] if named else ""
        plain = re.sub(r"[^a-z0-9]+", "_", last.lower()).strip("_")
        return plain if re.match("[a-z]", plain) else f"input_{plain}".rstrip("_")


def open_input(given: MixInput, kind: str, kit: Kit) -> SourceStep[Record]:
    """The step that reads an input. Raises InputError where the address names nothing."""
    step, fields = _placed(given, kit)
    where = f"input {given.called!r} ({given.address!r})"
    if step is dataset.Dataset:
        if given.columns:
            raise InputError(f"{where}: a version has no columns to map; leave out `columns`")
    elif kind == "Judged":
        raise InputError(f"{where}: Judged rows are read from versions only")
    else:
        fields |= {"columns": given.columns, "license": given.license}
    try:
        return step.model_validate({"kind": kind, "private": given.private} | fields)
    except ValidationError as error:
        said = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise InputError(f"{where}: {said}") from error


def _placed(given: MixInput, kit: Kit) -> tuple[type[SourceStep[Record]], dict[str, Any]]:
    """Which step reads the address, and the fields that name it there."""
    address = given.address
    if address.startswith("hub:"):
        found = _HUB.fullmatch(address)
        if found is None:
            raise InputError(f"{address!r} is not hub:org/name[/config][:split][@revision]")
        fields = {name: value for name, value in found.groupdict().items() if value}
        # A branch is looked up at each run; a commit names the same rows for ever.
        return hub.Hub, {"revision": "main"} | fields
    if _VERSION.fullmatch(address):
        return dataset.Dataset, {"dataset": address}
    for suffix, step in _FILES.items():
        if address.endswith(suffix):
            return step, {"path": address}
    folder = kit.path(address)
    if (folder / "manifest.json").is_file():
        return dataset.Dataset, {"dataset": address}
    held = {step for suffix, step in _FILES.items() if next(folder.rglob(f"*{suffix}"), None)}
    if len(held) != 1:
        raise InputError(
            f"{address!r} holds {'both Parquet and JSON Lines' if held else 'no data'} files; "
            "name a file, or end a glob in the suffix"
        )
    return held.pop(), {"path": address}


def kit_of(given: MixInput, kit: Kit) -> Kit:
    """The kit of the step behind an input, whose measures begin with the input's name."""
    inner = copy.copy(kit)
    inner.alias = given.called
    return inner


def rows_of(
    source: SourceStep[Record], part: Range, kit: Kit
) -> Iterator[tuple[int, Record | Reject]]:
    """(number, row or reject) of one range, numbered from 0."""
    found: Iterable[Record | Reject] = _at_once(source.read(part, kit))  # type: ignore[arg-type]
    return enumerate(found)


def _at_once(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that waits for nothing, as reading a file does."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    coroutine.close()
    raise BugError("a source of a mix waits for something")
