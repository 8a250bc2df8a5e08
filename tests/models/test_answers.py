"""Structured answers: one clear value of the type that was asked for, or none.

How a reply that does not fit is shown to the model again is tried over HTTP to `Endpoint`.
"""

import json
from typing import Literal

import jsonschema
import pytest
from endpoint import Endpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from models_kit import attempts, entries, openai, say, within
from pydantic import BaseModel, Field

from datakit.annotation.judge import Answer
from datakit.errors import Refused, Truncated, Unparsable
from datakit.models.answers import read_answer, schema_of
from datakit.models.chat import SCHEMA_REQUEST
from datakit.session import Watch
from datakit.text import canonical_json
from datakit.values import Value

NO_ANSWER = None


def said(verdict, reason="because"):
    return json.dumps({"reason": reason, "verdict": verdict})


def deep(left, right, depth=100_000):
    return left * depth + right * depth


REPLIES = {
    # Good ones.
    "plain": (said("A"), "A"),
    "tie": (said("tie"), "tie"),
    "verdict first": ('{"verdict": "B", "reason": "r"}', "B"),
    "spaces around": (f"\n\t  {said('B')} \r\n", "B"),
    "over lines": ('{\n  "reason": "r",\n  "verdict": "A"\n}', "A"),
    "fenced as json": (f"```json\n{said('A')}\n```", "A"),
    "fenced": (f"```\n{said('B')}\n```", "B"),
    "fenced on one line": (f"```{said('B')}```", "B"),
    "another language": (said("B", "回答は短い方が良い。"), "B"),
    "verdict in a quotation within the reason": (said("A", 'It says {"verdict": "B"}'), "A"),
    "huge reason": (said("A", "word " * 300_000), "A"),
    "the same key twice with one value": ('{"verdict":"A","reason":"","verdict":"A"}', "A"),
    "escaped letters": ('{"reason": "", "\\u0076erdict": "\\u0041"}', "A"),
    "half a surrogate pair in the reason": ('{"verdict": "A", "reason": "\\ud83d"}', "A"),
    "NUL in the reason": ('{"verdict": "A", "reason": "\\u0000"}', "A"),
    # Not all of it, or more than it.
    "no reason": ('{"verdict": "B"}', NO_ANSWER),
    "no verdict": ('{"reason": "B"}', NO_ANSWER),
    "a further key": ('{"verdict": "A", "reason": "r", "confidence": 0.9}', NO_ANSWER),
    "an inner object": ('{"a": {"verdict": "B"}, "verdict": "A", "reason": ""}', NO_ANSWER),
    "reason is a number": ('{"verdict": "A", "reason": 7}', NO_ANSWER),
    "reason is null": ('{"verdict": "A", "reason": null}', NO_ANSWER),
    # Nothing.
    "empty": ("", NO_ANSWER),
    "spaces": (" \n\t ", NO_ANSWER),
    "a fence alone": ("```", NO_ANSWER),
    "an empty fence": ("```json\n```", NO_ANSWER),
    "a fence full of spaces": ("```" + " " * 100_000 + "x", NO_ANSWER),
    "a closed fence full of spaces": ("```" + " " * 100_000 + "```", NO_ANSWER),
    "empty object": ("{}", NO_ANSWER),
    "NUL": ("\x00", NO_ANSWER),
    # Prose.
    "prose": ("Answer A is better.", NO_ANSWER),
    "a letter": ("A", NO_ANSWER),
    "a refusal": ("I'm sorry, but I can't compare these.", NO_ANSWER),
    "prose of another language": ("Antwort B ist besser.", NO_ANSWER),
    "brackets": ("[[A]]", NO_ANSWER),
    "JSON after prose": (f"Here you are: {said('A')}", NO_ANSWER),
    "JSON before prose": (f"{said('A')}\nI hope this helps!", NO_ANSWER),
    "a fence within prose": (f"Sure!\n```json\n{said('A')}\n```\nDone.", NO_ANSWER),
    "a fence that is not closed": (f"```json\n{said('A')}", NO_ANSWER),
    "a verdict in quotation marks": ('The user wrote "verdict": "A"', NO_ANSWER),
    "thoughts first": (f"<think>B?</think>{said('A')}", NO_ANSWER),
    "XML": ("<verdict>A</verdict>", NO_ANSWER),
    "YAML": ("verdict: A", NO_ANSWER),
    # More than one.
    "two objects": (said("A") + said("B"), NO_ANSWER),
    "two lines": (said("A") + "\n" + said("A"), NO_ANSWER),
    "two fences": (f"```\n{said('A')}\n```\n```\n{said('B')}\n```", NO_ANSWER),
    "a list of one": (f"[{said('A')}]", NO_ANSWER),
    "the same key twice": ('{"reason": "", "verdict": "A", "verdict": "B"}', NO_ANSWER),
    "twice, once escaped": ('{"reason":"","verdict":"A","\\u0076erdict":"B"}', NO_ANSWER),
    "three times": ('{"reason":"","verdict":"A","verdict":"B","verdict":"A"}', NO_ANSWER),
    "both in a list": ('{"reason": "", "verdict": ["A", "B"]}', NO_ANSWER),
    "a share for each": ('{"reason": "", "verdict": {"A": 0.7, "B": 0.3}}', NO_ANSWER),
    # Another value.
    "lower case": (said("a"), NO_ANSWER),
    "upper-case tie": (said("TIE"), NO_ANSWER),
    "both": (said("Both"), NO_ANSWER),
    "neither": (said("neither"), NO_ANSWER),
    "C": (said("C"), NO_ANSWER),
    "a sentence": (said("Answer A"), NO_ANSWER),
    "a choice": (said("A|B"), NO_ANSWER),
    "the scheme": (said('"A" | "B" | "tie"'), NO_ANSWER),
    "spaces in the verdict": (said(" A "), NO_ANSWER),
    "empty verdict": (said(""), NO_ANSWER),
    "a Cyrillic letter": (said("А"), NO_ANSWER),
    "a wide letter": (said("Ａ"), NO_ANSWER),
    "half a surrogate pair": ('{"reason": "", "verdict": "\\ud83d"}', NO_ANSWER),
    "huge verdict": (said("A" * 1_000_000), NO_ANSWER),
    # Another type.
    "null": ("null", NO_ANSWER),
    "a number": ("1", NO_ANSWER),
    "a string": ('"A"', NO_ANSWER),
    "true": ("true", NO_ANSWER),
    "a list": ('["A"]', NO_ANSWER),
    "a list of a pair": ('[["verdict", "A"]]', NO_ANSWER),
    "verdict null": ('{"reason": "", "verdict": null}', NO_ANSWER),
    "verdict a number": ('{"reason": "", "verdict": 1}', NO_ANSWER),
    "verdict false": ('{"reason": "", "verdict": false}', NO_ANSWER),
    "nested verdict": ('{"answer": {"reason": "", "verdict": "A"}}', NO_ANSWER),
    "JSON in a string": (json.dumps(said("A")), NO_ANSWER),
    "another key": ('{"reason": "", "Verdict": "A"}', NO_ANSWER),
    # Not JSON.
    "BOM": ("\ufeff" + said("A"), NO_ANSWER),
    "trailing comma": ('{"reason": "", "verdict": "A",}', NO_ANSWER),
    "single quotes": ("{'reason': '', 'verdict': 'A'}", NO_ANSWER),
    "a comment": (f"{said('A')} // sure", NO_ANSWER),
    "no quotes": ("{reason: A, verdict: A}", NO_ANSWER),
    "cut": ('{"reason": "r", "verdict": "A', NO_ANSWER),
    "a line break in a string": ('{"reason": "one\ntwo", "verdict": "A"}', NO_ANSWER),
    "NaN": ("NaN", NO_ANSWER),
    "verdict NaN": ('{"reason": "", "verdict": NaN}', NO_ANSWER),
    "verdict -Infinity": ('{"reason": "", "verdict": -Infinity}', NO_ANSWER),
    "a number of too many digits": (f'{{"n": {"9" * 10_000}, "verdict": "A"}}', NO_ANSWER),
    "deep arrays": (deep("[", "]"), NO_ANSWER),
    "arrays as deep as can be read": (deep("[", "]", 900), NO_ANSWER),
    "deep arrays that do not end": (deep("[", ""), NO_ANSWER),
    "deep objects": (deep('{"verdict":', "}", 50_000), NO_ANSWER),
    "a deep reason": (f'{{"verdict": "A", "reason": {deep("[", "]")}}}', NO_ANSWER),
}


