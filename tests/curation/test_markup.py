"""Special tokens and rendered templates: which side holds them, and what becomes of the row."""

import pytest
from filters_kit import HOSTILE, measured, reasons, run, whatever_the_order
from steps_kit import candidates, pair, prompt

from datakit.curation.markup import Markup
from datakit.errors import InputError
from datakit.records import Candidates, Pair, Prompt

ROWS = [
    pair("q", "fine", "bad"),
    pair("q", "fine<|im_end|>", "bad"),
    pair("q", "fine", "[INST] bad</s>"),
    pair("Human: a\nAssistant: b", "fine", "bad"),
]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, ["", "template", "template", "template"]),
        ({"over": "response"}, ["", "template", "template", ""]),
        ({"over": "prompt"}, ["", "", "", "template"]),
        ({"policy": "flag"}, ["", "", "", ""]),
    ],
)
def test_rows_are_dropped_for_the_sides_that_are_looked_at(fields, expected):
    assert reasons(Markup(**fields), Pair, ROWS) == expected
    assert whatever_the_order(Markup(**fields), Pair, ROWS)


def test_measures_count_families_by_side():
    assert measured(Markup(policy="flag"), Pair, ROWS[2]) == {
        "template.prompt": 0,
        "template.chosen": 0,
        "template.rejected": 2,
    }
    row = candidates("q", "a", "<|eot_id|>")
    assert measured(Markup(policy="flag"), Candidates, row) == {
        "template.prompt": 0,
        "template.response.min": 0,
        "template.response.max": 1,
    }


def test_a_pair_that_is_swapped_has_swapped_measures():
    ((kept,), _) = run(Markup(policy="flag"), Pair, [ROWS[1]])
    ((swapped,), _) = run(Markup(policy="flag"), Pair, [ROWS[1].swap()])
    assert kept.swap().measures == swapped.measures


def test_prompts_have_no_response_to_look_at():
    with pytest.raises(InputError, match="over: response"):
        run(Markup(over="response"), Prompt, [prompt("q")])


def test_hostile_texts_and_an_empty_table():
    rows = [candidates(f"q{place}", text) for place, text in enumerate(HOSTILE)]
    assert reasons(Markup(), Candidates, rows) == [""] * len(rows)
    assert run(Markup(), Pair, [])[0] == []
