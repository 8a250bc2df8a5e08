"""Records as they are hashed and tabled by hand, against the plain way that says the same."""

import hashlib
import json
import re
import unicodedata
from datetime import UTC, datetime

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datakit.records import (
    KINDS,
    Candidates,
    Conversation,
    Edit,
    Failure,
    Feedback,
    Generation,
    Judged,
    Label,
    Message,
    Pair,
    Prompt,
    Response,
    Verdict,
)
from datakit.tables import BATCH, from_frame, to_frame
from datakit.text import canonical_json, normalise

TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
SAID = TEXTS.map(lambda text: f"x{text}")
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
NAMED = st.dictionaries(TEXTS, NUMBERS, max_size=3)
TURNS = st.builds(Message, role=st.sampled_from(["system", "user", "assistant"]), content=TEXTS)
BEFORE = st.lists(TURNS, max_size=2)
ASKED = st.builds(lambda turns, text: (*turns, Message(role="user", content=text)), BEFORE, SAID)
TOLD = SAID.map(lambda text: (Message(role="assistant", content=text),))
MADE = st.builds(Generation, model=TEXTS, sampling=TEXTS, reasoning=TEXTS)
ANSWERS = st.lists(st.builds(Response, text=TEXTS, reasoning=TEXTS, measures=NAMED), min_size=1)
TIMES = st.none() | st.datetimes(datetime(1900, 1, 1), datetime(2100, 1, 1), timezones=st.just(UTC))
CARRIED = {
    "labels": st.dictionaries(TEXTS, TEXTS, max_size=2),
    "measures": NAMED,
    "references": st.lists(TEXTS, max_size=2).map(tuple),
    "signed": st.lists(TEXTS, max_size=2).map(tuple),
    "roots": st.lists(TEXTS, max_size=2).map(tuple),
    "license": TEXTS,
    "extra": TEXTS,
    "failures": st.lists(st.builds(Failure, slot=TEXTS, kind=TEXTS, reason=TEXTS), max_size=1),
}
VERDICT = st.builds(
    Verdict,
    judge=TEXTS,
    template=TEXTS,
    form=st.just("rating"),
    shown=st.just((0,)),
    scores=st.tuples(NUMBERS),
)
OWN = {
    Prompt: {"messages": ASKED},
    Conversation: {
        "messages": ASKED,
        "user": TEXTS,
        "time": TIMES,
        "feedback": st.lists(
            st.builds(Feedback, turn=st.integers(0, 9), kind=st.just("copied"), text=TEXTS)
        ),
    },
    Edit: {"draft": TEXTS, "edited": TEXTS, "context": BEFORE, "time": TIMES},
    Candidates: {"prompt": ASKED, "responses": ANSWERS},
    Judged: {"prompt": ASKED, "responses": ANSWERS, "verdicts": st.lists(VERDICT, max_size=2)},
    Pair: {
        "prompt": ASKED,
        "chosen": TOLD,
        "rejected": SAID.map(lambda text: (Message(role="assistant", content=f"no {text}"),)),
        "strength": st.none() | NUMBERS,
        "rationale": TEXTS,
        "chosen_from": MADE,
    },
    Label: {"prompt": ASKED, "completion": TOLD, "desirable": st.booleans(), "time": TIMES},
}
ROWS = {
    kind: st.builds(kind, **own, **CARRIED).filter(
        lambda row: not isinstance(row, Pair) or row.chosen != row.rejected
    )
    for kind, own in OWN.items()
}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))


def plain_digest(value, size):
    text = json.dumps(
        value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False
    )
    return hashlib.blake2b(text.encode(), digest_size=size).hexdigest()


def plain_body(row):
    if isinstance(row, Candidates):
        texts = [[response.text, response.reasoning] for response in row.responses]
        return {"prompt": [turn.model_dump() for turn in row.prompt], "responses": texts}
    return row.model_dump(mode="json", include=set(row.own))


def plain_identified(row, origin):
    content = plain_digest(plain_body(row), 12)
    row_id = plain_digest([type(row).__name__, origin, content], 12)
    return row.model_copy(update={"origin": origin, "id": row_id})


