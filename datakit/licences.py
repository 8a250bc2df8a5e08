"""Which licence the rows of several sources can be published under together.

A small table of the licences that public data comes under, and one relation over it: work under
one licence may become part of a work under another. It follows the Creative Commons compatibility
chart (a later version of the same share-alike licence, and CC BY-SA 4.0 into GPL 3.0, one way) and
the FSF's list for the GPL family. It compares terms; it is no legal advice.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Literal

Level = Literal[
    "public domain",
    "permissive",
    "attribution",
    "share-alike",
    "non-commercial",
    "no-derivatives",
]

_LEVELS: dict[Level, tuple[str, ...]] = {
    "public domain": ("cc0-1.0", "pddl", "unlicense"),
    "permissive": (
        "mit",
        "isc",
        "bsd-2-clause",
        "bsd-3-clause",
        "apache-2.0",
        "cdla-permissive-2.0",
        "cdla-permissive-1.0",
    ),
    "attribution": ("odc-by", "cc-by-3.0", "cc-by-4.0"),
    "share-alike": (
        "cdla-sharing-1.0",
        "odbl",
        "cc-by-sa-3.0",
        "cc-by-sa-4.0",
        "gpl-2.0",
        "lgpl-3.0",
        "gpl-3.0",
        "agpl-3.0",
    ),
    "non-commercial": ("cc-by-nc-4.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0"),
    "no-derivatives": ("cc-by-nd-4.0", "cc-by-nc-nd-4.0"),
}
"""Every known licence from the freest to the strictest."""

_NARROWS: dict[str, tuple[str, ...]] = {
    "cc-by-sa-3.0": ("cc-by-sa-4.0",),
    "cc-by-sa-4.0": ("gpl-3.0",),
    "lgpl-3.0": ("gpl-3.0",),
    "gpl-3.0": ("agpl-3.0",),
    "cc-by-nc-4.0": ("cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0"),
    "cc-by-nc-sa-3.0": ("cc-by-nc-sa-4.0",),
    "cc-by-nd-4.0": ("cc-by-nc-nd-4.0",),
}
"""Beyond attribution: what each licence may directly become."""

_NAMES = tuple(name for names in _LEVELS.values() for name in names)
_LEVEL_OF: dict[str, Level] = {name: level for level, names in _LEVELS.items() for name in names}
_FREE: tuple[Level, ...] = ("public domain", "permissive", "attribution")
_ALIASES = {
    "cc0": "cc0-1.0",
    "cc-zero": "cc0-1.0",
    "public-domain": "cc0-1.0",
    "apache": "apache-2.0",
    "apache2": "apache-2.0",
    "apache2.0": "apache-2.0",
    "expat": "mit",
    "bsd": "bsd-3-clause",
    "odc-by-1.0": "odc-by",
    "odbl-1.0": "odbl",
    "pddl-1.0": "pddl",
}
_MARKS = re.compile(r"[\s_,()]+")
_GNU = re.compile(r"^(a|l)?gpl-?v?(\d)(\.\d)?(-only|-or-later|\+)?$")


@dataclass(frozen=True)
class Mixed:
    """What several licences come to together.

    license: the freest licence that all known ones may become; empty where there is none, or where
    none is known. unknown: the names that the table does not have, sorted.
    """

    license: str
    unknown: tuple[str, ...]

    def __str__(self) -> str:
        """`mit`, or `unknown` where a part of the mix is."""
        return "unknown" if self.unknown or not self.license else self.license


def canonical(name: str) -> str:
    """The table's name of one licence; empty where it is unknown.

    `CC BY-SA 4.0`, `cc_by_sa_4.0` and `cc-by-sa-4.0` are one.
    """
    folded = _MARKS.sub("-", name.strip().lower()).strip("-")
    folded = folded.removeprefix("the-").removesuffix("-license").removesuffix("-licence")
    folded = folded.removeprefix("creative-commons-")
    folded = folded.replace("-version-", "-").replace("-license-", "-")
    if folded.startswith("by-"):
        folded = f"cc-{folded}"
    gnu = _GNU.fullmatch(folded)
    if gnu:
        family = f"{gnu[1] or ''}gpl"
        # "Or later" may be taken as version 3.
        later = gnu[4] in ("-or-later", "+") and gnu[2] == "2"
        folded = f"{family}-{'3' if later else gnu[2]}.0"
    folded = _ALIASES.get(folded, folded)
    return folded if folded in _LEVEL_OF else ""


def parts(name: str) -> list[str]:
    """The licences that a row is under all at once, as in `mit AND cc-by-4.0`."""
    return [one.strip() for one in re.split(r"\s+AND\s+|;", name)]


def level(name: str) -> Level | None:
    """How strict a licence is; None where it is unknown."""
    return _LEVEL_OF.get(canonical(name))


def is_commercial(name: str) -> bool | None:
    """Whether every licence in `name` allows commercial use; None where one is unknown."""
    known = [canonical(one) for one in parts(name)]
    if any("-nc-" in one for one in known):
        return False
    return True if all(known) else None


@cache
def may_become(one: str, other: str) -> bool:
    """Whether work under the known licence `one` may be part of a work under `other`."""
    if one == other:
        return True
    if _LEVEL_OF[one] in _FREE:
        return _NAMES.index(one) < _NAMES.index(other)
    return any(may_become(next_one, other) for next_one in _NARROWS.get(one, ()))


def mixed(names: Iterable[str]) -> Mixed:
    """What rows under these licences come to together; an empty name is unknown.

    `license` is empty where the known ones exclude each other.
    """
    given = {one for name in names for one in parts(name)}
    known = {canonical(one) for one in given} - {""}
    unknown = tuple(sorted(one for one in given if not canonical(one)))
    if not known:
        return Mixed("", unknown)
    found = (name for name in _NAMES if all(may_become(one, name) for one in known))
    return Mixed(next(found, ""), unknown)


def clash(names: Iterable[str]) -> tuple[str, ...]:
    """The known licences that exclude each other, a pair where a pair does; empty where none do."""
    given = {one for name in names for one in parts(name)}
    known = sorted({canonical(one) for one in given} - {""}, key=_NAMES.index)
    for place, one in enumerate(known):
        for other in known[:place]:
            if not mixed((one, other)).license:
                return (other, one)
    return tuple(known) if known and not mixed(known).license else ()
