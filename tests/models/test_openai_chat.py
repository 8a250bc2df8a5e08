"""The client of an OpenAI-compatible endpoint: what is sent, what is read, and what each fault is.

Over HTTP to `Endpoint`, whose answers and faults are the same on every run.
"""

import asyncio
import time

import pytest
from aiohttp import web
from endpoint import Endpoint

from datakit.errors import EndpointError, InputError, Unanswered
from datakit.models.chat import Ask, Reply
from datakit.models.ledger import Ledger, Ledgered, Meter
from datakit.models.openai import OpenAIChat
from datakit.models.specs import OpenAISpec, Sampling
from datakit.records import Message, Response

REASONS = {
    "p500": "http_500",
    "p429": "rate_limited",
    "pbad": "malformed_body",
    "pcut": "connection",
    "phang": "timeout",
}
PREFIX = Ask(prefix="Once upon")
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    monkeypatch.setattr("datakit.models.openai._FIRST_WAIT_S", 0.001)


def chat(text="What is 1 + 1?", **fields):
    return Ask(messages=(Message(role="user", content=text),), **fields)


def replies(endpoint, asks, meter=None, **spec):
    """What the endpoint gives to each of `asks`, all asked at once."""
    fields = {"kind": "openai", "model": "any", "base_url": endpoint.url} | spec
    model = OpenAIChat(OpenAISpec(**fields), meter or Meter())

    async def all_of_them():
        try:
            return await asyncio.gather(*map(model.answer, asks))
        finally:
            await model.close()

    return asyncio.run(all_of_them())


def reply(endpoint, ask, **spec):
    return replies(endpoint, [ask], **spec)[0]


def sent(ask, **spec):
    """The body that arrives for `ask`."""
    bodies = []
    with Endpoint(reply=lambda body: bodies.append(body) or "fine") as endpoint:
        reply(endpoint, ask, **spec)
    assert len(bodies) == 1
    return bodies[0]


# What is sent


def test_a_chat_is_sent_as_messages_and_a_prefix_as_prompt():
    assert sent(chat()) == {
        "model": "any",
        "messages": [{"role": "user", "content": "What is 1 + 1?"}],
    }
    assert sent(PREFIX) == {"model": "any", "prompt": "Once upon"}


def test_the_draw_is_not_sent():
    assert sent(chat(draw=7)) == sent(chat())


