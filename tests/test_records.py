"""Records: identity, tables, and the flipped label."""

import pickle
from collections import Counter

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from datakit.errors import InputError
from datakit.records import (
    KINDS,
    Candidates,
    Failure,
    Judged,
    Message,
    Pair,
    Prompt,
    Response,
    Verdict,
)
from datakit.rows import identified
from datakit.tables import from_frame, measure, to_frame
from datakit.versions import flatten, measure_names, unflatten


def user(text):
    return (Message(role="user", content=text),)


def assistant(text):
    return (Message(role="assistant", content=text),)


def pair(prompt="q", chosen="good", rejected="bad", **more):
    sides = {"chosen": assistant(chosen), "rejected": assistant(rejected)}
    return Pair(prompt=user(prompt), **sides, **more).identified("o")


def from_source(rows):
    return list(identified(rows, Counter(), [], None))


def test_two_exact_copies_are_two_rows():
    one, two = from_source([Prompt(messages=user("hi")), Prompt(messages=user("hi"))])
    assert one.content == two.content
    assert one.id != two.id


def test_a_row_keeps_its_id_when_the_source_grows_behind_it():
    rows = [Prompt(messages=user(text)) for text in ("a", "b", "a")]
    assert [row.id for row in from_source(rows)] == [
        row.id for row in from_source([*rows, Prompt(messages=user("c"))])[:3]
    ]


def test_a_row_keeps_its_id_whatever_its_measures_and_provenance():
    bare = Prompt(messages=user("hi"))
    told = Prompt(
        messages=user("hi"), measures={"a.b": 1.0}, source="s", generator="m", license="mit"
    )
    assert from_source([bare])[0].id == from_source([told])[0].id


def test_an_edited_source_row_with_a_key_keeps_its_origin_and_gets_a_new_id():
    before = from_source([Prompt(messages=user("helo"), origin="k1")])[0]
    after = from_source([Prompt(messages=user("hello"), origin="k1")])[0]
    assert before.origin == after.origin
    assert before.id != after.id


def test_an_edited_source_row_without_a_key_is_another_row():
    before = from_source([Prompt(messages=user("helo"))])[0]
    after = from_source([Prompt(messages=user("hello"))])[0]
    assert before.origin != after.origin


def test_equal_keys_in_a_source_are_a_reject_that_names_the_key():
    rows = [Prompt(messages=user(text), origin="k1") for text in ("a", "b")]
    dropped = []
    kept = list(identified(rows, Counter(), dropped, None))
    assert len(kept) == 1
    assert dropped[0]["reason"] == "duplicate_key"
    assert "'k1'" in dropped[0]["detail"]
    assert '"b"' in dropped[0]["raw"]


def test_two_equal_samples_are_two_responses_and_give_two_pairs():
    parent = from_source([Prompt(messages=user("q"))])[0]
    responses = tuple(Response(text=text, model="m") for text in ("same", "same", "other"))
    row = Candidates(prompt=user("q"), responses=responses).derived([parent], "respond", 0)
    assert len(row.responses) == 3
    pairs = [pair("q", "other", "same").derived([row], "pair", slot) for slot in (0, 1)]
    assert pairs[0].content == pairs[1].content
    assert pairs[0].id != pairs[1].id


def test_a_flipped_label_is_another_row_with_the_same_pair_key():
    row = pair()
    assert row.swap().id != row.id
    assert row.swap().pair_key == row.pair_key
    assert pair(rejected="worse").pair_key != row.pair_key


def test_a_rejudged_pair_keeps_its_key():
    assert pair(strength=0.5, measures={"j.margin": 0.5}).pair_key == pair().pair_key


@given(
    st.dictionaries(
        st.sampled_from(["a.x.chosen", "a.x.rejected", "a.margin", "b.n"]),
        st.floats(-5, 5),
    )
)
def test_swapping_twice_changes_nothing(measures):
    row = pair(measures=measures, signed=("a.margin",))
    assert row.swap().swap() == row
    if "a.margin" in measures:
        assert row.swap().measures["a.margin"] == -measures["a.margin"]
    if "a.x.chosen" in measures:
        assert row.swap().measures["a.x.rejected"] == measures["a.x.chosen"]


def test_swapping_a_prompt_pair_swaps_the_prompts():
    row = Pair(
        prompt=user("with"),
        prompt_rejected=user("without"),
        chosen=assistant("a"),
        rejected=assistant("a"),
        pair_kind="prompt",
    )
    assert row.swap().prompt == user("without")
    assert row.swap().chosen == row.chosen


