"""The grains of steps. A step is a frozen value that is its own configuration.

The grain says how the engine may cut the work:

    SourceStep[Out]       ranges(kit), async read(range, kit)    by range
    RowStep[In, Out]      async each(row, kit) -> list[Out]      anywhere; calls a model
    FrameStep[In, Out]    apply(frame, kit) -> Split             anywhere; vectorised, row-local
    GroupStep[In, Out]    async each(rows, kit) -> list[Out]     whole groups, in order
    TableStep[In, Out]    apply(table, kit) -> Split             the whole table

What a step takes and gives is read from its generics; a type variable means that it gives what it
takes. A row that fails raises a RowError; a row step never returns nothing.
"""

import typing
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Generic, Literal, TypeVar

import polars as pl
from pydantic import Field

from datakit.records import Record
from datakit.values import Value

if TYPE_CHECKING:
    from datakit.kit import Kit

Purpose = Literal["chat", "embed"]
In = TypeVar("In", bound=Record)
Out = TypeVar("Out", bound=Record)


@dataclass(frozen=True)
class Role:
    """Marks a field that names a model role of the recipe."""

    purpose: Purpose


ChatRole = Annotated[str, Role("chat"), Field(min_length=1)]
EmbedRole = Annotated[str, Role("embed"), Field(min_length=1)]

DROPPED = pl.Schema(
    {
        "id": pl.String(),
        "kind": pl.String(),
        "reason": pl.String(),
        "detail": pl.String(),
        "raw": pl.String(),
        "related": pl.String(),
        "similarity": pl.Float64(),
        "transient": pl.Boolean(),
        "record": pl.String(),
    }
)
"""A dropped row: why, the row it lost to (`related`, cosine or Jaccard `similarity` in 0..1), and
the whole record as JSON with all that was paid for."""


@dataclass(frozen=True)
class Split:
    """What a frame or table step decides.

    kept: at least `id`; any other column of the record replaces the row's own, a column named
    `measure.<name>` or `label.<name>` is added to the row under the step's alias. dropped: `id`
    and `reason`, and any other column of DROPPED.
    """

    kept: pl.DataFrame
    dropped: pl.DataFrame


class Range(Value):
    """A part of a source: rows or bytes `start` to `stop` of `name`; `fingerprint` of its bytes."""

    name: str
    start: int = 0
    stop: int = 0
    first_row: int = 0
    fingerprint: str


class Reject(Value):
    """A unit of a source that is no row; `place` names file and row, `related` who it lost to."""

    place: str
    reason: str
    detail: str
    raw: str
    related: str = ""


class Drop(Value):
    """One row that a group step drops, while others of its group are kept."""

    id: str
    reason: str
    detail: str = ""
    related: str = ""


class Step(Value):
    """Base of all grains. Docstrings of steps name Source, Takes, Gives, Measures and Drops."""

    version: ClassVar[int] = 1
    """Raised when the meaning of the output changes."""
    incremental: ClassVar[Literal["rows", "groups", "against", "whole"]] = "rows"
    """What a refresh must look at."""
    inert: ClassVar[frozenset[str]] = frozenset()
    """Fields that cannot change the output and enter no key."""

    @classmethod
    def takes(cls) -> tuple[type[Record], ...]:
        """The kinds that the step accepts; empty for a source, (Record,) for any."""
        return () if issubclass(cls, SourceStep) else _kinds(_arguments(cls)[0])

    def gives(self, taken: type[Record] | None) -> type[Record]:
        """The kind that the step makes from `taken`."""
        out = _arguments(type(self))[-1]
        if isinstance(out, TypeVar):
            assert taken is not None
            return taken
        return _kinds(out)[0]

    def fingerprint(self, kit: "Kit") -> str:
        """Fingerprint of all that the step reads from outside besides its input."""
        del kit
        return ""


class SourceStep(Step, Generic[Out]):
    """Reads rows from outside; those of a `private` one reach only models that are trusted."""

    inert = frozenset({"private"})

    private: bool = False

    def is_private(self, kit: "Kit") -> bool:
        """Whether the rows reach only models that are trusted."""
        return self.private

    def ranges(self, kit: "Kit") -> Iterator[Range]:
        """The parts of the source, in order."""
        raise NotImplementedError

    async def read(self, part: Range, kit: "Kit") -> Iterable[Out | Reject]:
        """The rows of one part, in order. A row's `origin` is its key, or empty for none.

        Best made as they are taken: a part need not fit into memory.
        """
        raise NotImplementedError