@pytest.mark.parametrize("name", REPLIES)
def test_a_reply_has_one_clear_answer_or_none(name):
    text, verdict = REPLIES[name]
    if verdict is None:
        with pytest.raises(Unparsable) as caught:
            read_answer(text, Answer)
        assert caught.value.reason == "invalid_answer"
        assert caught.value.raw == text
        assert 0 < len(caught.value.detail) < 200
        assert not caught.value.transient
    else:
        found = read_answer(text, Answer)
        assert found.verdict == verdict
        # It can be written down: as JSON, and as UTF-8.
        assert Answer.model_validate_json(found.model_dump_json().encode()) == found


class Inner(Value):
    name: str
    size: int = Field(ge=0, le=9)


class Kinds(Value):
    """A field of every kind that an answer type has."""

    text: str
    whole: int
    part: float
    sure: bool
    choice: Literal["x", "y"]
    maybe: int | None
    inner: Inner
    many: list[Inner] = Field(max_length=2)


# A whole number with a point would fit the schema and is yet no whole number.
BROKEN = st.floats(-9, 9).filter(lambda number: not number.is_integer())
FITTING = {
    "text": st.text(max_size=5),
    "whole": st.integers(-9, 9),
    "part": BROKEN,
    "sure": st.booleans(),
    "choice": st.sampled_from(["x", "y"]),
    "maybe": st.none() | st.integers(0, 9),
    "inner": st.just({"name": "n", "size": 3}),
    "many": st.just([]) | st.just([{"name": "n", "size": 0}]),
}
FITS = st.fixed_dictionaries(FITTING)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**50), 2**50) | BROKEN | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from([*FITTING, "name", "size", "else"]), inner, max_size=4)
    ),
    max_leaves=8,
)


