"""OpenAI-compatible endpoints: replies of any shape, and many at once.

What is sent and how faults are met is in `test_openai_chat.py`.
"""

import asyncio

import pytest
from aiohttp import web
from endpoint import Endpoint

from datakit.errors import Refused, Unanswered
from datakit.models.chat import Ask
from datakit.models.ledger import Ledger, Ledgered, Meter
from datakit.models.openai import OpenAIChat
from datakit.models.specs import OpenAISpec
from datakit.records import Message


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr("datakit.models.openai._FIRST_WAIT_S", 0.001)


def say(text="hello"):
    return Ask(messages=(Message(role="user", content=text),))


def spec_at(url, **more):
    return OpenAISpec(kind="openai", model="any", base_url=url, **more)


def reply_to_body(body, status=200, content_type="application/json"):
    """What the client makes of an endpoint that always sends these bytes."""

    async def send(_):
        return web.Response(body=body, status=status, content_type=content_type)

    async def asked():
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

    return asyncio.run(asked())


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
def test_a_body_that_is_no_completion_counts_as_malformed(body):
    with pytest.raises(Unanswered, match="malformed_body"):
        reply_to_body(body)


def test_a_page_instead_of_json_counts_as_malformed():
    with pytest.raises(Unanswered, match="malformed_body"):
        reply_to_body(b"<html>busy</html>", content_type="text/html")


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
def test_a_message_is_read_whatever_its_dialect(message, text, reasoning):
    reply = reply_to_body(b'{"choices": [{"message": %s}]}' % message)
    assert (reply.text, reply.reasoning) == (text, reasoning)


@pytest.mark.parametrize("said", ["blocked by the content filter", "violates our content policy"])
def test_a_request_that_a_filter_blocks_is_refused(said):
    body = b'{"error": {"message": "%s"}}' % said.encode()
    with pytest.raises(Refused, match="content_filter"):
        reply_to_body(body, status=400)


def test_2000_requests_at_256_in_flight_lose_nothing(tmp_path):
    count = 2_000

    def echo(body):
        return f"reply to {body['messages'][0]['content']}"

    async def asked(spec, ledger, meter):
        model = Ledgered(OpenAIChat(spec, meter), spec, ledger, meter, offline=False)
        try:
            return await asyncio.gather(*(model.answer(say(str(n))) for n in range(count)))
        finally:
            await model.close()

    meter = Meter()
    with Endpoint(reply=echo, p500=0.02, pcut=0.02) as endpoint, Ledger.opened(tmp_path) as ledger:
        spec = spec_at(endpoint.url, max_in_flight=256, retries=10)
        replies = asyncio.run(asked(spec, ledger, meter))
        stats = endpoint.stats()
        assert ledger.stats()[0]["answers"] == count
    assert [reply.text for reply in replies] == [f"reply to {number}" for number in range(count)]
    assert stats["max_in_flight"] <= 256
    assert meter.sent == stats["ok"] == count
    assert stats["sent_again_after_ok"] == 0
