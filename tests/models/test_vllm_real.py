"""vLLM itself: what it answers, and that a crash of it is survived.

Runs where DATAKIT_TEST_VLLM names a Python whose environment holds vLLM.
"""

import asyncio
import json
import os
import signal

import pytest
from local_models import alive, post, processes_below, real, tiny_spec, wait_for

from datakit.errors import InputError
from datakit.models.vllm import VLLMServer, serving


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    """The address of a tiny model that vLLM serves as `tiny`."""
    folder = tmp_path_factory.mktemp("live")
    server = VLLMServer(tiny_spec(folder / "model"), "tiny", (), folder / "tiny.log")
    with asyncio.Runner() as runner:
        runner.run(server.start())
        yield server.url
        runner.run(server.stop())


def complete(url, prompt, **fields):
    status, body = post(url, "/completions", {"model": "tiny", "prompt": prompt} | fields)
    assert status == 200, body
    return body["choices"]


def chat(url, **fields):
    messages = [{"role": "user", "content": "Say hi."}]
    asked = {"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": 5}
    status, body = post(url, "/chat/completions", asked | fields)
    assert status == 200, body
    return body


@real
def test_vllm_answers_chats_and_texts(live):
    body = chat(live)
    assert body["usage"]["completion_tokens"] == 5
    assert body["choices"][0]["finish_reason"] == "length"
    assert (
        body["choices"][0]["message"]["content"] == chat(live)["choices"][0]["message"]["content"]
    )
    [choice] = complete(live, "The quick", max_tokens=3, temperature=0)
    assert choice["finish_reason"] == "length"
    assert choice["text"]
    drawn = chat(live, n=3, temperature=1, seed=5)["choices"]
    assert len({choice["message"]["content"] for choice in drawn}) == 3


@real
def test_vllm_gives_the_likelihood_of_what_it_says(live):
    tokens = chat(live, logprobs=True, top_logprobs=3)["choices"][0]["logprobs"]["content"]
    assert len(tokens) == 5
    for token in tokens:
        assert token["logprob"] < 0
        assert len(token["top_logprobs"]) == 3
        # At temperature 0 it says the likeliest.
        assert token["token"] == token["top_logprobs"][0]["token"]


@real
@pytest.mark.parametrize("max_tokens", [0, 1])
def test_vllm_scores_a_given_text(live, max_tokens):
    text = "The quick fox, \u00e9\u4f60 <|im_end|>"
    score = {"echo": True, "logprobs": 1, "max_tokens": max_tokens, "temperature": 0}
    [choice] = complete(live, text, **score)
    found = choice["logprobs"]
    length = len(found["tokens"]) - max_tokens
    assert choice["text"].startswith(text)
    assert (choice["text"] == text) or max_tokens
    assert found["token_logprobs"][0] is None
    assert all(value < 0 for value in found["token_logprobs"][1:])
    assert len(found["token_logprobs"]) == len(found["text_offset"]) == len(found["tokens"])
    # Offsets are in characters; a token that ends inside a character has an empty text.
    offsets = found["text_offset"][:length]
    assert offsets == sorted(offsets)
    assert "".join(found["tokens"][:length]) == text
    ends = [*offsets[1:], len(text)]
    assert [text[a:b] for a, b in zip(offsets, ends, strict=True)] == found["tokens"][:length]


@real
def test_vllm_scores_token_ids_as_it_scores_their_text(live):
    text = "The quick fox"
    root = live.removesuffix("/v1")
    status, body = post(root, "/tokenize", {"model": "tiny", "prompt": text})
    assert status == 200
    ids = body["tokens"]
    score = {"echo": True, "logprobs": 1, "max_tokens": 0}
    [of_text] = complete(live, text, **score)
    [of_ids, of_two] = complete(live, [ids, ids[:2]], **score)
    assert of_ids["logprobs"]["tokens"] == of_text["logprobs"]["tokens"]
    expected = of_text["logprobs"]["token_logprobs"][1:]
    # Batched sums in bfloat16 may differ in their last bits.
    assert of_ids["logprobs"]["token_logprobs"][1:] == pytest.approx(expected, abs=0.05)
    assert of_two["logprobs"]["token_logprobs"][1:] == pytest.approx(expected[:1], abs=0.05)


@real
def test_vllm_answers_in_the_schema_asked_for(live):
    properties = {"verdict": {"enum": ["A", "B"]}, "sure": {"type": "boolean"}}
    schema = {"type": "object", "properties": properties, "required": ["verdict", "sure"]}
    schema["additionalProperties"] = False
    wanted = {"name": "answer", "schema": schema, "strict": True}
    asked = {"type": "json_schema", "json_schema": wanted}
    # A random model likes white space, hence the room.
    body = chat(live, response_format=asked, max_tokens=500, temperature=1, n=4, seed=1)
    said = [c["message"]["content"] for c in body["choices"] if c["finish_reason"] == "stop"]
    assert said
    for text in said:
        verdict = json.loads(text)
        assert verdict["verdict"] in ("A", "B")
        assert verdict["sure"] in (True, False)


@real
def test_vllm_refuses_what_is_wrong(live):
    long = {"model": "tiny", "prompt": "a b " * 2000, "max_tokens": 1}
    status, body = post(live, "/completions", long)
    assert status == 400
    assert "maximum context length" in body["error"]["message"]
    assert post(live, "/completions", {"model": "other", "prompt": "x"})[0] == 404


@real
def test_vllm_does_not_take_an_argument_that_it_does_not_know(tmp_path):
    spec = tiny_spec(tmp_path / "model")
    wrong = spec.model_copy(update={"args": {"max_modle_len": 1024}})
    with pytest.raises(InputError, match=r"does not take the args .*--max-modle-len=1024"):
        asyncio.run(VLLMServer(wrong, "tiny", (), tmp_path / "m.log").start())
    long = spec.model_copy(update={"args": {"max_model_len": 100_000}})
    with pytest.raises(InputError, match=r"User-specified max_model_len \(100000\)"):
        asyncio.run(VLLMServer(long, "tiny", (), tmp_path / "m.log").start())


@real
def test_two_vllm_models_run_together_and_one_comes_back_after_a_crash(tmp_path):
    specs = {
        "writer": tiny_spec(tmp_path / "a", seed=1),
        "judge": tiny_spec(tmp_path / "b", seed=2),
    }

    async def said(server, model):
        asked = {"model": model, "prompt": "The quick", "max_tokens": 8, "temperature": 0}
        status, body = await asyncio.to_thread(post, server.url, "/completions", asked)
        assert status == 200
        return body["choices"][0]["text"]

    async def run():
        async with serving(specs, [], tmp_path) as servers:
            [writer], [judge] = servers.values()
            before = await said(writer, specs["writer"].model)
            assert before != await said(judge, specs["judge"].model)
            ours = processes_below(os.getpid())
            guard = min(pid for pid, name in ours.items() if "_guard()" in name)
            names = processes_below(guard)
            [engine] = [pid for pid, name in names.items() if name.startswith("VLLM::EngineCore")]
            os.kill(engine, signal.SIGKILL)
            await asyncio.to_thread(wait_for, lambda: not alive(guard), 60)
            await asyncio.sleep(0.5)
            for server in (writer, judge):
                await server.until_up()
            assert await said(writer, specs["writer"].model) == before
            assert await said(judge, specs["judge"].model) != before
            return [*ours, *processes_below(os.getpid())]

    pids = asyncio.run(run())
    assert not [pid for pid in pids if pid != os.getpid() and alive(pid)]