class RowStep(Step, Generic[In, Out]):
    """Makes one or more rows of each row, one conversation at a time."""

    async def each(self, row: In, kit: "Kit") -> Sequence[Out]:
        """The outputs of one row; raises RowError where there is none."""
        raise NotImplementedError


class FrameStep(Step, Generic[In, Out]):
    """Decides on each row of a frame by itself."""

    def apply(self, frame: pl.DataFrame, kit: "Kit") -> Split:
        """Every id of `frame` is in exactly one side of the result."""
        raise NotImplementedError


class GroupStep(Step, Generic[In, Out]):
    """Works over whole groups of rows."""

    incremental = "groups"
    group_by: ClassVar[str]
    """The column whose equal values make a group."""
    order_by: ClassVar[tuple[str, ...]] = ()
    """The columns that order a group's rows; input order breaks ties."""

    async def each(self, rows: Sequence[In], kit: "Kit") -> Sequence[Out | Drop]:
        """The outputs of one group and its dropped rows; raises RowError to drop the whole group.

        An output names its parents; one that names none is taken to come from every row.
        """
        raise NotImplementedError


class TableStep(Step, Generic[In, Out]):
    """Decides over the whole table."""

    incremental = "whole"
    prepared_by: ClassVar[frozenset[str]] = frozenset()
    """The fields that `prepare` reads: only these enter the key of what it stores."""

    def prepared_fingerprint(self, kit: "Kit") -> str:
        """Fingerprint of all that `prepare` reads from outside."""
        return self.fingerprint(kit)

    def prepare(self, frame: pl.DataFrame, kit: "Kit") -> pl.DataFrame:
        """Columns per row (vectors, signatures), as a frame of `id` and them; stored by part."""
        raise NotImplementedError

    def apply(self, table: pl.LazyFrame, kit: "Kit") -> Split:
        """Every id of `table` is in one side; prepared columns stand beside the record's."""
        raise NotImplementedError


def prepares(step: Step) -> bool:
    """Whether the step has a `prepare` of its own."""
    return isinstance(step, TableStep) and type(step).prepare is not TableStep.prepare


def roles(step: Step) -> list[tuple[str, str, Purpose]]:
    """(field, role, purpose) of every model role that the step names."""
    found: list[tuple[str, str, Purpose]] = []
    for name, field in type(step).model_fields.items():
        purpose = _role_purpose(field.annotation, field.metadata)
        if purpose is not None:
            value = getattr(step, name)
            if value is None:
                continue
            named: tuple[str, ...] = (value,) if isinstance(value, str) else value
            pairs: list[tuple[str, str, Purpose]] = [(name, role, purpose) for role in named]
            found += pairs
    return found


def _role_purpose(annotation: Any, metadata: Sequence[object] = ()) -> Purpose | None:
    for mark in metadata:
        if isinstance(mark, Role):
            return mark.purpose
    if typing.get_origin(annotation) is Annotated:
        return _role_purpose(None, typing.get_args(annotation)[1:])
    for inner in typing.get_args(annotation):
        purpose = _role_purpose(inner)
        if purpose is not None:
            return purpose
    return None


def _arguments(cls: type[Step]) -> tuple[Any, ...]:
    """The type arguments of the grain that `cls` parametrises."""
    for base in cls.__mro__:
        generic = getattr(base, "__pydantic_generic_metadata__", None)
        if generic and generic["origin"] in GRAINS and generic["args"]:
            return generic["args"]
    raise TypeError(f"{cls.__name__} does not name the kinds of its grain, as in RowStep[In, Out]")


def _kinds(argument: Any) -> tuple[type[Record], ...]:
    if isinstance(argument, TypeVar):
        return (argument.__bound__ or Record,)
    return typing.get_args(argument) or (argument,)


GRAINS: tuple[type[Step], ...] = (SourceStep, RowStep, FrameStep, GroupStep, TableStep)
