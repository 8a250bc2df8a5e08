"""OpenAI-compatible endpoints: what heals is tried again, what never will is not."""

import asyncio
import time

import pytest
from aiohttp import web
from endpoint import Endpoint

from datakit.errors import EndpointError, InputError, Refused, Rejected, Unanswered
from datakit.models import openai as client
from datakit.models.chat import Ask, OpenAISpec, Sampling
from datakit.models.ledger import Ledger, Ledgered, Meter
from datakit.models.openai import OpenAIChat
from datakit.records import Message


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(client, "_FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(client, "_LONGEST_WAIT_S", 1.0)


def say(text="hello", **more):
    return Ask(messages=(Message(role="user", content=text),), **more)


def spec_at(url, **more):
    return OpenAISpec(**({"kind": "openai", "model": "any", "base_url": url} | more))


def answers(wait, spec, asks, meter=None):
    async def asked():
        chat = OpenAIChat(spec, meter or Meter())
        try:
            return await asyncio.gather(*(chat.answer(ask) for ask in asks))
        finally:
            await chat.close()

    return wait(asked())


def answer(wait, spec, ask=None):
    return answers(wait, spec, [ask or say()])[0]


# -- good replies --------------------------------------------------------------------------------


def test_a_chat_completion_has_text_reason_and_usage(wait):
    with Endpoint(reply=lambda body: "three words here") as endpoint:
        reply = answer(wait, spec_at(endpoint.url), say("just two"))
    assert reply.text == "three words here"
    assert reply.finish_reason == "stop"
    assert (reply.input_tokens, reply.output_tokens) == (2, 3)


def test_a_prefix_is_continued_by_the_text_completions_route(wait):
    seen = []
    with Endpoint(reply=lambda body: seen.append(body) or "upon a time") as endpoint:
        reply = answer(wait, spec_at(endpoint.url), Ask(prefix="Once"))
    assert reply.text == "upon a time"
    assert seen == [{"model": "any", "prompt": "Once"}]


def test_a_reply_that_was_cut_says_length(wait):
    with Endpoint() as endpoint:
        reply = answer(wait, spec_at(endpoint.url), say(sampling=Sampling(max_tokens=1)))
    assert reply.finish_reason == "length"


def test_the_draw_is_never_sent(wait):
    seen = []
    with Endpoint(reply=lambda body: seen.append(body) or "x") as endpoint:
        answer(wait, spec_at(endpoint.url), say(draw=3))
    assert seen == [{"model": "any", "messages": [{"role": "user", "content": "hello"}]}]


# -- faults that heal ----------------------------------------------------------------------------

FAULTS = {
    "p500": "http_500",
    "p429": "rate_limited",
    "pbad": "malformed_body",
    "pcut": "connection",
    "phang": "timeout",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_retried_until_it_heals(wait, fault):
    asks = [say(str(number)) for number in range(8)]
    meter = Meter()
    with Endpoint(**{fault: 0.5}) as endpoint:
        spec = spec_at(endpoint.url, retries=20, timeout_s=0.1 if fault == "phang" else 10)
        replies = answers(wait, spec, asks, meter)
        stats = endpoint.stats()
        endpoint.set(**{fault: 0})
        assert replies == answers(wait, spec, asks)
    assert stats["errors"].get(fault, 0) + stats["errors"].get("client_left", 0) == meter.failed > 0


@pytest.mark.parametrize(("fault", "reason"), FAULTS.items())
def test_a_fault_that_stays_leaves_the_row_unanswered_with_its_reason(wait, fault, reason):
    with Endpoint(**{fault: 1}) as endpoint:
        spec = spec_at(endpoint.url, retries=2, timeout_s=0.1 if fault == "phang" else 10)
        with pytest.raises(Unanswered) as raised:
            answer(wait, spec)
        assert endpoint.stats()["requests"] == 3
    assert raised.value.reason == reason
    assert f"after 3 tries at {endpoint.url}" in raised.value.detail
    assert raised.value.transient


def test_retries_0_means_one_try(wait):
    with Endpoint(p500=1) as endpoint:
        with pytest.raises(Unanswered):
            answer(wait, spec_at(endpoint.url, retries=0))
        assert endpoint.stats()["requests"] == 1


def test_an_endpoint_that_is_not_there_leaves_the_row_unanswered(wait):
    with Endpoint() as endpoint:
        url = endpoint.url
    with pytest.raises(Unanswered, match="connection: connection failed: Cannot connect"):
        answer(wait, spec_at(url, retries=1))


def test_retry_after_is_waited_for_in_full(wait):
    with Endpoint(p429=1, retry_after=0.3) as endpoint:
        start = time.monotonic()
        with pytest.raises(Unanswered, match="rate_limited"):
            answer(wait, spec_at(endpoint.url, retries=1))
        assert time.monotonic() - start >= 0.3


def test_a_retry_after_that_is_shorter_than_our_own_wait_is_believed(wait, monkeypatch):
    monkeypatch.setattr(client, "_FIRST_WAIT_S", 30.0)
    monkeypatch.setattr(client, "_LONGEST_WAIT_S", 60.0)
    with Endpoint(p429=1, retry_after=0.01) as endpoint:
        start = time.monotonic()
        with pytest.raises(Unanswered):
            answer(wait, spec_at(endpoint.url, retries=2))
        assert time.monotonic() - start < 10


# -- bodies that are no completion ---------------------------------------------------------------


def answer_to_body(wait, body, status=200, content_type="application/json"):
    """What the client makes of an endpoint that always sends this."""

    async def asked():
        async def send(_):
            return web.Response(body=body, status=status, content_type=content_type)

        app = web.Application()
        app.router.add_post("/v1/chat/completions", send)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        spec = spec_at(f"http://127.0.0.1:{runner.addresses[0][1]}/v1", retries=1)
        chat = OpenAIChat(spec, Meter())
        try:
            return await chat.answer(say())
        finally:
            await chat.close()
            await runner.cleanup()

    return wait(asked())


@pytest.mark.parametrize(
    "body",
    [
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
        b'{"choices": [{"message": {"content": "x"}}], "usage": {"prompt_tokens": "many"}}',
        b'{"choices": [{"message": {"content": "\xff"}}]}',
        b"\xff\xfe\x00",
        b"[" * 100_000,
    ],
    ids=lambda body: body[:70].decode(errors="replace"),
)
def test_a_body_that_is_no_completion_counts_as_malformed(wait, body):
    with pytest.raises(Unanswered, match="malformed_body"):
        answer_to_body(wait, body)


def test_a_page_instead_of_json_counts_as_malformed(wait):
    with pytest.raises(Unanswered, match="malformed_body"):
        answer_to_body(wait, b"<html>busy</html>", content_type="text/html")


@pytest.mark.parametrize(
    ("message", "text", "reasoning"),
    [
        (b'{"content": null}', "", ""),
        (b'{"content": "a", "reasoning": "b"}', "a", "b"),
        (b'{"content": "a", "reasoning_content": "b"}', "a", "b"),
        (b'{"content": "cut \\ud83d"}', "cut ?", ""),
        (b'{"content": "whole \\ud83d\\ude42"}', "whole 🙂", ""),
    ],
    ids=lambda value: value.decode() if isinstance(value, bytes) else None,
)
def test_a_message_is_read_whatever_its_dialect(wait, message, text, reasoning):
    reply = answer_to_body(wait, b'{"choices": [{"message": %s}]}' % message)
    assert (reply.text, reply.reasoning) == (text, reasoning)


@pytest.mark.parametrize("said", ["blocked by the content filter", "violates our content policy"])
def test_a_request_that_a_filter_blocks_is_refused(wait, said):
    body = b'{"error": {"message": "%s"}}' % said.encode()
    with pytest.raises(Refused, match="content_filter"):
        answer_to_body(wait, body, status=400)


# -- faults that no retry heals ------------------------------------------------------------------


def test_a_wrong_key_stops_at_once_and_names_the_variable_but_not_its_value(wait, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-very-secret")
    with Endpoint(key="another") as endpoint:
        with pytest.raises(EndpointError) as raised:
            answer(wait, spec_at(endpoint.url, api_key_env="MY_KEY"))
        assert endpoint.stats()["requests"] == 1
    assert endpoint.url in str(raised.value)
    assert "'MY_KEY'" in str(raised.value)
    assert "sk-very-secret" not in repr(raised.value)


def test_a_key_that_is_asked_for_and_not_given_is_named(wait):
    with Endpoint(key="some") as endpoint, pytest.raises(EndpointError, match="is not set"):
        answer(wait, spec_at(endpoint.url))


def test_the_right_key_is_let_in(wait, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-right")
    with Endpoint(key="sk-right") as endpoint:
        assert answer(wait, spec_at(endpoint.url, api_key_env="MY_KEY")).text


def test_an_unknown_model_stops_at_once_and_names_url_and_model(wait):
    with Endpoint(models=("known",)) as endpoint:
        with pytest.raises(EndpointError, match="does not know model 'any'") as raised:
            answer(wait, spec_at(endpoint.url))
        assert endpoint.stats()["requests"] == 1
    assert endpoint.url in str(raised.value)


def test_a_key_variable_that_is_not_set_is_an_input_error_before_anything_is_sent(
    wait, monkeypatch
):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with Endpoint() as endpoint:
        with pytest.raises(InputError, match=r"'NO_SUCH_KEY' .* is not set"):
            answer(wait, spec_at(endpoint.url, api_key_env="NO_SUCH_KEY"))
        assert endpoint.stats()["requests"] == 0


def test_a_request_that_the_endpoint_calls_bad_fails_its_row_after_one_try(wait):
    with Endpoint() as endpoint:
        with pytest.raises(Rejected, match="400") as raised:
            answer(wait, spec_at(endpoint.url), say(extra_body={"stream": True}))
        assert endpoint.stats()["requests"] == 1
    assert raised.value.reason == "bad_request"
    assert not raised.value.transient


# -- many ----------------------------------------------------------------------------------------


def test_2000_requests_at_256_in_flight_lose_nothing(wait, tmp_path):
    count = 2_000

    async def asked(spec, ledger, meter):
        model = Ledgered(OpenAIChat(spec, meter), spec, ledger, meter, offline=False)
        try:
            return await asyncio.gather(*(model.answer(say(str(n))) for n in range(count)))
        finally:
            await model.close()

    def echo(body):
        return f"reply to {body['messages'][0]['content']}"

    meter = Meter()
    with Endpoint(reply=echo, p500=0.02, pcut=0.02) as endpoint, Ledger.opened(tmp_path) as ledger:
        spec = spec_at(endpoint.url, max_in_flight=256, retries=10)
        replies = wait(asked(spec, ledger, meter))
        stats = endpoint.stats()
        assert ledger.stats()[0]["answers"] == count
    assert [reply.text for reply in replies] == [f"reply to {number}" for number in range(count)]
    assert stats["max_in_flight"] <= 256
    assert meter.sent == stats["ok"] == count
    assert stats["sent_again_after_ok"] == 0
