"""The algebra of licences, over the whole table."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datakit.licences import (
    _NAMES,
    canonical,
    clash,
    is_commercial,
    level,
    may_become,
    mixed,
    parts,
)

PAIRS = list(itertools.product(_NAMES, repeat=2))


def test_becoming_is_a_partial_order():
    for one, other in PAIRS:
        assert may_become(one, one)
        if one != other:
            assert not (may_become(one, other) and may_become(other, one))
    for one, other, third in itertools.product(_NAMES, repeat=3):
        if may_become(one, other) and may_become(other, third):
            assert may_become(one, third), (one, other, third)


def test_the_strictest_is_the_least_upper_bound():
    for one, other in PAIRS:
        bounds = [name for name in _NAMES if may_become(one, name) and may_become(other, name)]
        least = [name for name in bounds if all(may_become(name, up) for up in bounds)]
        assert mixed((one, other)).license == (least[0] if least else "")
        assert bool(least) is bool(bounds)
        assert (clash((one, other)) == ()) is bool(bounds)


@given(st.lists(st.sampled_from(_NAMES), min_size=1, max_size=5), st.randoms())
def test_mixing_does_not_depend_on_order_or_grouping(names, random):
    whole = mixed(names)
    other = list(names)
    random.shuffle(other)
    assert mixed(other) == whole == mixed(names + names)
    first = mixed(names[:2]).license
    if first:
        assert mixed([first, *names[2:]]) == whole
    assert bool(clash(names)) is not bool(whole.license)


STRICTEST = {
    ("mit", "apache-2.0"): "apache-2.0",
    ("mit", "cc-by-4.0", "cc0-1.0"): "cc-by-4.0",
    ("cc-by-4.0", "cc-by-sa-3.0"): "cc-by-sa-3.0",
    ("cc-by-sa-3.0", "cc-by-sa-4.0"): "cc-by-sa-4.0",
    ("cc-by-sa-4.0", "gpl-3.0"): "gpl-3.0",
    ("cc-by-4.0", "cc-by-nc-4.0"): "cc-by-nc-4.0",
    ("cc-by-nc-4.0", "cc-by-nc-sa-4.0"): "cc-by-nc-sa-4.0",
    ("cc-by-nc-4.0", "cc-by-nd-4.0"): "cc-by-nc-nd-4.0",
    ("cc-by-sa-4.0", "gpl-2.0"): "",
    ("cc-by-sa-4.0", "cc-by-nc-4.0"): "",
    ("cc-by-sa-4.0", "cc-by-nc-sa-4.0"): "",
    ("cc-by-sa-4.0", "odbl"): "",
    ("cc-by-sa-4.0", "cc-by-nd-4.0"): "",
    ("gpl-2.0", "gpl-3.0"): "",
}


@pytest.mark.parametrize("names", STRICTEST)
def test_known_mixes(names):
    found = mixed(names)
    assert (found.license, found.unknown) == (STRICTEST[names], ())
    assert set(clash(names)) == (set() if found.license else set(names))


SPELLINGS = {
    "CC BY-SA 4.0": "cc-by-sa-4.0",
    "cc_by_nc_4.0": "cc-by-nc-4.0",
    "Apache License, Version 2.0": "apache-2.0",
    "Apache-2.0": "apache-2.0",
    "Apache 2.0 License": "apache-2.0",
    "MIT License": "mit",
    " mit ": "mit",
    "CC0": "cc0-1.0",
    "GPLv3": "gpl-3.0",
    "GPL-2.0-or-later": "gpl-3.0",
    "GPL-2.0-only": "gpl-2.0",
    "LGPL-3.0": "lgpl-3.0",
    "other": "",
    "": "",
    "see the file\x00": "",
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name):
    assert canonical(name) == SPELLINGS[name]


def test_unknown_is_stated_and_does_not_hide_the_rest():
    found = mixed(["mit", "", "Our own terms"])
    assert (found.license, found.unknown, str(found)) == ("mit", ("", "Our own terms"), "unknown")
    assert str(mixed([])) == "unknown"
    assert mixed(["mit AND cc-by-4.0"]).license == "cc-by-4.0"
    assert parts("mit AND cc-by-4.0; isc") == ["mit", "cc-by-4.0", "isc"]


def test_commercial_use():
    assert is_commercial("cc-by-sa-4.0") is True
    assert is_commercial("cc-by-nc-sa-4.0 AND mystery") is False
    assert is_commercial("mystery") is is_commercial("") is None


def test_levels():
    order = ["cc0-1.0", "MIT", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0"]
    assert [level(name) for name in order] == [
        "public domain",
        "permissive",
        "attribution",
        "share-alike",
        "non-commercial",
        "no-derivatives",
    ]
    assert level("x") is None
