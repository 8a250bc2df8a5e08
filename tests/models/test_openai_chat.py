"""The client of an OpenAI-compatible endpoint: what is sent, and what is read.

Over HTTP to `Endpoint`, whose answers are the same on every run. What goes wrong is in
`test_faults.py`.
"""

from dataclasses import replace

import pytest
from endpoint import Endpoint
from models_kit import answer, answers, attempts, openai, say, sends, server

from datakit.errors import EndpointError, InputError, Unanswered
from datakit.models.chat import SCHEMA_REQUEST, Ask, Reply
from datakit.models.openai import reply_of
from datakit.models.sampling import Sampling
from datakit.records import Response
from datakit.session import Watch
from datakit.text import canonical_json

PREFIX = Ask(prefix="Once upon")
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    monkeypatch.setattr("datakit.models.openai._FIRST_WAIT_S", 0.001)


@pytest.fixture
def reply(tmp_path):
    """What the endpoint gives to an ask."""
    return lambda endpoint, ask, **spec: answer(tmp_path, openai(endpoint.url, **spec), ask)


@pytest.fixture
def sent(tmp_path):
    """The body that arrives for an ask."""

    def arrived(ask, **spec):
        bodies = []
        with Endpoint(reply=lambda body: bodies.append(body) or "fine") as endpoint:
            answer(tmp_path / str(endpoint.url)[-8:-3], openai(endpoint.url, **spec), ask)
        assert len(bodies) == 1
        return bodies[0]

    return arrived


# What is sent


def test_a_chat_is_sent_as_messages_and_a_prefix_as_prompt(sent):
    assert sent(say()) == {
        "model": "any",
        "messages": [{"role": "user", "content": "What is 1 + 1?"}],
    }
    assert sent(PREFIX) == {"model": "any", "prompt": "Once upon"}


def test_the_draw_is_not_sent(sent):
    assert sent(say(draw=7)) == sent(say())


@pytest.mark.parametrize("ask", [say, lambda **fields: replace(PREFIX, **fields)])
def test_the_settings_that_arrive_are_the_asks_over_the_models(sent, ask):
    model = Sampling(temperature=0.7, max_tokens=99, stop=("END",))
    own = Sampling(temperature=0.0, top_p=0.5, seed=3)
    body = sent(ask(sampling=own), sampling=model)
    settings = {name: v for name, v in body.items() if name not in ("model", "messages", "prompt")}
    assert settings == {
        "temperature": 0.0,
        "top_p": 0.5,
        "seed": 3,
        "max_tokens": 99,
        "stop": ["END"],
    }


@pytest.mark.parametrize(
    ("ask", "spec", "arrives"),
    [
        (say(reasoning_effort="low"), {"reasoning_effort": "high"}, {"reasoning_effort": "low"}),
        (say(), {"reasoning_effort": "high"}, {"reasoning_effort": "high"}),
        (
            say(chat_template_kwargs={"a": 1}),
            {"chat_template_kwargs": {"a": 0, "b": 0}},
            {"chat_template_kwargs": {"a": 1, "b": 0}},
        ),
        (say(extra_body={"min_p": 0.1}), {"extra_body": {"min_p": 0.2}}, {"min_p": 0.1}),
        (say(logprobs=3), {}, {"logprobs": True, "top_logprobs": 3}),
        (replace(PREFIX, logprobs=3), {}, {"logprobs": 3}),
        (say(answer_schema=SCHEMA), {"json_schema": False}, {}),
        (replace(PREFIX, answer_schema=SCHEMA), {"json_schema": False}, {}),
        (
            say(answer_schema=SCHEMA),
            {"json_schema": True},
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True},
                }
            },
        ),
    ],
)
def test_what_a_model_and_an_ask_add_arrives(sent, ask, spec, arrives):
    body = sent(ask, **spec)
    assert {k: v for k, v in body.items() if k not in ("model", "messages", "prompt")} == arrives


def test_a_schema_that_no_endpoint_enforces_is_asked_for_after_the_last_message(sent):
    wanted = SCHEMA_REQUEST.replace("{schema}", canonical_json(SCHEMA))
    last = sent(say("{schema} {error}", answer_schema=SCHEMA))["messages"][-1]
    assert last == {"role": "user", "content": f"{{schema}} {{error}}\n\n{wanted}"}
    assert sent(say(answer_schema=SCHEMA), json_schema=True)["messages"] == sent(say())["messages"]


