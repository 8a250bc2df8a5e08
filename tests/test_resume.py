"""kill -9 at any moment: the same rows in the end, and only calls in flight are paid twice."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from endpoint import Endpoint

ROWS = 1_000
IN_FLIGHT = 64

RECIPE = """
name: resumed
gate: {{failures.share: {{max: {bound}}}}}
rows_per_part: 40
models:
  m: {{kind: openai, model: any, base_url: "{url}", max_in_flight: {in_flight}, {more}}}
steps:
  - {{step: toys.numbers, rows: {rows}}}
  - {{step: toys.answer}}
"""


def write_recipe(folder, url, rows=ROWS, more="retries: 6", bound=0.1):
    path = folder / "resumed.yaml"
    path.write_text(RECIPE.format(url=url, in_flight=IN_FLIGHT, rows=rows, more=more, bound=bound))
    return path


def command(recipe, folder):
    where = ["--outputs", str(folder / "outputs"), "--state", str(folder / "state")]
    return [sys.executable, "-m", "datakit", "run", str(recipe), *where, "--json"]


def environment():
    return os.environ | {"PYTHONPATH": str(Path(__file__).parent)}


def attempt(recipe, folder):
    """Run to whatever end it comes to."""
    return subprocess.run(
        command(recipe, folder), env=environment(), capture_output=True, text=True, check=False
    )


def finish(recipe, folder):
    """Run to a good end; the printed manifest."""
    done = attempt(recipe, folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def kill_after(recipe, folder, endpoint, answers):
    """Start a run and kill it when the endpoint has given so many answers."""
    process = subprocess.Popen(command(recipe, folder), env=environment(), stderr=subprocess.PIPE)
    while endpoint.stats()["ok"] < answers and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [7, 8])
def test_ten_kills_cost_only_what_was_in_flight(tmp_path, seed):
    with Endpoint(latency="lognormal:0.05:0.6") as endpoint:
        recipe = write_recipe(tmp_path, endpoint.url)
        whole = finish(recipe, tmp_path / "whole")
        assert whole["splits"]
        draw = random.Random(seed)
        for number in range(10):
            endpoint.reset()
            folder = tmp_path / f"killed-{number}"
            kill_after(recipe, folder, endpoint, draw.randrange(1, ROWS))
            again = finish(recipe, folder)
            stats = endpoint.stats()
            twice = stats["requests"] - stats["distinct"]
            print(f"kill {number}: {twice} requests sent twice, window {IN_FLIGHT}")
            assert stats["distinct"] == ROWS
            assert twice <= IN_FLIGHT
            assert again["digest"] == whole["digest"]


def test_transient_failures_never_become_data_and_a_rerun_asks_only_for_them(tmp_path):
    with Endpoint(p500=0.10, p429=0.05, pbad=0.03) as endpoint:
        recipe = write_recipe(tmp_path, endpoint.url, rows=400, more="retries: 0", bound=0.5)
        first = finish(recipe, tmp_path)
        answer = first["funnel"][1]
        lost = answer["unanswered"]
        assert 20 < lost < 140
        assert answer["kept"] + lost == answer["rows_in"] == 400
        assert set(answer["reasons"]) == {"server_error", "rate_limited", "malformed_body"}
        assert sum(answer["reasons"].values()) == lost
        endpoint.set(p500=0, p429=0, pbad=0)
        endpoint.reset()
        second = finish(recipe, tmp_path)
        assert endpoint.stats()["requests"] == lost
        assert second["funnel"][1]["kept"] == 400
        assert second["version"] == "1.1.0"
        assert second["change"] == f"rows: {lost} added"
        third = finish(recipe, tmp_path)
        assert endpoint.stats()["requests"] == lost
        assert (third["new"], third["version"]) == (False, "1.1.0")
    with Endpoint() as endpoint:
        recipe = write_recipe(tmp_path, endpoint.url, rows=400)
        assert finish(recipe, tmp_path / "fresh")["digest"] == second["digest"]


def test_an_outage_publishes_nothing_and_is_resumed(tmp_path):
    with Endpoint(p500=0.6) as endpoint:
        recipe = write_recipe(tmp_path, endpoint.url, rows=100, more="retries: 0")
        done = attempt(recipe, tmp_path)
        assert done.returncode == 4
        assert "rows went unanswered" in done.stderr
        assert not (tmp_path / "outputs" / "datasets" / "resumed" / "versions").exists()
        asked = endpoint.stats()["ok"]
        endpoint.set(p500=0)
        endpoint.reset()
        assert finish(recipe, tmp_path)["funnel"][1]["kept"] == 100
        assert endpoint.stats()["requests"] == 100 - asked


def test_a_bad_request_is_no_verdict_on_the_row_and_is_asked_again_when_mended(tmp_path):
    with Endpoint(models=["any"]) as endpoint:
        broken = "retries: 0, extra_body: {max_tokens: -1}"
        recipe = write_recipe(tmp_path, endpoint.url, rows=10, more=broken)
        done = attempt(recipe, tmp_path)
        assert done.returncode == 4
        assert "10 rows went unanswered" in done.stderr


def test_retries_heal_the_same_faults(tmp_path):
    with Endpoint(p500=0.10, p429=0.05, pbad=0.03, retry_after=0) as endpoint:
        recipe = write_recipe(tmp_path, endpoint.url, rows=100, more="retries: 8")
        done = finish(recipe, tmp_path)
        assert done["funnel"][1]["kept"] == 100
        assert endpoint.stats()["answered_twice"] == 0


def test_another_address_or_key_asks_nothing_again(tmp_path):
    with Endpoint() as endpoint:
        finish(write_recipe(tmp_path, endpoint.url, rows=50), tmp_path)
    with Endpoint() as moved:
        recipe = write_recipe(tmp_path, moved.url, rows=50, more="timeout_s: 5")
        assert finish(recipe, tmp_path)["new"] is False
        assert moved.stats()["requests"] == 0


def test_two_runs_of_one_recipe_at_a_time_end_with_one_version(tmp_path):
    with Endpoint(latency="fixed:0.02") as endpoint:
        recipe = write_recipe(tmp_path, endpoint.url, rows=300)
        runs = [
            subprocess.Popen(
                command(recipe, tmp_path),
                env=environment(),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for _ in range(2)
        ]
        outs = [run.communicate() for run in runs]
        assert [run.returncode for run in runs] == [0, 0], outs
        manifests = [json.loads(out) for out, _ in outs]
        assert manifests[0]["digest"] == manifests[1]["digest"]
        assert {one["version"] for one in manifests} == {"1.0.0"}
        versions = tmp_path / "outputs" / "datasets" / "resumed" / "versions"
        assert [one.name for one in versions.iterdir()] == ["1.0.0"]


def test_two_recipes_at_a_time_share_outputs(tmp_path):
    with Endpoint(latency="fixed:0.01") as endpoint:
        recipes = []
        for number, rows in enumerate((120, 150)):
            recipe = write_recipe(tmp_path, endpoint.url, rows=rows)
            text = recipe.read_text().replace("name: resumed", f"name: other-{number}")
            recipes.append(tmp_path / f"other-{number}.yaml")
            recipes[-1].write_text(text)
        runs = [
            subprocess.Popen(
                command(recipe, tmp_path), env=environment(), stdout=subprocess.PIPE, text=True
            )
            for recipe in recipes
        ]
        rows = [json.loads(run.communicate()[0])["funnel"][-1]["kept"] for run in runs]
        assert rows == [120, 150]


STORM = {"p500": 0.05, "p429": 0.05, "pbad": 0.02, "phang": 0.01, "pcut": 0.01}


@pytest.mark.slow
def test_in_a_storm_of_faults_no_row_is_lost_or_doubled(tmp_path):
    more = "timeout_s: 2, retries: 8"
    with Endpoint(latency="lognormal:0.05:0.6") as endpoint:
        calm = finish(write_recipe(tmp_path, endpoint.url, more=more), tmp_path / "calm")
    with Endpoint(latency="lognormal:0.05:0.6", **STORM) as endpoint:
        stormy = finish(write_recipe(tmp_path, endpoint.url, more=more), tmp_path / "stormy")
        stats = endpoint.stats()
    assert stormy["digest"] == calm["digest"]
    assert stormy["funnel"][1]["kept"] == stats["ok"] == stats["distinct"] == ROWS
    assert {"p500", "p429", "pbad", "phang", "pcut"} - set(stats["errors"]) <= {"phang"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_a_clean_stop(tmp_path, number):
    with Endpoint(latency="fixed:0.2") as endpoint:
        recipe = write_recipe(tmp_path, endpoint.url)
        process = subprocess.Popen(
            command(recipe, tmp_path),
            env=environment(),
            stderr=subprocess.PIPE,
            text=True,
            # Where the tests run in the background, SIGINT is ignored, and that is inherited.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        while endpoint.stats()["ok"] < 5:
            time.sleep(0.01)
        process.send_signal(number)
        said = process.communicate()[1]
        assert process.returncode == 3
        assert "stopped by SIG" in said.splitlines()[-1]
        assert "Traceback" not in said


def test_a_wrong_key_stops_before_the_second_call(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "sk-wrong")
    with Endpoint(key="sk-right") as endpoint:
        recipe = write_recipe(tmp_path, endpoint.url, more="api_key_env: SOME_KEY")
        done = attempt(recipe, tmp_path)
        assert done.returncode == 4
        assert "'SOME_KEY'" in done.stderr
        assert "sk-wrong" not in done.stderr
        assert endpoint.stats()["requests"] == 1