def plain_derived(row, parents, alias, slot):
    first = parents[0]
    ids = tuple(parent.id for parent in parents)
    known = len(first.failures)
    again = row.failures[known if row.failures[:known] == first.failures else 0 :]
    update = {
        name: getattr(first, name)
        for name in ("source", "license", "split", "generator", "extra")
        if not getattr(row, name)
    } | {
        "parents": ids,
        "roots": tuple(dict.fromkeys(root for parent in parents for root in parent.roots)),
        "references": row.references or first.references,
        "labels": {k: v for one in (*parents, row) for k, v in one.labels.items()},
        "measures": {k: v for one in (*parents, row) for k, v in one.measures.items()},
        "signed": tuple(dict.fromkeys(name for one in (*parents, row) for name in one.signed)),
        "failures": first.failures + again,
    }
    made = row.model_copy(update=update)
    return plain_identified(made, plain_digest([ids, alias, slot], 12))


@kinds
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_identity_is_that_of_the_plain_way(kind, data):
    row = data.draw(ROWS[kind])
    parents = [
        parent.identified(f"{place}")
        for place, parent in enumerate(data.draw(st.lists(ROWS[Prompt], min_size=1, max_size=2)))
    ]
    assert row.content == plain_digest(plain_body(row), 12)
    assert row.identified("o").model_dump() == plain_identified(row, "o").model_dump()
    made, plain = row.derived(parents, "a", 1), plain_derived(row, parents, "a", 1)
    assert made == plain
    assert made.model_dump_json() == plain.model_dump_json()


@kinds
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_tables_are_those_of_the_plain_way(kind, data):
    rows = [row.identified("o") for row in data.draw(st.lists(ROWS[kind], max_size=3))]
    frame = to_frame(kind, rows)
    plain = pl.DataFrame([row.model_dump(context="frame") for row in rows], kind.table_schema())
    assert frame.schema == plain.schema
    assert frame.equals(plain)
    assert frame.write_ndjson() == plain.write_ndjson()
    assert from_frame(kind, frame) == [kind.model_validate(row) for row in frame.to_dicts()] == rows


def test_more_rows_than_a_batch_keep_their_order():
    rows = [
        Prompt(messages=(Message(role="user", content=f"{number}"),)).identified(f"{number}")
        for number in range(2 * BATCH + 1)
    ]
    assert from_frame(Prompt, to_frame(Prompt, rows)) == rows


@settings(deadline=None)
@given(
    st.recursive(
        TEXTS | NUMBERS | st.booleans() | st.none(),
        lambda one: st.lists(one) | st.dictionaries(TEXTS, one),
    )
)
def test_canonical_json_is_that_of_the_library(value):
    """Only powers of ten are written in another way."""
    read = json.loads(canonical_json(value))
    assert read == value
    told = {"ensure_ascii": False, "separators": (",", ":")}
    assert json.dumps(read, **told) == json.dumps(value, sort_keys=True, **told)


@pytest.mark.parametrize("value", [float("nan"), [None, float("inf")], {"a": {"b": -float("inf")}}])
def test_canonical_json_holds_no_nan(value):
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical_json(value)


@pytest.mark.parametrize("value", [2**70, [None, -(2**80)]])
def test_canonical_json_holds_whole_numbers_of_any_size(value):
    assert json.loads(canonical_json(value)) == value


MARKS = re.compile(
    r"""[;?¿¡…"“”„«»、。]|[.,:](?!\d)|(?<!\d)!(?![=\w(])|(?<!\w)['‘’`´]|['‘’`´](?!\w)"""
)


@given(st.text(""";?¿¡…"“”„«»、。.,:!'‘’`´ ab1_=(é\n""", max_size=12))
def test_sentence_marks_fold_as_they_are_told_apart(text):
    folded = unicodedata.normalize("NFKC", text).casefold()
    words = " ".join(MARKS.sub(" ", folded).split())
    assert normalise(text) == (words or " ".join(folded.split()))