# What is read


@pytest.mark.parametrize(("ask", "words"), [(say(), 5), (PREFIX, 2)], ids=["chat", "prefix"])
def test_a_reply_holds_text_finish_reason_and_usage(reply, ask, words):
    with Endpoint(reply=lambda body: "It is 2.") as endpoint:
        assert reply(endpoint, ask) == Reply(
            text="It is 2.", finish_reason="stop", input_tokens=words, output_tokens=3
        )


@pytest.mark.parametrize("ask", [say(), PREFIX], ids=["chat", "prefix"])
def test_a_reply_that_was_cut_by_the_token_limit_says_so(reply, ask):
    with Endpoint(reply=lambda body: "one two three") as endpoint:
        cut = reply(endpoint, ask, sampling=Sampling(max_tokens=2))
    assert (cut.text, cut.finish_reason, cut.output_tokens) == ("one two", "length", 2)


@pytest.mark.parametrize(
    ("said", "text"),
    [
        ("half \ud83d a pair", "half ? a pair"),
        ("\ude42\ud83d", "??"),
        ("a nul \0.", "a nul \0."),
        ("", ""),
        ("🙂\u2028\r\n", "🙂\u2028\r\n"),
    ],
    ids=["half a pair", "a pair in the wrong order", "nul", "empty", "odd characters"],
)
@pytest.mark.parametrize("ask", [say(), PREFIX], ids=["chat", "prefix"])
def test_whatever_was_said_is_text_that_the_ledger_and_a_record_hold(tmp_path, ask, said, text):
    watch = Watch()
    with Endpoint(reply=lambda body: said) as endpoint:
        first = answer(tmp_path, openai(endpoint.url), ask)
        second = answer(tmp_path, openai(endpoint.url), ask, watch=watch)
    assert first == second
    assert first.text == text
    assert Response(text=first.text).text == text
    assert watch.meter.replayed == 1


def test_logprobs_of_half_a_character_go_into_the_ledger(tmp_path):
    body = (
        b'{"choices": [{"message": {"content": "x"}, "logprobs":'
        b' {"content": [{"token": "\\ud83d", "logprob": -0.5}]}}]}'
    )
    with server(sends(body)) as url:
        first, second = (answer(tmp_path, openai(url), say(logprobs=1)) for _ in range(2))
    assert first == second
    assert first.logprobs == {"content": [{"token": "?", "logprob": -0.5}]}


@pytest.mark.parametrize("ask", [say(logprobs=2), replace(PREFIX, logprobs=2)], ids=["chat", "raw"])
def test_logprobs_arrive_as_they_were_sent_and_are_replayed(tmp_path, reply, ask):
    with Endpoint(reply=lambda body: "two words") as endpoint:
        found = [reply(endpoint, ask) for _ in range(2)]
    assert found[0] == found[1]
    assert found[0].logprobs


BODIES = [
    b"",
    b"null",
    b"[]",
    b'"text"',
    b"{}",
    b'{"choices": null}',
    b'{"choices": []}',
    b'{"choices": [null]}',
    b'{"choices": [{}]}',
    b'{"choices": [{"message": {"content": 3}}]}',
    b'{"choices": [{"message": {"content": "x"}, "finish_reason": 3}]}',
    b'{"choices": [{"message": {"content": "\xff"}}]}',
    b"\xff\xfe\x00",
    b"<html>busy</html>",
    b"[" * 100_000,
]


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body[:70].decode(errors="replace"))
def test_a_body_that_is_no_completion_counts_as_malformed(tmp_path, body):
    handler = sends(body, content_type="text/html" if body[:1] == b"<" else "application/json")
    with server(handler) as url, pytest.raises(Unanswered, match="malformed_body"):
        answer(tmp_path, openai(url, retries=1), say())
    assert len(handler.seen) == 2


