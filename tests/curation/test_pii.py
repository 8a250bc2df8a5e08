"""Personal data in rows: placeholders over a whole row, dropped rows, and what details say."""

import json

import polars as pl
import pytest
from filters_kit import HOSTILE, measured, reasons, run, whatever_the_order
from hypothesis import given, settings
from hypothesis import strategies as st
from steps_kit import assistant, candidates, pair, prompt, user

from datakit.curation.pii import Pii
from datakit.findings_pii import entities
from datakit.records import (
    Candidates,
    Conversation,
    Edit,
    Failure,
    Feedback,
    Generation,
    Judged,
    Label,
    Pair,
    Prompt,
    Verdict,
)

AL, BO, CY = "al@x.com", "bo@y.org", "cy@z.net"
CARD = "4111 1111 1111 1111"


def one(step, kind, row):
    ((kept,), dropped) = run(step, kind, [row])
    assert dropped.is_empty()
    return kept


def test_one_entity_has_one_placeholder_over_the_row():
    row = pair(f"write to {AL}", f"to {BO} or AL@X.com", f"to {BO}, card {CARD}")
    kept = one(Pii(), Pair, row)
    assert kept.prompt == user("write to <EMAIL_1>")
    assert kept.chosen == assistant("to <EMAIL_2> or <EMAIL_1>")
    assert kept.rejected == assistant("to <EMAIL_2>, card <CARD_1>")
    assert kept.measures == {"it.entities": 3, "it.email": 2, "it.card": 1}


def test_a_masked_row_is_a_new_row_and_the_others_stay():
    rows = [pair("q", f"to {AL}", "no"), pair("q", "yes", "no")]
    (masked, same), _ = run(Pii(), Pair, rows)
    assert masked.parents == (rows[0].id,)
    assert masked.id != rows[0].id
    assert (same.id, same.parents) == (rows[1].id, ())
    assert same.measures == {"it.entities": 0}


@pytest.mark.parametrize("chosen", [f"ask {AL}", f"ask {BO}", f"{CY} {AL}"])
def test_numbers_do_not_tell_the_chosen_side_from_the_rejected(chosen):
    row = pair("q", chosen, f"so ask {CY}")
    kept = one(Pii(), Pair, row)
    swapped = one(Pii(), Pair, row.swap())
    assert (swapped.chosen, swapped.rejected) == (kept.rejected, kept.chosen)
    assert swapped.measures == kept.measures


def test_a_pair_that_differs_in_nothing_else_is_kept_apart_by_its_numbers():
    kept = one(Pii(), Pair, pair("q", f"ask {AL}", f"ask {BO}"))
    assert kept.chosen != kept.rejected


def test_a_pair_that_masking_makes_equal_is_dropped():
    row = pair("q", f"ask {AL}", "ask AL@x.COM")
    two = pair(f"ask {AL}", "a", "a", pair_kind="prompt", prompt_rejected=user("ask AL@x.COM"))
    assert reasons(Pii(), Pair, [row, two]) == ["equal_once_masked"] * 2


@pytest.mark.parametrize(
    ("policy", "expected"), [("mask", ["", ""]), ("flag", ["", ""]), ("drop", ["pii", ""])]
)
def test_policies(policy, expected):
    rows = [pair("q", f"to {AL}, {BO}, {CARD}", "no"), pair("q", "yes", "no")]
    step = Pii(policy=policy)
    assert reasons(step, Pair, rows) == expected
    assert whatever_the_order(step, Pair, rows)
    kept, dropped = run(step, Pair, rows)
    if policy == "flag":
        assert [row.body() for row in kept] == [row.body() for row in rows]
        assert kept[0].id == rows[0].id
        assert kept[0].measures["it.email"] == 2
    if policy == "drop":
        assert dropped["detail"].to_list() == ["2 email, 1 card"]


def test_only_the_wanted_kinds_are_masked():
    kept = one(Pii(kinds=("card",)), Pair, pair("q", f"{AL} {CARD}", "no"))
    assert kept.chosen == assistant(f"{AL} <CARD_1>")


def rows_of_every_kind():
    """A row of each kind with the same e-mail in every place that is a text."""
    said, asked = assistant(f"mail {AL}"), user(f"I am {AL}")
    extra = json.dumps({"note": AL, AL: [1, {"deep": f"<{AL}>"}], "card": 4111111111111111})
    carried = {"references": (AL,), "extra": extra}
    made = Generation(model="m", reasoning=AL)
    verdict = Verdict(
        judge="j", template="t", form="rating", shown=(0,), scores=(1,), reason=AL, raw=AL
    )
    answers = candidates(AL, f"to {AL}", "nobody").responses
    answers = (answers[0].model_copy(update={"reasoning": AL}), answers[1])
    return [
        Prompt(messages=asked, **carried),
        Conversation(
            messages=(*asked, *said),
            feedback=(Feedback(turn=1, kind="thumb_up", text=AL),),
            **carried,
        ),
        Edit(context=asked, draft=f"{AL} a", edited=AL, **carried),
        Candidates(prompt=asked, responses=answers, **carried),
        Judged(prompt=asked, responses=answers, verdicts=(verdict,), **carried),
        Pair(
            prompt=asked,
            chosen=said,
            rejected=assistant("no"),
            rationale=AL,
            context=AL,
            chosen_from=made,
            rejected_from=made,
            **carried,
        ),
        Label(prompt=asked, completion=said, desirable=True, **carried),
    ]


