"""A threshold over a measure: bounds, rows without it, and what is refused."""

import pytest
from filters_kit import reasons, run, whatever_the_order
from steps_kit import prompt

from datakit.curation.threshold import Threshold
from datakit.records import Prompt

ROWS = [
    *[prompt(f"{value}", measures={"a.x": value, "a.xy": -value}) for value in (-1.0, 0.0, 0.5, 2)],
    prompt("none", measures={"a": 1.0}),
]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"min": 0}, ["below_min", "", "", "", "no_measure"]),
        ({"max": 0.5}, ["", "", "", "above_max", "no_measure"]),
        ({"min": 0, "max": 0.5}, ["below_min", "", "", "above_max", "no_measure"]),
        ({"min": 0, "max": 0.5, "missing": "keep"}, ["below_min", "", "", "above_max", ""]),
    ],
)
def test_bounds_are_inclusive(fields, expected):
    step = Threshold(measure="a.x", **fields)
    assert reasons(step, Prompt, ROWS) == expected
    assert whatever_the_order(step, Prompt, ROWS)


def test_kept_rows_are_as_they_were_and_details_name_the_measure():
    kept, dropped = run(Threshold(measure="a.x", min=0, max=0.5), Prompt, ROWS)
    assert kept == ROWS[1:3]
    assert dropped["detail"].to_list() == [
        "a.x is -1.0, below 0",
        "a.x is 2.0, above 0.5",
        "the row has no measure 'a.x'",
    ]


@pytest.mark.parametrize(
    "fields",
    [{}, {"min": 1, "max": 0}, {"min": float("nan")}, {"max": float("inf")}, {"measure": ""}],
)
def test_what_bounds_nothing_is_refused(fields):
    with pytest.raises(ValueError):
        Threshold(**{"measure": "a.x"} | fields)


def test_an_empty_table_stays_empty():
    assert run(Threshold(measure="a.x", min=0), Prompt, [])[0] == []
