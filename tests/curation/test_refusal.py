"""Refusals: which side declines, and which rows are dropped for it."""

import pytest
from filters_kit import measured, reasons, run, whatever_the_order
from steps_kit import assistant, candidates, pair, prompt, user

from datakit.curation.refusal import Refusal
from datakit.errors import InputError
from datakit.records import Candidates, Conversation, Edit, Label, Pair, Prompt

NO = "I'm sorry, but I can't help with that."
PAIRS = [
    pair("q", "yes", "no"),
    pair("q", NO, "yes"),
    pair("q", "yes", NO),
    pair("q", NO, NO + "!"),
]
MANY = [candidates("a", "x", "y"), candidates("b", "x", NO), candidates("c", NO, NO + "!")]


@pytest.mark.parametrize(
    ("drop", "pairs", "many"),
    [
        ("none", ["", "", "", ""], ["", "", ""]),
        ("any", ["", "refusal", "refusal", "refusal"], ["", "refusal", "refusal"]),
        (
            "one_sided",
            ["", "one_sided_refusal", "one_sided_refusal", ""],
            ["", "one_sided_refusal", ""],
        ),
    ],
)
def test_policies(drop, pairs, many):
    step = Refusal(drop=drop)
    assert reasons(step, Pair, PAIRS) == pairs
    assert reasons(step, Candidates, MANY) == many
    assert whatever_the_order(step, Pair, PAIRS)
    assert whatever_the_order(step, Candidates, MANY)


def test_measures_say_which_side_declines():
    found = [measured(Refusal(), Pair, row) for row in PAIRS]
    assert [(one["refuses.chosen"], one["refuses.rejected"]) for one in found] == [
        (0, 0),
        (1, 0),
        (0, 1),
        (1, 1),
    ]
    shares = [measured(Refusal(), Candidates, row)["refuses.response"] for row in MANY]
    assert shares == [0, 0.5, 1]


def test_a_pair_that_is_swapped_has_swapped_measures():
    ((kept,), _) = run(Refusal(), Pair, [PAIRS[1]])
    ((swapped,), _) = run(Refusal(), Pair, [PAIRS[1].swap()])
    assert kept.swap().measures == swapped.measures


def test_only_answers_are_looked_at():
    assert measured(Refusal(), Pair, pair(NO, "yes", "no")) == {
        "refuses.chosen": 0,
        "refuses.rejected": 0,
    }
    label = Label(prompt=user("q"), completion=assistant(NO), desirable=False).identified("1")
    assert measured(Refusal(), Label, label) == {"refuses.response": 1}
    talk = Conversation(messages=(*user("q"), *assistant(NO))).identified("1")
    assert measured(Refusal(), Conversation, talk) == {"refuses.response": 1}
    edit = Edit(draft=NO, edited="yes").identified("1")
    assert reasons(Refusal(drop="one_sided"), Edit, [edit]) == ["one_sided_refusal"]


def test_prompts_have_no_answer():
    assert measured(Refusal(), Prompt, prompt(NO)) == {}
    with pytest.raises(InputError, match="over: response"):
        run(Refusal(drop="any"), Prompt, [prompt(NO)])


def test_details_name_sides_and_an_empty_table_stays_empty():
    _, dropped = run(Refusal(drop="any"), Pair, PAIRS)
    assert dropped["detail"].to_list() == [
        "above 0: refuses.chosen",
        "above 0: refuses.rejected",
        "above 0: refuses.chosen, refuses.rejected",
    ]
    assert run(Refusal(drop="one_sided"), Pair, [])[0] == []