@st.composite
def spoilt(draw):
    """An answer that fits but for one field, which is left out, added or has any value."""
    value = draw(FITS)
    name = draw(st.sampled_from([*FITTING, "else"]))
    if draw(st.booleans()):
        value.pop(name, None)
    else:
        value[name] = draw(JSON)
    return value


@settings(max_examples=400, deadline=None)
@given(JSON | spoilt() | FITS)
def test_a_value_that_the_type_rejects_is_unparsable_and_never_filled_in(value):
    text = json.dumps(value)
    fits = jsonschema.Draft202012Validator(schema_of(Kinds)).is_valid(value)
    if fits:
        assert read_answer(text, Kinds).model_dump(mode="json") == value
    else:
        with pytest.raises(Unparsable) as caught:
            read_answer(text, Kinds)
        assert (caught.value.reason, caught.value.raw) == ("invalid_answer", text)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet='{}[]":,`\\ \n\x00ajsonverdict\ud83d'))
def test_whatever_is_said_is_an_answer_or_unparsable(text):
    with pytest.raises(Unparsable):
        read_answer(text, Answer)


class Numbers(BaseModel):
    ok: bool = False
    many: list[float] = []


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
def test_what_is_no_number_of_json_is_no_answer(number):
    with pytest.raises(Unparsable):
        read_answer(f'{{"many": [{number}]}}', Numbers)


def test_a_key_with_two_values_of_different_types_is_no_answer():
    with pytest.raises(Unparsable):
        read_answer('{"ok": 1, "ok": true}', Numbers)


class Titled(Value):
    title: str
    properties: int


def test_a_schema_has_no_titles_but_the_fields_own_and_allows_no_other_key():
    assert schema_of(Answer) == {
        "type": "object",
        "properties": {
            "reason": {"type": "string"},
            "verdict": {"enum": ["A", "B", "tie"], "type": "string"},
        },
        "required": ["reason", "verdict"],
        "additionalProperties": False,
        "description": "What a judge says: first why, then which.",
    }
    assert list(schema_of(Titled)["properties"]) == ["title", "properties"]
    inner = schema_of(Kinds)["$defs"]["Inner"]
    assert "title" not in json.dumps(inner)
    assert (inner["required"], inner["additionalProperties"]) == (["name", "size"], False)


# Over the wire


def asked_for(folder, spec, ask=None, **more):
    """The answer and its reply; an error is raised."""
    return within(folder, spec, lambda kit: kit.ask_for("m", ask or say(), Answer), **more)


def heard(said):
    """A `reply` that says one text after another, and the list of bodies that it heard."""
    bodies = []

    def reply(body):
        bodies.append(body)
        return said[min(len(bodies), len(said)) - 1]

    return reply, bodies


