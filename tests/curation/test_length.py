"""Length bounds: what is counted, which texts a bound is about, and who is dropped."""

import pytest
from filters_kit import HOSTILE, measured, reasons, run, whatever_the_order
from steps_kit import assistant, candidates, pair, prompt, user

from datakit.curation.length import Length
from datakit.errors import InputError
from datakit.records import Candidates, Edit, Label, Pair, Prompt


def test_a_pair_is_measured_by_side():
    assert measured(Length(), Pair, pair("how are you?", "fine, thanks", "好的 ok")) == {
        "characters": 29,
        "words": 8,
        "characters.prompt": 12,
        "words.prompt": 3,
        "characters.chosen": 12,
        "words.chosen": 2,
        "characters.rejected": 5,
        "words.rejected": 3,
        "ratio": 12 / 5,
    }


def test_a_pair_of_prompts_has_its_prompts_on_its_sides():
    row = pair("good prompt", "a", "a", pair_kind="prompt", prompt_rejected=user("bad"))
    found = measured(Length(), Pair, row)
    assert (found["words.prompt.chosen"], found["words.prompt.rejected"]) == (2, 1)
    assert "words.prompt" not in found
    assert found["ratio"] == 1


def test_a_swapped_pair_has_swapped_measures():
    row = pair("q q", "one two three", "one")
    ((kept,), _) = run(Length(), Pair, [row])
    ((swapped,), _) = run(Length(), Pair, [row.swap()])
    assert kept.swap().measures == swapped.measures


def test_candidates_have_the_range_of_their_responses():
    found = measured(Length(), Candidates, candidates("q", "one", "one two three", ""))
    assert (found["words.response.min"], found["words.response.max"]) == (0, 3)
    assert found["words"] == 5


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, ["", ""]),
        ({"min_words": 2}, ["too_short", ""]),
        ({"max_words": 2}, ["", "too_long"]),
        ({"min_words": 1, "max_words": 3}, ["", ""]),
        ({"over": "prompt", "min_words": 2}, ["too_short", "too_short"]),
        ({"over": "row", "min_words": 5}, ["too_short", ""]),
        ({"over": "row", "max_characters": 8}, ["", "too_long"]),
        ({"max_ratio": 3}, ["", "uneven"]),
    ],
)
def test_bounds_are_inclusive_and_about_what_they_say(fields, expected):
    rows = [pair("q", "aa bb", "cc"), pair("q", "aaaaaaaaaa b c", "x yy")]
    assert reasons(Length(**fields), Pair, rows) == expected


def test_both_sides_of_a_pair_are_bounded_whichever_is_chosen():
    rows = [pair("q", "one two", "one"), pair("q", "one", "one two")]
    assert reasons(Length(max_words=1), Pair, rows) == ["too_long", "too_long"]


def test_the_detail_names_measure_value_and_bound():
    _, dropped = run(Length(max_words=1), Pair, [pair("q", "one two", "one")])
    assert dropped["detail"].to_list() == ["words.chosen is 2.0, above 1"]
    assert dropped["kind"].to_list() == ["Rejected"]


def test_other_kinds():
    label = Label(prompt=user("q"), completion=assistant("a b"), desirable=True).identified("1")
    assert measured(Length(), Label, label)["words.response"] == 2
    edit = Edit(draft="a b c", edited="a").identified("1")
    found = measured(Length(), Edit, edit)
    assert (found["words.draft"], found["words.edited"], found["words"]) == (3, 1, 4)
    assert measured(Length(), Prompt, prompt("a b"))["words.prompt"] == 2


def test_prompts_have_no_response_to_bound():
    assert reasons(Length(), Prompt, [prompt("q")]) == [""]
    with pytest.raises(InputError, match="over: response"):
        run(Length(min_words=1), Prompt, [prompt("q")])


@pytest.mark.parametrize("unit", ["words", "characters"])
def test_a_range_that_is_upside_down_is_refused(unit):
    with pytest.raises(ValueError, match=f"min_{unit} is 5, above max_{unit}"):
        Length(**{f"min_{unit}": 5, f"max_{unit}": 4})


def test_hostile_texts_are_measured():
    rows = [candidates(f"q{place}", text) for place, text in enumerate(HOSTILE)]
    assert reasons(Length(max_characters=2_000_000), Candidates, rows) == [""] * len(rows)


def test_the_order_of_rows_does_not_matter():
    rows = [pair("q", "a " * size, "b") for size in range(1, 12)]
    assert whatever_the_order(Length(max_words=6, max_ratio=9), Pair, rows)


def test_an_empty_table_stays_empty():
    assert run(Length(min_words=1), Pair, [])[0] == []
