"""Plans: nothing is sent, what is counted is exact, and estimates come true in their range."""

import json

import pytest
from asking import Bill, datakit, finished, recipe_of, write
from endpoint import Endpoint

from datakit.estimate import summed
from datakit.plan import plan_of
from datakit.recipe import load_recipe
from datakit.text import dollars

ROWS = 60


@pytest.fixture(scope="module")
def bill():
    return Bill()


@pytest.fixture(scope="module")
def endpoint(bill):
    with Endpoint(reply=bill) as running:
        yield running


@pytest.fixture
def planned(tmp_path, endpoint, bill):
    """The plan of a recipe in a folder of its own; counts start anew."""
    endpoint.reset()
    bill.usd = 0.0

    def plan(recipe=None, **more):
        loaded = load_recipe(recipe or recipe_of(endpoint.url, ROWS))
        return plan_of(loaded, tmp_path / "outputs", tmp_path / "state", **more)

    return plan


def by_role(plan):
    return {cost.role: cost for cost in plan.costs}


def assert_ordered(plan):
    ranges = [plan.usd] if plan.usd else []
    for cost in plan.costs:
        ranges += [cost.calls, cost.input_tokens, cost.output_tokens]
        ranges += [cost.usd] if cost.usd else []
    for least, expected, most in ranges:
        assert 0 <= least <= expected <= most


def run(tmp_path, endpoint, *more):
    path = write(tmp_path, recipe_of(endpoint.url, ROWS))
    return datakit(tmp_path, "run", path, "--json", *more)


def test_the_first_step_is_exact_and_the_rest_within_the_range(planned, endpoint, bill, tmp_path):
    plan = planned()
    assert endpoint.stats()["requests"] == 0
    assert_ordered(plan)
    costs = by_role(plan)
    assert costs["writer"].calls == costs["drafter"].calls == (ROWS, ROWS, ROWS)
    least, expected, most = costs["judge"].calls
    assert (least, expected, most) == (96, 2 * ROWS, 150)
    assert run(tmp_path, endpoint).returncode == 0
    assert endpoint.stats()["requests"] == 4 * ROWS
    after = planned()
    assert after.usd == (0, 0, 0)
    assert not any(cost.calls[2] for cost in after.costs)


def test_after_a_sample_the_dollars_come_true(planned, endpoint, bill, tmp_path):
    plan = planned(sample=20)
    assert endpoint.stats()["requests"] == 4 * 20
    assert all(cost.is_measured for cost in plan.costs)
    assert_ordered(plan)
    assert plan.usd[2] < 2 * plan.usd[0]
    paid = bill.usd
    assert run(tmp_path, endpoint).returncode == 0
    # What the sample sent is not sent again.
    assert endpoint.stats()["requests"] == 4 * ROWS
    rest = bill.usd - paid
    print(f"expected {dollars(plan.usd[1])}, came to {dollars(rest)}")
    assert plan.usd[0] <= rest <= plan.usd[2]
    assert plan.usd[1] == pytest.approx(rest, rel=0.1)


def test_of_a_run_that_was_cut_short_only_the_rest_is_planned(planned, endpoint, bill, tmp_path):
    full = planned()
    assert run(tmp_path, endpoint, "--max-usd", 10).returncode == 3
    sent = endpoint.stats()["requests"]
    assert 0 < sent < 4 * ROWS
    left = planned()
    assert endpoint.stats()["requests"] == sent
    assert_ordered(left)
    assert summed([cost.calls for cost in left.costs])[1] == 4 * ROWS - sent
    assert left.usd[1] < full.usd[1]
    paid = bill.usd
    assert run(tmp_path, endpoint).returncode == 0
    assert left.usd[0] <= bill.usd - paid <= left.usd[2]


def test_answers_that_do_not_fit_are_within_the_range(planned, tmp_path):
    with Endpoint(pinvalid=0.1) as endpoint:
        recipe = recipe_of(endpoint.url, ROWS)
        plan = planned(recipe)
        path = write(tmp_path, recipe)
        assert datakit(tmp_path, "run", path, "--set", "gate.rows.min=1").returncode == 0
        calls = summed([cost.calls for cost in plan.costs])
        assert calls[0] <= endpoint.stats()["requests"] <= calls[2]
        assert endpoint.stats()["requests"] > 4 * ROWS


def test_a_sample_keeps_to_its_cap(planned, endpoint, bill):
    plan = planned(sample=20, max_usd=1.0)
    assert bill.usd <= 1.02
    assert 0 < endpoint.stats()["requests"] < 80
    assert any("the sample stopped: the budget of $1.00" in note for note in plan.notes)


