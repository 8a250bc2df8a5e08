"""Turns: how many, in which order, and whether any is empty."""

import pytest
from filters_kit import measured, reasons, run, whatever_the_order
from steps_kit import assistant, candidates, pair, prompt, user

from datakit.curation.turns import Turns
from datakit.records import Candidates, Conversation, Edit, Label, Message, Pair, Prompt

SYSTEM = (Message(role="system", content="s"),)


def test_measures_of_every_kind():
    assert measured(Turns(), Prompt, prompt("q")) == {"turns": 1, "ordered": 1, "empty_turns": 0}
    found = measured(Turns(), Pair, pair("q", "c", "r"))
    assert found == {
        "turns.chosen": 2,
        "ordered.chosen": 1,
        "empty_turns.chosen": 0,
        "turns.rejected": 2,
        "ordered.rejected": 1,
        "empty_turns.rejected": 0,
    }
    row = candidates("q", "a", " ", "\u200b")
    assert measured(Turns(), Candidates, row) == {"turns": 2, "ordered": 1, "empty_turns": 2}
    label = Label(
        prompt=(*SYSTEM, *user("u"), *user("v")), completion=assistant("a"), desirable=True
    ).identified("1")
    assert measured(Turns(), Label, label) == {"turns": 4, "ordered": 0, "empty_turns": 0}
    edit = Edit(draft="a", edited="b").identified("1")
    assert measured(Turns(), Edit, edit) == {"turns": 0, "ordered": 1, "empty_turns": 0}


def test_each_side_of_a_pair_is_a_conversation_of_its_own():
    longer = Pair(
        prompt=user("q"),
        chosen=(*assistant("a"), *user("more"), *assistant("b")),
        rejected=assistant("c"),
    ).identified("1")
    found = measured(Turns(), Pair, longer)
    assert (found["turns.chosen"], found["turns.rejected"]) == (4, 2)
    assert reasons(Turns(max_turns=3), Pair, [longer]) == ["too_many_turns"]
    assert reasons(Turns(min_turns=3), Pair, [longer]) == ["too_few_turns"]


def test_a_pair_of_prompts_has_the_rejected_prompt_on_its_rejected_side():
    row = pair(
        "q", "a", "a", pair_kind="prompt", prompt_rejected=(*user("u"), *assistant(" "), *user("v"))
    )
    found = measured(Turns(), Pair, row)
    assert (found["turns.chosen"], found["turns.rejected"]) == (2, 4)
    assert (found["empty_turns.chosen"], found["empty_turns.rejected"]) == (0, 1)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, ["", "", "", ""]),
        ({"order": "alternating"}, ["", "role_order", "role_order", ""]),
        ({"empty": "drop"}, ["", "", "", "empty_turn"]),
        ({"min_turns": 2}, ["too_few_turns", "", "", ""]),
        ({"max_turns": 1}, ["", "too_many_turns", "too_many_turns", "too_many_turns"]),
    ],
)
def test_rows_are_dropped_only_where_asked_for(fields, expected):
    rows = [
        Conversation(messages=user("a")),
        Conversation(messages=(*user("a"), *user("b"))),
        Conversation(messages=(*assistant("a"), *user("b"))),
        Conversation(messages=(*user("a"), *assistant(" \n"))),
    ]
    rows = [row.identified(str(place)) for place, row in enumerate(rows)]
    assert reasons(Turns(**fields), Conversation, rows) == expected
    assert whatever_the_order(Turns(**fields), Conversation, rows)


def test_an_empty_table_stays_empty():
    for kind in (Pair, Candidates, Label, Edit, Conversation, Prompt):
        assert run(Turns(min_turns=1), kind, [])[0] == []