@pytest.mark.parametrize("row", rows_of_every_kind(), ids=lambda row: type(row).__name__)
def test_no_text_of_any_kind_keeps_an_entity(row):
    kept = one(Pii(), type(row), row.identified("1"))
    said = kept.model_dump_json()
    assert AL not in said
    assert "4111" not in said
    assert "<EMAIL_1>" in said
    assert "EMAIL_2" not in said
    assert json.loads(kept.extra) == {
        "note": "<EMAIL_1>",
        "<EMAIL_1>": [1, {"deep": "<<EMAIL_1>>"}],
        "card": "<CARD_1>",
    }
    again = one(Pii(), type(row), kept)
    assert again.body() == kept.body()
    assert again.id == kept.id


def test_extra_that_is_no_json_is_masked_as_text():
    kept = one(Pii(), Prompt, prompt("q", extra=f"{{{AL}"))
    assert kept.extra == "{<EMAIL_1>"
    deep = "[" * 100_000 + f'"{AL}"'
    assert AL not in one(Pii(), Prompt, prompt("q", extra=deep)).extra


def test_what_cannot_be_masked_drops_the_row():
    row = prompt("q", failures=(Failure(slot="s", kind="Unparsable", reason="r", raw=AL),))
    assert reasons(Pii(), Prompt, [row]) == ["pii_stays"]
    assert reasons(Pii(policy="flag"), Prompt, [row]) == [""]


def test_no_detail_holds_an_entity():
    rows = [
        pair("q", f"ask {AL}", "ask AL@x.COM"),
        prompt("q", failures=(Failure(slot="s", kind="k", reason=AL),)),
    ]
    for policy in ("mask", "drop"):
        for row in rows:
            _, dropped = run(Pii(policy=policy), type(row), [row])
            said = dropped.drop("record").write_json()
            assert "al@" not in said.casefold()


TEXTS = st.lists(
    st.sampled_from(
        [AL, BO, CY, "Al@x.com", CARD, "<EMAIL_1>", "415-555-2671", "word", "10.1.2.30"]
    ),
    min_size=1,
    max_size=4,
).map(" and ".join)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(TEXTS, TEXTS, TEXTS).filter(lambda row: row[1] != row[2]), max_size=4))
def test_masking_holds_for_any_rows(texts):
    rows = [pair(*said, origin=str(place)) for place, said in enumerate(texts)]
    assert whatever_the_order(Pii(), Pair, rows)
    kept, dropped = run(Pii(), Pair, rows)
    assert len(kept) + dropped.height == len(rows)
    for row in kept:
        for turns in (row.prompt, row.chosen, row.rejected):
            assert entities(turns[0].content) == []
    again, none = run(Pii(), Pair, kept)
    assert none.is_empty()
    assert [row.body() for row in again] == [row.body() for row in kept]
    # Two answers have the same placeholder exactly where they had the same entity.
    of_id = {row.id: row for row in rows}
    for row in kept:
        before = of_id[row.parents[0]] if row.parents else of_id[row.id]
        for side in ("chosen", "rejected"):
            old = getattr(before, side)[0].content.split(" and ")
            new = getattr(row, side)[0].content.split(" and ")
            assert len(old) == len(new)
        for mail in (AL, BO, CY):
            marks = {
                new
                for side in ("prompt", "chosen", "rejected")
                for old, new in zip(
                    getattr(before, side)[0].content.split(" and "),
                    getattr(row, side)[0].content.split(" and "),
                    strict=True,
                )
                if old.casefold() == mail
            }
            assert len(marks) <= 1


def test_hostile_texts_and_an_empty_table():
    rows = [candidates(f"q{place}", text) for place, text in enumerate(HOSTILE)]
    assert reasons(Pii(), Candidates, rows) == [""] * len(rows)
    assert run(Pii(), Pair, [])[0] == []
    assert measured(Pii(), Prompt, prompt("\u202e٣٤٥ \u200b")) == {"entities": 0}


def test_a_frame_without_finds_replaces_no_column():
    from datakit.tables import to_frame

    split = Pii().apply(to_frame(Pair, [pair("q", "a", "b")]), None)
    own = [name for name in split.kept.columns if not name.startswith("measure.")]
    assert own == ["id"]
    assert isinstance(split.kept, pl.DataFrame)