def test_derived_rows_carry_measures_labels_and_roots():
    parent = from_source([Prompt(messages=user("q"), license="mit", labels={"category": "x"})])[0]
    parent = parent.model_copy(update={"roots": (parent.id,), "measures": {"near.size": 2.0}})
    child = pair(measures={"pair.margin": 1.0}).derived([parent], "pair", 0)
    assert child.parents == (parent.id,)
    assert child.roots == (parent.id,)
    assert child.license == "mit"
    assert child.measures == {"near.size": 2.0, "pair.margin": 1.0}
    assert child.labels == {"category": "x"}


def test_failures_are_carried_once():
    failure = Failure(slot="s", kind="Refused", reason="r")
    parent = Prompt(messages=user("q"), failures=(failure,)).identified("o")
    rewritten = parent.model_copy(update={"messages": user("Q")}).derived([parent], "upper", 0)
    assert rewritten.failures == (failure,)
    other = failure.model_copy(update={"slot": "t"})
    made = Prompt(messages=user("r"), failures=(other,)).derived([parent], "a", 0)
    assert made.failures == (failure, other)


def test_slot_and_alias_tell_siblings_apart():
    parent = from_source([Prompt(messages=user("q"))])[0]
    ids = {pair().derived([parent], alias, slot).id for alias in ("a", "b") for slot in (0, 1)}
    assert len(ids) == 4


TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=30)


@given(TEXTS, TEXTS, st.dictionaries(TEXTS, st.floats(-1e9, 1e9), max_size=3))
def test_a_table_gives_back_the_records(question, answer, measures):
    row = Judged(
        prompt=user(f"q{question}"),
        responses=(Response(text=answer, measures=measures), Response(text="b")),
        verdicts=(Verdict(judge="j", template="t", form="pairwise", shown=(0, 1), scores=(1, 0)),),
        measures=measures,
    ).identified("o")
    frame = to_frame(Judged, [row, row])
    assert from_frame(Judged, frame) == [row, row]
    assert frame.schema == Judged.table_schema()


def test_publishing_and_reading_back_is_the_identity():
    rows = [
        pair(measures={"a.b": 1.0}, labels={"c": "d"}, extra='{"x":1}'),
        pair("other", measures={"a.c": 2.0}),
    ]
    frame = to_frame(Pair, rows)
    flat = flatten(Pair, frame, measure_names(frame), measure_names(frame, "labels"))
    assert {"a.b", "a.c", "label.c"} <= set(flat.columns)
    assert from_frame(Pair, unflatten(Pair, flat)) == rows


def test_a_measure_is_a_column_expression():
    frame = to_frame(Prompt, [Prompt(messages=user("q"), measures={"a.b": 1.5})])
    frame = frame.vstack(to_frame(Prompt, [Prompt(messages=user("r"))]))
    assert frame.select(m=measure("a.b"))["m"].to_list() == [1.5, None]


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": ()},
        {"messages": assistant("ends in the wrong role")},
        {"messages": user("  ")},
        {"messages": user("q"), "measures": {"a.b": float("nan")}},
        {"messages": [{"role": "tool", "content": "x"}]},
        {"messages": [{"role": "user", "content": "x", "id": 1}]},
        {"messages": user("q"), "strange": 1},
    ],
)
def test_what_is_no_prompt_is_refused(fields):
    with pytest.raises(ValidationError):
        Prompt(**fields)


def test_equal_answers_are_no_pair():
    with pytest.raises(ValidationError, match="chosen equals rejected"):
        pair("q", "same", "same")


@pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
def test_every_kind_has_a_table_schema_in_field_order(kind):
    assert kind.table_schema().names() == list(kind.model_fields)
    assert set(kind.own) <= set(kind.model_fields)
    assert pl.DataFrame(schema=kind.table_schema()).height == 0


def test_records_survive_pickle_and_json():
    row = pair(measures={"a.b": 1.0})
    assert pickle.loads(pickle.dumps(row)) == row
    assert Pair.model_validate_json(row.model_dump_json()) == row


def test_a_split_that_is_no_file_name_is_refused_when_it_is_read():
    with pytest.raises(InputError, match="split 'Train'"):
        from_source([Prompt(messages=user("q"), split="Train")])