@pytest.mark.parametrize("ask", [chat, lambda **fields: PREFIX.model_copy(update=fields)])
def test_the_settings_that_arrive_are_the_asks_over_the_models(ask):
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
        (chat(reasoning_effort="low"), {"reasoning_effort": "high"}, {"reasoning_effort": "low"}),
        (chat(), {"reasoning_effort": "high"}, {"reasoning_effort": "high"}),
        (
            chat(chat_template_kwargs={"a": 1}),
            {"chat_template_kwargs": {"a": 0, "b": 0}},
            {"chat_template_kwargs": {"a": 1, "b": 0}},
        ),
        (chat(extra_body={"min_p": 0.1}), {"extra_body": {"min_p": 0.2}}, {"min_p": 0.1}),
        (chat(logprobs=3), {}, {"logprobs": True, "top_logprobs": 3}),
        (PREFIX.model_copy(update={"logprobs": 3}), {}, {"logprobs": 3}),
        (chat(answer_schema=SCHEMA), {"json_schema": False}, {}),
        (
            chat(answer_schema=SCHEMA),
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
def test_what_a_model_and_an_ask_add_arrives(ask, spec, arrives):
    body = sent(ask, **spec)
    assert {k: v for k, v in body.items() if k not in ("model", "messages", "prompt")} == arrives


# What is read


@pytest.mark.parametrize(("ask", "words"), [(chat(), 5), (PREFIX, 2)], ids=["chat", "prefix"])
def test_a_reply_holds_text_finish_reason_and_usage(ask, words):
    with Endpoint(reply=lambda body: "It is 2.") as endpoint:
        assert reply(endpoint, ask) == Reply(
            text="It is 2.", finish_reason="stop", input_tokens=words, output_tokens=3
        )


@pytest.mark.parametrize("ask", [chat(), PREFIX], ids=["chat", "prefix"])
def test_a_reply_that_was_cut_by_the_token_limit_says_so(ask):
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
@pytest.mark.parametrize("ask", [chat(), PREFIX], ids=["chat", "prefix"])
def test_whatever_was_said_is_text_that_the_ledger_and_a_record_hold(tmp_path, ask, said, text):
    spec, meter = OpenAISpec(kind="openai", model="any"), Meter()
    with Endpoint(reply=lambda body: said) as endpoint, Ledger.opened(tmp_path) as ledger:
        spec = spec.model_copy(update={"base_url": endpoint.url})
        model = Ledgered(OpenAIChat(spec, meter), spec, ledger, meter, offline=False)

        async def twice():
            try:
                return [await model.answer(ask), await model.answer(ask)]
            finally:
                await model.close()

        first, second = asyncio.run(twice())
    assert first == second
    assert first.text == text
    assert Response(text=first.text).text == text
    assert meter.replayed == 1


def test_logprobs_of_half_a_character_go_into_the_ledger(tmp_path):
    """No fake gives logprobs, so this one server does."""
    body = (
        b'{"choices": [{"message": {"content": "x"}, "logprobs":'
        b' {"content": [{"token": "\\ud83d", "logprob": -0.5}]}}]}'
    )

    async def serve(_):
        return web.Response(body=body, content_type="application/json")

    async def answer(ledger):
        app = web.Application()
        app.router.add_post("/v1/chat/completions", serve)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        spec, meter = OpenAISpec(kind="openai", model="any", base_url=url), Meter()
        model = Ledgered(OpenAIChat(spec, meter), spec, ledger, meter, offline=False)
        try:
            return await model.answer(chat(logprobs=1)), await model.answer(chat(logprobs=1))
        finally:
            await model.close()
            await runner.cleanup()

    with Ledger.opened(tmp_path) as ledger:
        first, second = asyncio.run(answer(ledger))
    assert first == second
    assert first.logprobs == {"content": [{"token": "?", "logprob": -0.5}]}


# Faults that a further try may heal


@pytest.mark.parametrize("fault", REASONS)
@pytest.mark.parametrize("ask", [chat, lambda text: Ask(prefix=text)], ids=["chat", "prefix"])
def test_a_passing_fault_is_healed_by_a_further_try(fault, ask):
    asks = [ask(f"question {number}") for number in range(6)]
    meter = Meter()
    with Endpoint(**{fault: 0.4}, retry_after=0) as endpoint:
        healed = replies(endpoint, asks, meter, retries=30, timeout_s=0.2)
        assert endpoint.stats()["errors"][fault] > 0
        endpoint.set(**{fault: 0})
        assert healed == replies(endpoint, asks)
    assert meter.failed > 0


@pytest.mark.parametrize("fault", REASONS)
@pytest.mark.parametrize("retries", [0, 2])
def test_a_lasting_fault_leaves_the_row_unanswered_after_all_tries(fault, retries):
    with Endpoint(**{fault: 1}) as endpoint:
        with pytest.raises(Unanswered) as raised:
            reply(endpoint, chat(), retries=retries, timeout_s=0.15 if fault == "phang" else 10)
        assert endpoint.stats()["requests"] == retries + 1
    assert raised.value.reason == REASONS[fault]
    assert raised.value.detail.endswith(f"after {retries + 1} tries at {endpoint.url}")
    assert raised.value.transient


def test_retry_after_is_honoured_over_a_shorter_wait_of_our_own():
    with Endpoint(p429=1, retry_after=0.2) as endpoint:
        began = time.monotonic()
        with pytest.raises(Unanswered):
            reply(endpoint, chat(), retries=1)
        assert time.monotonic() - began >= 0.2


def test_retry_after_is_honoured_over_a_longer_wait_of_our_own(monkeypatch):
    monkeypatch.setattr("datakit.models.openai._FIRST_WAIT_S", 30.0)
    with Endpoint(p429=1, retry_after=0) as endpoint:
        began = time.monotonic()
        with pytest.raises(Unanswered):
            reply(endpoint, chat(), retries=3)
        assert time.monotonic() - began < 10


def test_an_endpoint_that_is_gone_leaves_the_row_unanswered():
    with Endpoint() as endpoint:
        pass
    with pytest.raises(Unanswered, match="Cannot connect") as raised:
        reply(endpoint, chat(), retries=1)
    assert raised.value.reason == "connection"


def test_1000_requests_at_128_in_flight_lose_nothing(tmp_path):
    texts = [f"question {number}" for number in range(1_000)]

    def echo(body):
        return f"answer to {body['messages'][0]['content']}"

    with Endpoint(reply=echo, p500=0.02, pcut=0.02, latency="fixed:0.15") as endpoint:
        spec = OpenAISpec(kind="openai", model="any", base_url=endpoint.url, max_in_flight=128)
        meter = Meter()
        with Ledger.opened(tmp_path) as ledger:
            model = Ledgered(OpenAIChat(spec, meter), spec, ledger, meter, offline=False)

            async def all_of_them():
                try:
                    return await asyncio.gather(*(model.answer(chat(text)) for text in texts))
                finally:
                    await model.close()

            given = asyncio.run(all_of_them())
            assert ledger.stats()[0]["answers"] == 1_000
        stats = endpoint.stats()
    assert [one.text for one in given] == [f"answer to {text}" for text in texts]
    assert meter.sent == stats["ok"] == stats["distinct"] == 1_000
    assert meter.failed == sum(stats["errors"].values()) > 0
    assert stats["answered_twice"] == 0
    assert 32 < stats["max_in_flight"] <= 128


# Faults that no further try heals


def test_a_refused_key_names_url_and_variable_but_never_the_key(monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-secret-value")
    with Endpoint(key="sk-right") as endpoint:
        with pytest.raises(EndpointError) as raised:
            reply(endpoint, chat(), api_key_env="MY_KEY")
        assert endpoint.stats()["requests"] == 1
    assert endpoint.url in str(raised.value)
    assert "'MY_KEY'" in str(raised.value)
    causes, error = [], raised.value
    while error is not None:
        causes.append(error)
        error = error.__cause__ or error.__context__
    assert not any("sk-secret-value" in f"{error!r} {error}" for error in causes)


def test_a_refused_key_says_where_no_variable_was_named():
    with (
        Endpoint(key="sk-right") as endpoint,
        pytest.raises(EndpointError, match="api_key_env is not set"),
    ):
        reply(endpoint, chat())


def test_the_key_in_the_variable_is_the_one_sent(monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-right")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-someone-else")
    with Endpoint(key="sk-right") as endpoint:
        assert reply(endpoint, chat(), api_key_env="MY_KEY").finish_reason == "stop"


@pytest.mark.parametrize("value", [None, ""], ids=["missing", "empty"])
def test_a_variable_without_a_key_is_an_input_error_and_nothing_is_sent(monkeypatch, value):
    monkeypatch.delenv("MY_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("MY_KEY", value)
    with Endpoint() as endpoint:
        with pytest.raises(InputError, match=r"'MY_KEY'.*is not set"):
            reply(endpoint, chat(), api_key_env="MY_KEY")
        assert endpoint.stats()["requests"] == 0


def test_a_key_of_the_openai_package_is_not_sent_unasked(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-mine")
    with Endpoint(key="sk-mine") as endpoint, pytest.raises(EndpointError):
        reply(endpoint, chat())


def test_an_unknown_model_names_url_and_model():
    with Endpoint(models=("known",)) as endpoint:
        with pytest.raises(EndpointError) as raised:
            reply(endpoint, chat(), model="unknown")
        assert endpoint.stats()["requests"] == 1
    assert endpoint.url in str(raised.value)
    assert "'unknown'" in str(raised.value)


def test_a_request_that_the_endpoint_calls_bad_is_asked_once_and_again_by_the_next_run():
    with Endpoint() as endpoint:
        with pytest.raises(Unanswered, match=r"answers 400: .*no stream") as raised:
            reply(endpoint, chat(extra_body={"stream": True}))
        assert endpoint.stats()["requests"] == 1
    assert raised.value.reason == "bad_request"
    assert raised.value.transient