@pytest.mark.parametrize(
    ("message", "text", "reasoning"),
    [
        (b'{"content": null}', "", ""),
        (b'{"content": "a", "reasoning": "b"}', "a", "b"),
        (b'{"content": "a", "reasoning_content": "b"}', "a", "b"),
        (b'{"content": "cut \\ud83d"}', "cut ?", ""),
        (b'{"content": "whole \\ud83d\\ude42"}', "whole 🙂", ""),
    ],
    ids=["no content", "reasoning", "reasoning_content", "half a pair", "a pair"],
)
def test_a_message_is_read_whatever_its_dialect(tmp_path, message, text, reasoning):
    with server(sends(b'{"choices": [{"message": %s}]}' % message)) as url:
        found = answer(tmp_path, openai(url), say())
    assert (found.text, found.reasoning) == (text, reasoning)


# Keys


def test_the_key_in_the_variable_is_the_one_sent(reply, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-right")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-someone-else")
    with Endpoint(key="sk-right") as endpoint:
        assert reply(endpoint, say(), api_key_env="MY_KEY").finish_reason == "stop"


@pytest.mark.parametrize("value", [None, ""], ids=["missing", "empty"])
def test_a_variable_without_a_key_is_an_input_error_and_nothing_is_sent(reply, monkeypatch, value):
    monkeypatch.delenv("MY_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("MY_KEY", value)
    with Endpoint() as endpoint:
        with pytest.raises(InputError, match=r"'MY_KEY'.*is not set"):
            reply(endpoint, say(), api_key_env="MY_KEY")
        assert endpoint.stats()["requests"] == 0


def test_a_key_of_the_openai_package_is_not_sent_unasked(reply, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-mine")
    with Endpoint(key="sk-mine") as endpoint, pytest.raises(EndpointError):
        reply(endpoint, say())


# Many at once


@pytest.mark.parametrize(
    ("count", "window", "latency"),
    [
        (500, 128, "fixed:0.1"),
        pytest.param(2_000, 256, "fixed:0", marks=pytest.mark.slow),
    ],
)
def test_many_requests_at_once_lose_nothing(tmp_path, count, window, latency):
    texts = [f"question {number}" for number in range(count)]
    watch = Watch()
    echo = {"reply": lambda body: f"answer to {body['messages'][0]['content']}"}
    with Endpoint(**echo, p500=0.02, pcut=0.02, latency=latency) as endpoint:
        spec = openai(endpoint.url, max_in_flight=window, retries=10)
        given = answers(tmp_path, spec, map(say, texts), watch=watch)
        stats = endpoint.stats()
    assert [one.text for one in given] == [f"answer to {text}" for text in texts]
    assert watch.meter.sent == stats["ok"] == stats["distinct"] == count
    assert watch.meter.failed == sum(stats["errors"].values()) > 0
    assert stats["answered_twice"] == stats["sent_again_after_ok"] == 0
    assert stats["max_in_flight"] <= window
    assert latency == "fixed:0" or stats["max_in_flight"] > 32
    assert len(attempts(tmp_path)) == stats["requests"]


ODD = [
    ("usage", {"prompt_tokens": "many"}),
    ("usage", {"prompt_tokens": 10**30, "completion_tokens": -5}),
    ("usage", []),
    ("finish_reason", "\ud800"),
]


@pytest.mark.parametrize(("field", "value"), ODD)
def test_an_odd_count_or_reason_costs_no_answer(field, value):
    choice = {"message": {"content": "x"}, "finish_reason": "stop"}
    body = {"choices": [choice], "usage": {}}
    (choice if field == "finish_reason" else body)[field] = value
    reply = reply_of(body)
    assert (reply.text, reply.input_tokens, reply.output_tokens) == ("x", 0, 0)
    reply.model_dump_json()


@pytest.mark.parametrize("reason", ["abort", "error"])
def test_an_answer_that_the_server_broke_off_is_asked_again(reason):
    with pytest.raises(ValueError, match=reason):
        reply_of({"choices": [{"message": {"content": "hal"}, "finish_reason": reason}]})


def test_a_refusal_in_words_is_kept_as_a_refusal():
    message = {"content": None, "refusal": "I will not."}
    reply = reply_of({"choices": [{"message": message, "finish_reason": "stop"}]})
    assert (reply.text, reply.finish_reason) == ("I will not.", "content_filter")


def test_text_parts_are_one_text():
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    assert reply_of({"choices": [{"message": {"content": parts}}]}).text == "one two"
