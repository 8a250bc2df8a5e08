"""Endpoints as a whole: the first request goes alone, and the key appears nowhere."""

import asyncio
import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
from aiohttp import web
from endpoint import Endpoint
from models_kit import answer, answers, attempts, openai, outcomes, say, server, within

import datakit as dk
from datakit.errors import EndpointError, Unanswered
from datakit.models.chat import Reply, request_of

SECRET = "sk-planted-7f3a9c51e0b24d68"


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr("datakit.models.openai._FIRST_WAIT_S", 0.001)


def many(count=256):
    return [say(f"question {number}") for number in range(count)]


# The first request goes alone


@pytest.mark.parametrize("refusal", [{"key": "sk-right"}, {"models": ("known",)}])
def test_a_refusal_costs_one_call_though_256_wait(tmp_path, refusal):
    with Endpoint(**refusal, latency="fixed:0.05") as endpoint:
        found = answers(tmp_path, openai(endpoint.url, retries=6), many())
        assert endpoint.stats()["requests"] == 1
    assert {type(one) for one in found} == {EndpointError}
    assert len(attempts(tmp_path)) == 1


def test_who_asks_after_a_refusal_is_refused_without_a_call(tmp_path):
    async def work(kit):
        found = []
        for one in many(3):
            found += await asyncio.gather(kit.ask("m", one), return_exceptions=True)
        return found

    with Endpoint(key="sk-right") as endpoint:
        found = within(tmp_path, openai(endpoint.url), work)
        assert endpoint.stats()["requests"] == 1
    assert {type(one) for one in found} == {EndpointError}


def test_a_first_request_that_hangs_does_not_hold_the_others_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr("datakit.models.openai._REFUSED_WITHIN_S", 0.1)
    ended = []

    async def handler(request):
        body = await request.json()
        said = body["messages"][0]["content"]
        await asyncio.sleep(1.0 if said == "question 0" else 0)
        ended.append(said)
        return web.json_response({"choices": [{"message": {"content": said}}]})

    with server(handler) as url:
        found = answers(tmp_path, openai(url), many(20))
    assert {type(one) for one in found} == {Reply}
    assert ended[-1] == "question 0"


@pytest.mark.parametrize("status", [500, 429, 503, 400])
def test_a_first_request_that_fails_for_itself_or_for_a_time_opens_the_way(tmp_path, status):
    """Nothing but a refusal of all requests keeps the others back."""
    seen = []

    async def handler(request):
        body = await request.json()
        said = body["messages"][0]["content"]
        seen.append(said)
        if said == "question 0":
            return web.Response(status=status, headers={"Retry-After": "0.4"})
        return web.json_response({"choices": [{"message": {"content": said}}]})

    with server(handler) as url:
        spec = openai([url], retries=1, max_in_flight=8)
        first, *others = answers(tmp_path, spec, many(20))
    assert isinstance(first, Unanswered)
    assert {type(one) for one in others} == {Reply}
    assert seen[0] == "question 0"
    assert seen.count("question 0") == (1 if status == 400 else 2)


def test_a_first_asker_who_is_cancelled_opens_the_way(tmp_path):
    async def work(kit):
        tasks = [asyncio.create_task(kit.ask("m", one)) for one in many(5)]
        await asyncio.sleep(0.05)
        tasks[0].cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    with Endpoint(latency="fixed:0.2") as endpoint:
        first, *others = within(tmp_path, openai(endpoint.url), work)
    assert isinstance(first, asyncio.CancelledError)
    assert {type(one) for one in others} == {Reply}


# The key


RECIPE = """
name: secretive
gate: {{failures.share: {{max: 1}}, rows: {{min: 0}}}}
models:
  m:
    {{kind: openai, model: any, base_url: "{url}", api_key_env: PLANTED_KEY, retries: 1}}
steps:
  - {{step: toys.numbers, rows: 12}}
  - {{step: toys.answer}}
"""


def echoing(status):
    """A server that repeats the header with the key in every error, and now and then answers."""

    async def handler(request):
        said = (await request.json())["messages"][0]["content"]
        assert request.headers["Authorization"] == f"Bearer {SECRET}"
        if int(said.split()[-1]) % 3 == 0:
            return web.json_response({"choices": [{"message": {"content": said}}]})
        echo = f"cannot serve {dict(request.headers)}"
        if status == 500:
            return web.Response(status=status, text=echo)
        return web.json_response({"error": {"message": echo, "code": SECRET}}, status=status)

    return handler


def cli(*words):
    return subprocess.run(
        [sys.executable, "-m", "datakit", *map(str, words)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "PLANTED_KEY": SECRET},
        capture_output=True,
        text=True,
        check=False,
    )