def test_a_schema_is_enforced_where_the_endpoint_can_and_asked_for_in_text_where_not(tmp_path):
    reply, bodies = heard([said("A")])
    with Endpoint(reply=reply) as endpoint:
        asked_for(tmp_path / "1", openai(endpoint.url, json_schema=True))
        asked_for(tmp_path / "2", openai(endpoint.url))
    enforced, told = bodies
    wanted = {"name": "answer", "schema": schema_of(Answer), "strict": True}
    assert enforced["response_format"] == {"type": "json_schema", "json_schema": wanted}
    assert enforced["messages"] == [{"role": "user", "content": "What is 1 + 1?"}]
    assert "response_format" not in told
    request = SCHEMA_REQUEST.replace("{schema}", canonical_json(schema_of(Answer)))
    assert [one["content"] for one in told["messages"]] == [f"What is 1 + 1?\n\n{request}"]


@pytest.mark.parametrize("enforced", [True, False])
def test_a_reply_that_does_not_fit_is_shown_to_the_model_once_with_its_error(tmp_path, enforced):
    reply, bodies = heard(['{"verdict": "A"}', said("B")])
    watch = Watch()
    with Endpoint(reply=reply) as endpoint:
        spec = openai(endpoint.url, json_schema=enforced)
        answer, given_reply = asked_for(tmp_path, spec, watch=watch)
        assert asked_for(tmp_path, spec, watch=watch) == (answer, given_reply)
    assert (answer.verdict, given_reply.text) == ("B", said("B"))
    assert (watch.meter.sent, watch.meter.replayed, len(bodies)) == (2, 2, 2)
    question, own, asked_again = bodies[1]["messages"]
    assert question == {"role": "user", "content": "What is 1 + 1?"}
    assert own == {"role": "assistant", "content": '{"verdict": "A"}'}
    assert asked_again["role"] == "user"
    assert "reason: Field required" in asked_again["content"]
    assert ("JSON schema" in asked_again["content"]) is not enforced
    assert ("response_format" in bodies[1]) is enforced
    # Each is an answer of its own.
    assert {one.reply.text for one in entries(tmp_path)} == {'{"verdict": "A"}', said("B")}
    assert [one.outcome for one in attempts(tmp_path)][:2] == ["ok", "ok"]


@pytest.mark.parametrize("enforced", [True, False])
def test_a_model_that_misses_the_schema_at_first_is_healed_by_its_error(tmp_path, enforced):
    with Endpoint(pinvalid=1) as endpoint:
        answer, _ = asked_for(tmp_path, openai(endpoint.url, json_schema=enforced))
        assert endpoint.stats()["requests"] == 2
    assert answer.verdict in ("A", "B", "tie")


BAD = ["nothing of use", "\x00", "}{", "{}", "\ud83d", "[]" * 9_999, "{a} {error}", "```", "{1}"]


@pytest.mark.parametrize("text", BAD, ids=lambda text: repr(text[:12]))
def test_a_second_reply_that_does_not_fit_is_unparsable_with_its_text(tmp_path, text):
    reply, bodies = heard([text, text + " again"])
    with Endpoint(reply=reply) as endpoint:
        for _ in range(2):
            with pytest.raises(Unparsable) as caught:
                asked_for(tmp_path, openai(endpoint.url))
    assert len(bodies) == 2
    assert caught.value.reason == "invalid_answer"
    assert caught.value.raw == (text + " again").replace("\ud83d", "?")
    assert not caught.value.transient


@pytest.mark.parametrize(
    ("knob", "error"), [("plength", Truncated), ("pfilter", Refused), ("pempty", Unparsable)]
)
def test_a_reply_that_is_cut_refused_or_empty_is_not_repaired(tmp_path, knob, error):
    with Endpoint(**{knob: 1}) as endpoint:
        for _ in range(2):
            with pytest.raises(error) as caught:
                asked_for(tmp_path, openai(endpoint.url, json_schema=True))
        assert endpoint.stats()["requests"] == 1
    assert caught.value.reason == {"plength": "length", "pfilter": "content_filter"}.get(
        knob, "empty"
    )


def test_each_draw_is_repaired_by_itself(tmp_path):
    with Endpoint(pinvalid=1) as endpoint:
        for draw in range(3):
            asked_for(tmp_path, openai(endpoint.url, json_schema=True), say(draw=draw))
        assert endpoint.stats()["requests"] == 6
    assert sorted(one.draw for one in entries(tmp_path)) == [0, 0, 1, 1, 2, 2]
