"""A local model that is up in some passes: what is left for another, asked once, waited for."""

import asyncio
import time

import pytest
from models_kit import attempts, say, within

from datakit.errors import Pending, Unanswered
from datakit.models.chat import Reply
from datakit.models.specs import VLLMSpec
from datakit.models.turns import InTurns


class Answers:
    """A model that does what it is told, one thing for each request."""

    identity = "m"

    def __init__(self, *does):
        self.does = list(does)
        self.asked = 0

    async def answer(self, request):
        self.asked += 1
        await asyncio.sleep(0.01)
        done = self.does.pop(0)
        if isinstance(done, Exception):
            raise done
        return Reply(text=done)

    async def close(self):
        pass


def asked(folder, up, run="run-1", **fields):
    """What a request to the model gives in a session of its own."""
    spec = VLLMSpec(kind="vllm", model="m", **fields)

    async def work(kit):
        chat = kit._chats["m"]
        book = chat._book
        chat._inner = InTurns(spec, up, book, run, "phase:m")
        return (await kit.ask("m", say())).text

    return within(folder, spec, work)


def test_a_request_waits_for_its_model(tmp_path):
    with pytest.raises(Pending) as raised:
        asked(tmp_path, None)
    assert raised.value.reason == "phase:m"
    assert attempts(tmp_path) == []
    assert asked(tmp_path, Answers("yes")) == "yes"


def test_what_failed_is_not_asked_again_in_the_same_run(tmp_path):
    up = Answers(Unanswered("bad_request", "too long"), "yes")
    for model in (up, None, up):
        with pytest.raises(Unanswered) as raised:
            asked(tmp_path, model)
        assert (raised.value.reason, raised.value.detail) == ("bad_request", "too long")
    assert up.asked == 1
    with pytest.raises(Pending):
        asked(tmp_path, None, run="run-2")
    assert asked(tmp_path, up, run="run-2") == "yes"


def test_a_server_that_is_started_again_is_waited_for(tmp_path):
    up = Answers(*[Unanswered("connection", "refused")] * 3, "yes")
    assert asked(tmp_path, up) == "yes"
    gone = Answers(*[Unanswered("connection", "refused")] * 1000)
    begun = time.monotonic()
    with pytest.raises(Unanswered, match="refused"):
        asked(tmp_path, gone, start_timeout_s=0.3)
    assert 0.2 < time.monotonic() - begun < 5