def told(folder):
    """All that lies in a folder: the bytes of each file, and the rows of the tables."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path, path.read_bytes().decode(errors="replace")
            if path.suffix == ".parquet":
                yield path, str(pl.read_parquet(path).to_dicts())


@pytest.mark.parametrize("status", [pytest.param(400, marks=pytest.mark.slow), 500, 403])
def test_the_key_is_written_and_printed_nowhere(tmp_path, status):
    where = ["--state", tmp_path / "state"]
    with server(echoing(status)) as url:
        (tmp_path / "recipe.yaml").write_text(RECIPE.format(url=url))
        more = ["--outputs", tmp_path / "outputs"]
        done = cli("--debug", "run", tmp_path / "recipe.yaml", *where, *more)
    assert "Traceback" not in done.stdout
    exported = cli("ledger", "export", tmp_path / "export.jsonl", *where)
    assert exported.returncode == 0, exported.stderr
    outputs = [one.stdout + one.stderr for one in (done, exported)]
    files = list(told(tmp_path))
    assert not [path for path, text in files if SECRET in text or SECRET[:14] in text]
    assert not [text for text in outputs if SECRET[:14] in text]
    # It was really put to the test: refusals were met, and what they said is kept or shown.
    assert {"ok"} < set(outcomes(tmp_path))
    assert done.returncode == (4 if status == 403 else 0), done.stderr
    said = [done.stderr] if status == 403 else [text for _, text in files]
    assert any("cannot serve" in text and "***" in text for text in said)


def test_the_key_is_in_no_log_and_no_error(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("PLANTED_KEY", SECRET)
    caplog.set_level(logging.DEBUG)
    with server(echoing(403)) as url, pytest.raises(EndpointError) as caught:
        answer(tmp_path, openai(url, api_key_env="PLANTED_KEY"), say("question 1"))
    assert "'PLANTED_KEY'" not in caplog.text
    assert SECRET not in caplog.text
    error = caught.value
    while error is not None:
        assert SECRET not in f"{error!r} {error}"
        error = error.__cause__ or error.__context__


def test_a_refused_key_names_its_variable_and_says_where_there_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-wrong")
    with Endpoint(key="sk-right") as endpoint:
        with pytest.raises(EndpointError, match="api_key_env is not set"):
            answer(tmp_path, openai(endpoint.url), say())
        with pytest.raises(EndpointError, match="'MY_KEY'"):
            answer(tmp_path, openai(endpoint.url, api_key_env="MY_KEY"), say())


def test_an_unknown_model_is_named_with_the_address(tmp_path):
    with Endpoint(models=("known",)) as endpoint:
        with pytest.raises(EndpointError) as caught:
            answer(tmp_path, openai(endpoint.url, model="unknown"), say())
        assert endpoint.stats()["requests"] == 1
    assert endpoint.url in str(caught.value)
    assert "'unknown'" in str(caught.value)


def test_two_roles_of_one_model_ask_once_and_share_its_window(tmp_path):
    with Endpoint(latency="fixed:0.05") as endpoint:
        model = {"kind": "openai", "model": "any", "base_url": endpoint.url, "max_in_flight": 4}
        recipe = {
            "name": "twice",
            "models": {"a": model, "b": model},
            "steps": [
                {"step": "toys.numbers", "rows": 20},
                {"step": "annotation.respond", "models": ["a", "b"]},
            ],
        }
        dk.run(recipe, outputs=tmp_path / "outputs", state=tmp_path / "state")
        stats = endpoint.stats()
    assert stats["requests"] == stats["distinct"] == 20
    assert stats["max_in_flight"] <= 4


@pytest.mark.parametrize("field", ["model", "messages", "n", "stream"])
def test_what_a_request_has_of_its_own_cannot_be_set_beside_it(field):
    with pytest.raises(ValueError, match=field):
        openai("http://127.0.0.1:1/v1", extra_body={field: 2})


def test_samples_under_one_seed_are_samples():
    spec = openai("http://127.0.0.1:1/v1", sampling={"seed": 7})
    asks = [replace(say(), draw=draw) for draw in range(3)]
    assert [request_of(spec, "m", ask).body["seed"] for ask in asks] == [7, 8, 9]


def test_an_address_that_only_fails_takes_no_row_from_a_healthy_one(tmp_path, monkeypatch):
    monkeypatch.setattr("datakit.models.openai._FIRST_WAIT_S", 0.05)
    with Endpoint(p500=1) as bad, Endpoint(latency="fixed:0.02") as good:
        spec = openai((bad.url, good.url), max_in_flight=16, retries=6)
        found = answers(tmp_path, spec, [say(str(number)) for number in range(200)])
    assert not [one for one in found if isinstance(one, Exception)]
