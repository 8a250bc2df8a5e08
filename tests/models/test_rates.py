"""How many requests and tokens go to an endpoint in a minute, over all processes."""

import asyncio
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from endpoint import Endpoint
from models_kit import answers, openai, say

from datakit.models.ledger import Ledger
from datakit.models.limits import RateLimits
from datakit.models.sampling import Sampling
from datakit.models.specs import Limits


def taken(folder, limits, for_s, tokens=(0, 0)):
    """How many permits are had in so many seconds by twenty askers."""

    async def work():
        with Ledger.opened(folder) as ledger:
            rates, count = RateLimits(limits, "m", ledger), 0

            async def asker():
                nonlocal count
                while True:
                    await rates.permit(*tokens)
                    count += 1

            running = [asyncio.create_task(asker()) for _ in range(20)]
            await asyncio.sleep(for_s)
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            return count

    return asyncio.run(work())


@pytest.mark.parametrize(
    ("limits", "tokens", "a_second"),
    [
        (Limits(requests=1_200), (0, 0), 20),
        (Limits(tokens=60_000), (30, 20), 20),
        (Limits(input_tokens=60_000), (50, 9_999), 20),
        (Limits(output_tokens=60_000), (9_999, 50), 20),
        (Limits(requests=1_200, tokens=600), (1, 0), 10),
        # One request is larger than what a second gives.
        (Limits(tokens=600), (15, 15), 1 / 3),
    ],
    ids=["requests", "tokens", "input", "output", "the lower of both", "large requests"],
)
def test_a_limit_holds_at_a_steady_pace_with_a_second_to_begin_with(
    tmp_path, limits, tokens, a_second
):
    for_s = 0.7
    found = taken(tmp_path, limits, for_s, tokens)
    most = a_second * (for_s + 1) + 1
    assert 0.5 * (most - 2) <= found <= most


@pytest.mark.parametrize(("beyond", "expected_s"), [(0, 0.5), (50, 0.95), (-50, 0.0)])
def test_what_was_used_beyond_the_estimate_is_paid_for_by_those_who_follow(
    tmp_path, beyond, expected_s
):
    async def work():
        with Ledger.opened(tmp_path) as ledger:
            rates = RateLimits(Limits(tokens=48_000), "m", ledger)
            began = time.monotonic()
            for _ in range(12):
                await rates.permit(60, 40)
                rates.settle(beyond, 0)
            return time.monotonic() - began

    assert asyncio.run(work()) == pytest.approx(expected_s, abs=0.25)


def taken_at_once(folder, limits, for_s, barrier, found):
    barrier.wait(60)
    found.put(taken(folder, limits, for_s))


@pytest.mark.slow
def test_two_processes_together_stay_below_one_limit(tmp_path):
    Ledger(tmp_path).close()
    context = multiprocessing.get_context("spawn")
    barrier, found = context.Barrier(2), context.Queue()
    more = (tmp_path, Limits(requests=1_200), 1.0, barrier, found)
    workers = [context.Process(target=taken_at_once, args=more, daemon=True) for _ in range(2)]
    for worker in workers:
        worker.start()
    counts = [found.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert 20 <= sum(counts) <= 20 * 2.0 + 4


RECIPE = """
name: limited-{number}
models:
  m:
    {{kind: openai, model: any, base_url: "{url}", sampling: {{seed: {number}}},
    limits: {{requests: 300}}}}
steps:
  - {{step: toys.numbers, rows: 15}}
  - {{step: toys.answer}}
"""


@pytest.mark.slow
def test_two_runs_that_share_a_state_together_stay_below_one_limit(tmp_path):
    with Endpoint(rpm=300, quiet_limits=True) as endpoint:
        runs = []
        for number in range(2):
            recipe = tmp_path / f"{number}.yaml"
            recipe.write_text(RECIPE.format(number=number, url=endpoint.url))
            where = ["--outputs", str(tmp_path / "outputs"), "--state", str(tmp_path / "state")]
            command = [sys.executable, "-m", "datakit", "run", str(recipe), *where]
            environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
            runs.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE))
        assert [(run.communicate(), run.returncode)[1] for run in runs] == [0, 0]
        stats = endpoint.stats()
    assert stats["ok"] == stats["requests"] == 30
    # Five at once, then five a second.
    assert stats["last_request_at"] - stats["first_request_at"] >= (30 - 5 - 2) / 5


def test_a_limit_of_the_recipe_holds_at_the_endpoint(tmp_path):
    asks = [say(f"question {number}") for number in range(12)]
    began = time.monotonic()
    with Endpoint(rpm=300, quiet_limits=True) as endpoint:
        found = answers(tmp_path, openai(endpoint.url, limits=Limits(requests=300)), asks)
        assert endpoint.stats()["errors"] == {}
    assert not [one for one in found if isinstance(one, Exception)]
    # Five at once, then five a second.
    assert 1.1 <= time.monotonic() - began < 6


def test_a_limit_is_learnt_from_the_headers_of_the_first_reply(tmp_path):
    asks = [say(f"question {number}") for number in range(12)]
    began = time.monotonic()
    with Endpoint(rpm=300) as endpoint:
        answers(tmp_path, openai(endpoint.url), asks)
        assert endpoint.stats()["errors"] == {}
    assert 0.9 <= time.monotonic() - began < 6


def test_a_token_limit_is_learnt_from_the_headers(tmp_path):
    asks = [say(f"{'word ' * 40}{number}") for number in range(30)]
    began = time.monotonic()
    with Endpoint(tpm=30_000, reply=lambda body: "two words") as endpoint:
        answers(tmp_path, openai(endpoint.url, sampling=Sampling(max_tokens=4)), asks)
        assert endpoint.stats()["errors"] == {}
    # 43 tokens each, 500 a second.
    assert 1.2 <= time.monotonic() - began < 6


@pytest.mark.slow
def test_an_endpoint_that_only_refuses_is_left_alone_as_long_as_it_says(tmp_path):
    asks = [say(f"question {number}") for number in range(250)]
    began = time.monotonic()
    with Endpoint(rpm=240, quiet_limits=True) as endpoint:
        # A minute's worth is there at once, then four a second.
        found = answers(tmp_path, openai(endpoint.url, retries=12), asks)
        refused = endpoint.stats()["errors"]["rpm"]
    assert not [one for one in found if isinstance(one, Exception)]
    assert refused <= 100
    assert time.monotonic() - began < 15