def test_a_table_step_between_holds_up_what_follows(planned, endpoint, tmp_path):
    recipe = recipe_of(endpoint.url, ROWS)
    recipe["models"]["embedder"] = {"kind": "hashing"}
    recipe["steps"].insert(2, {"step": "curation.near", "threshold": 0.95, "as": "thin"})
    path = write(tmp_path, recipe)
    assert datakit(tmp_path, "run", path, "--max-usd", 2).returncode == 3
    sent = endpoint.stats()["requests"]
    plan = planned(recipe)
    costs = by_role(plan)
    assert costs["writer"].calls[1] + costs["drafter"].calls[1] == 2 * ROWS - sent
    # Those that are answered come too, once all are.
    assert costs["judge"].calls[1] == pytest.approx(2 * ROWS, rel=0.2)


def test_it_is_readable_in_80_columns_and_never_cuts_a_number(tmp_path):
    recipe = recipe_of("https://api.openai.com/v1", 1_200)
    recipe["rows_per_part"] = 400
    writer, drafter, judge = (recipe["models"][role] for role in ("writer", "drafter", "judge"))
    writer |= {"model": "someone/a-name-that-goes-on-and-on-Instruct-Turbo-2026-11-preview-fp8"}
    del writer["price"]
    for spec in (drafter, judge):
        del spec["price"]
        spec["model"] = "gpt-4.1-mini"
    judge["mode"] = "batch"
    write(tmp_path, recipe)
    printed = finished(tmp_path, "plan", "asking.yaml")
    assert "…" not in printed
    lines = printed.splitlines()
    assert "respond asks writer (someone/a-name-that-goes-on" in printed
    figures = [line for line in lines if line.startswith("  ")]
    assert figures
    assert all(len(line) <= 80 for line in figures)
    assert any(line.split() == ["exactly", "1,200"] or "1,200" in line for line in figures)
    assert sum(line.endswith("unknown") for line in figures) == 3
    assert "in all, without what has no known price" in printed
    assert "no price is known for models.writer" in printed
    assert "the prices of models.drafter and models.judge are of 2025-10, " in printed
    assert "models.judge is asked through the batch API, at half the price" in printed
    assert datakit(tmp_path, "plan", "asking.yaml", columns=120).stdout == printed
    found = json.loads(datakit(tmp_path, "plan", "asking.yaml", "--json").stdout)
    assert found["is_priced"] is False
    assert found["costs"][0]["usd"] is None
    assert found["costs"][0]["calls"] == [1_200, 1_200, 1_200]


def test_local_models_take_turns(tmp_path):
    recipe = recipe_of("http://127.0.0.1:1/v1", 8)
    for role in ("writer", "drafter"):
        recipe["models"][role] = {"kind": "vllm", "model": f"some/{role}", "revision": "1"}
    write(tmp_path, recipe)
    printed = datakit(tmp_path, "plan", "asking.yaml", DATAKIT_GPUS="1").stdout
    assert "turn 1: vLLM serves writer\nturn 2: vLLM serves drafter" in printed
    assert "free" in printed
    none = datakit(tmp_path, "plan", "asking.yaml", DATAKIT_GPUS="0")
    assert none.returncode == 0
    assert "note: this machine cannot run it: models.writer needs" in none.stdout


def test_no_key_is_needed(planned, endpoint, monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    assert planned(recipe_of(endpoint.url, 5, api_key_env="NO_SUCH_KEY")).costs


def test_what_cannot_be_answered_is_said(planned):
    recipe = recipe_of("http://127.0.0.1:1/v1", 5)
    del recipe["models"]["judge"]["base_url"]
    assert any("models.judge has no base_url" in note for note in planned(recipe).notes)


@pytest.mark.parametrize(
    ("overrides", "code", "said"),
    [
        (["steps.numbers.rows=0"], 2, "the source has no rows"),
        (["steps.judge.jugde=writer"], 2, "did you mean 'judge'"),
        (["models.writer.price.input=-1"], 2, "models.writer.price.input"),
        (["--max-usd", "3"], 2, "give --sample too"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path, overrides, code, said):
    write(tmp_path, recipe_of("http://127.0.0.1:1/v1", 5))
    more = overrides if overrides[0].startswith("--") else ["--set", *overrides]
    done = datakit(tmp_path, "plan", "asking.yaml", *more)
    assert done.returncode == code
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_recipe_that_asks_nothing_costs_nothing(tmp_path):
    write(tmp_path, {"name": "x", "steps": [{"step": "toys.numbers"}]})
    assert "no step asks a model" in finished(tmp_path, "plan", "asking.yaml")


def test_a_source_that_another_recipe_made(tmp_path):
    assert "no version of dataset" in datakit(tmp_path, "plan", "smoke/from_version").stderr
    finished(tmp_path, "run", "smoke/pairs")
    assert "judge asks second_judge" in finished(tmp_path, "plan", "smoke/from_version")
    assert "nothing was sent" in finished(tmp_path, "rehearse", "smoke/from_version")


@pytest.mark.parametrize(
    ("usd", "shown"),
    [(0, "$0.00"), (0.0042, "$0.0042"), (0.999, "$1.00"), (0.5, "$0.50"), (1234.5, "$1,234.50")],
)
def test_dollars(usd, shown):
    assert dollars(usd) == shown
