"""Which column of a file plays which role in a record: mapped by the user, or known by its name.

A layout is found before the first row is read. A missing column, two columns for one role, and a
column of a type that can never fit are refused at once, with what the file has and how to map it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from datakit.errors import InputError
from datakit.text import near_miss

Row = dict[str, Any]
Mapped = Mapping[str, str | tuple[str, ...]]
ColumnTypes = Mapping[str, frozenset[str]]
"""For each column what it holds (text, number, bool, time, list, struct, other); empty: nulls."""

_TEXT = frozenset({"text"})
_SCALAR = frozenset({"text", "number", "bool"})
_NUMBER = frozenset({"number", "bool", "text"})  # a rating may be written as the text "4"
_TIME = frozenset({"time", "text"})
_TURNS = frozenset({"text", "list", "struct"})
_TEXTS = frozenset({"text", "list"})
_LIST = frozenset({"list"})


@dataclass(frozen=True)
class ColumnRole:
    """A role that columns can play.

    fits: what its column may hold; names: the column names known for it; many: several columns.
    """

    fits: frozenset[str]
    names: tuple[str, ...] = ()
    many: bool = False


_COMMON = {
    "key": ColumnRole(_SCALAR),
    "license": ColumnRole(_TEXT),
    "source": ColumnRole(_TEXT),
    "split": ColumnRole(_TEXT),
    "labels": ColumnRole(_SCALAR, many=True),
    "measures": ColumnRole(_NUMBER, many=True),
    "references": ColumnRole(_TEXTS, many=True),
}
# Never known by name: a column called `split` or `id` may mean anything, and what it means here
# decides which rows are trained on and which are the same row.

_OPENING = {
    "prompt": ColumnRole(_TURNS, ("prompt", "question")),
    "instruction": ColumnRole(_TEXT, ("instruction",)),
    "messages": ColumnRole(_TURNS, ("messages", "conversations", "conversation")),
    "input": ColumnRole(_TEXT, ("input",)),
    "system": ColumnRole(_TEXT, ("system",)),
}
_PERSON = {
    "user": ColumnRole(_SCALAR, ("user",)),
    "time": ColumnRole(_TIME, ("time", "timestamp")),
}

ROLES: dict[str, dict[str, ColumnRole]] = {
    "Prompt": _OPENING,
    "Conversation": {
        "messages": _OPENING["messages"],
        "system": _OPENING["system"],
        **_PERSON,
    },
    "Edit": {
        "draft": ColumnRole(_TEXT, ("draft",)),
        "edited": ColumnRole(_TEXT, ("edited",)),
        "context": ColumnRole(_TURNS, ("context",)),
        **_PERSON,
    },
    "Candidates": {
        **_OPENING,
        "responses": ColumnRole(_LIST, ("responses", "completions")),
        "response": ColumnRole(_TEXT, ("response", "completion")),
        "model": ColumnRole(_TEXT, ("model",)),
        "sampling": ColumnRole(_SCALAR | _LIST | {"struct"}, many=True),
        "finish_reason": ColumnRole(_TEXT, ("finish_reason",)),
        "score": ColumnRole(_NUMBER, many=True),
    },
    "Pair": {
        **_OPENING,
        "chosen": ColumnRole(_TURNS, ("chosen", "chosen_response")),
        "rejected": ColumnRole(_TURNS, ("rejected", "rejected_response")),
        "chosen_model": ColumnRole(_TEXT, ("chosen_model",)),
        "rejected_model": ColumnRole(_TEXT, ("rejected_model",)),
        "rationale": ColumnRole(_TEXT, ("rationale",)),
        "context": ColumnRole(_TEXT, ("context",)),
    },
    "Label": {
        **_OPENING,
        "completion": ColumnRole(_TURNS, ("completion", "response")),
        "label": ColumnRole(frozenset({"bool", "number"}), ("label",)),
        "score": ColumnRole(_NUMBER),
        **_PERSON,
    },
}

_REQUIRED: dict[str, tuple[tuple[str, ...], ...]] = {
    "Prompt": (("prompt", "instruction", "messages"),),
    "Conversation": (("messages",),),
    "Edit": (("draft",), ("edited",)),
    "Candidates": (("prompt", "instruction", "messages"), ("responses", "response")),
    # Without a prompt the two sides are whole conversations that share it.
    "Pair": (("chosen",), ("rejected",)),
    "Label": (("prompt", "instruction", "messages"), ("completion",), ("label",)),
}
"""For each kind the roles that a file must fill; of those in one tuple exactly one."""


@dataclass(frozen=True)
class Layout:
    """How the rows of one file become records.

    file: its name in messages; unit: what a row is called there (`row`, `line`); columns: role to
    columns; license and source: of rows that state none; prefix: of the names of measures.
    """

    file: str
    unit: str
    kind: str
    columns: Mapping[str, tuple[str, ...]]
    license: str = ""
    source: str = ""
    prefix: str = ""
    used: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        used = frozenset(name for names in self.columns.values() for name in names)
        object.__setattr__(self, "used", used)

    def column(self, role: str) -> str | None:
        """The one column of a role."""
        names = self.columns.get(role)
        return names[0] if names else None

    def place(self, number: int) -> str:
        """File and row, for people."""
        return f"{self.file}, {self.unit} {number}"


def check_mapping(kind: str, mapped: Mapped) -> None:
    """Raises ValueError where a role is unknown, filled twice, or needs a single column."""
    known = ROLES[kind] | _COMMON
    for role, names in mapped.items():
        if role not in known:
            raise ValueError(f"{kind} has no role {role!r}{near_miss(role, known)}")
        if not isinstance(names, str) and not known[role].many:
            raise ValueError(f"role {role!r} takes one column, not the list {list(names)}")
    for roles in _REQUIRED[kind]:
        both = [role for role in roles if role in mapped]
        if len(both) > 1:
            raise ValueError(f"roles {both[0]!r} and {both[1]!r} exclude each other")


def find_columns(
    file: str, kind: str, mapped: Mapped, types: ColumnTypes
) -> dict[str, tuple[str, ...]]:
    """Role to columns. Raises InputError where the file cannot be read as `kind`."""
    known = ROLES[kind] | _COMMON
    found: dict[str, tuple[str, ...]] = {}
    for role, names in mapped.items():
        found[role] = (names,) if isinstance(names, str) else tuple(names)
        for name in found[role]:
            if name not in types:
                raise InputError(f"{file}: no column {name!r} for role {role!r}{_has(name, types)}")
            _check_type(file, kind, role, name, types)
    for roles in _REQUIRED[kind]:
        if not any(role in found for role in roles):
            _detect_required(file, kind, roles, types, found)
    if kind == "Pair" and not any(role in found for role in _REQUIRED["Prompt"][0]):
        _detect_one(file, _REQUIRED["Prompt"][0], kind, types, found)
    taken = {name for names in found.values() for name in names}
    for role, about in known.items():
        one_of = any(role in roles for roles in (*_REQUIRED[kind], *_REQUIRED["Prompt"]))
        if role in found or one_of or (role == "input" and "instruction" not in found):
            continue
        names = [name for name in about.names if name in types and name not in taken]
        # An optional column of another type is not what its name says here; it goes to `extra`.
        names = [name for name in names if not types[name] or types[name] & about.fits]
        _not_two(file, role, names)
        if names:
            found[role] = (names[0],)
    return found


def _detect_required(
    file: str,
    kind: str,
    roles: Sequence[str],
    types: ColumnTypes,
    found: dict[str, tuple[str, ...]],
) -> None:
    _detect_one(file, roles, kind, types, found)
    if not any(role in found for role in roles):
        names = [name for role in roles for name in ROLES[kind][role].names]
        wanted = " or ".join(repr(role) for role in roles)
        raise InputError(
            f"{file}: a {kind} needs role {wanted}, and no column is called "
            f"{', '.join(repr(name) for name in names)}{_has(names[0], types)}; "
            f"map it with `columns: {{{roles[0]}: NAME}}`"
        )


def _detect_one(
    file: str,
    roles: Sequence[str],
    kind: str,
    types: ColumnTypes,
    found: dict[str, tuple[str, ...]],
) -> None:
    """Fill one of `roles` by a known name."""
    hits = [(role, name) for role in roles for name in ROLES[kind][role].names if name in types]
    # Sets often hold the whole chat beside its prompt, and all answers beside one of them.
    for weaker in ("messages", "response"):
        strong = [hit for hit in hits if hit[0] != weaker]
        hits = strong or hits
    _not_two(file, " or ".join(roles), [name for _, name in hits])
    for role, name in hits:
        _check_type(file, kind, role, name, types)
        found[role] = (name,)


def _not_two(file: str, role: str, names: Sequence[str]) -> None:
    if len(names) > 1:
        raise InputError(
            f"{file}: both {names[0]!r} and {names[1]!r} could be the {role}; "
            "say which with `columns:`"
        )


def _check_type(file: str, kind: str, role: str, name: str, types: ColumnTypes) -> None:
    fits = (ROLES[kind] | _COMMON)[role].fits
    if types[name] and not types[name] & fits:
        raise InputError(
            f"{file}: column {name!r} holds {'/'.join(sorted(types[name]))} and cannot be the "
            f"{role} of a {kind}, which is {'/'.join(sorted(fits))}; map another with `columns:`"
        )


def _has(wanted: str, types: ColumnTypes) -> str:
    """The near miss, and what columns there are."""
    hint = near_miss(wanted, types)
    listed = f"; columns: {', '.join(types)}"
    return listed if hint.startswith("; known") else hint + listed


def value_types(rows: Iterable[Row]) -> dict[str, frozenset[str]]:
    """What the columns of rows without a schema hold."""
    seen: dict[str, set[str]] = {}
    for row in rows:
        for name, value in row.items():
            seen.setdefault(name, set()).update(_value_type(value))
    return {name: frozenset(held) for name, held in seen.items()}


def _value_type(value: object) -> tuple[str, ...]:
    kinds: dict[type, str] = {
        str: "text",
        bool: "bool",
        int: "number",
        float: "number",
        list: "list",
    }
    if value is None:
        return ()
    return (kinds.get(type(value), "struct"),)
