"""The command line: what it prints, and the code that it exits with."""

import json
import subprocess
import sys

import pytest
import yaml
from asking import datakit as asked
from asking import recipe_of, write
from endpoint import Endpoint


@pytest.fixture
def datakit(tmp_path):
    """Run `datakit ...` in an empty folder."""

    def call(*arguments):
        return asked(tmp_path, *arguments)

    return call


def test_run_prints_the_funnel_and_the_folder_and_then_nothing_new(datakit, tmp_path):
    first = datakit("run", "smoke/pairs")
    assert first.returncode == 0, first.stderr
    assert "exact" in first.stdout
    assert "smoke-pairs@1.0.0 (new;" in first.stdout
    assert "outputs/datasets/smoke-pairs/versions/1.0.0/" in first.stdout
    second = datakit("run", "smoke/pairs", "--json")
    found = json.loads(second.stdout)
    assert (found["new"], found["version"]) == (False, "1.0.0")
    assert "0 sent" in second.stderr


def test_rehearse_keeps_nothing(datakit, tmp_path):
    done = datakit("rehearse", "quickstart")
    assert done.returncode == 0, done.stderr
    assert "pair" in done.stdout
    assert "nothing was sent" in done.stdout
    assert not (tmp_path / "outputs").exists()


def test_check_shows_the_line(datakit):
    done = datakit("check", "quickstart")
    assert "near (Prompt) -> respond (Candidates) -> judge (Judged) -> pair (Pair)" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("check", "quikstart"), 2, "did you mean 'quickstart'"),
        (("run", "quickstart", "--set", "steps.near.treshold=1"), 2, "steps[2].treshold"),
        (("run", "smoke/pairs", "--set", "gate.rows.min=99"), 1, "below 99"),
        (("run", "hh_pairs"), 2, "no file"),
        (("run", "smoke/from_version"), 2, "no version of dataset 'smoke-pairs'"),
        (("run", "smoke/pairs", "--limit", "0"), 2, "--limit"),
        (("methods", "curation.neer"), 2, "did you mean 'curation.near'"),
        (("nonsense",), 2, "nonsense"),
        (("ledger", "import", "missing.jsonl"), 2, "missing.jsonl"),
        (("run", "best_of_many", "--set", "steps.answers.path=x.parquet"), 2, "x.parquet"),
    ],
)
def test_an_error_is_short_and_has_its_code(datakit, arguments, code, said):
    done = datakit(*arguments)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_the_disk_is_no_bug(datakit):
    done = datakit("ledger", "export", "/nonexistent/x.jsonl")
    assert done.returncode == 4
    assert "/nonexistent/x.jsonl" in done.stderr


def test_a_reader_who_leaves_does_not_stop_a_run(datakit, tmp_path):
    call = f"{sys.executable} -m datakit run smoke/pairs 2>&1 >out.txt | true"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", call], cwd=tmp_path, check=False)
    assert done.returncode == 0
    assert "smoke-pairs@1.0.0 (new" in (tmp_path / "out.txt").read_text()


def test_debug_shows_the_traceback(datakit):
    assert "Traceback" in datakit("--debug", "check", "quikstart").stderr


def test_a_terminal_is_safe_from_what_a_file_says(datakit, tmp_path):
    (tmp_path / "evil.yaml").write_text('name: "\\e[31mred"\nsteps: []\n')
    assert "\x1b" not in datakit("check", "evil.yaml").stderr


def test_a_model_that_could_change_unnoticed_is_noted(datakit):
    live = ["--set", "models.judge.base_url=http://127.0.0.1:1/v1"]
    assert (
        "note: models.judge has neither revision nor"
        in datakit("check", "quickstart", *live).stderr
    )
    pinned = datakit("check", "quickstart", *live, "--set", "models.judge.revision=a1")
    assert not pinned.stderr


def test_methods_list_every_step_and_show_one(datakit):
    done = datakit("methods")
    assert "curation.near" in done.stdout
    assert "annotation.judge" in done.stdout
    one = datakit("methods", "curation.near").stdout
    assert "Drops:" in one
    assert "threshold" in one
    assert json.loads(datakit("methods", "--json").stdout)["curation.near"]["fields"]


def test_new_writes_a_recipe_that_checks(datakit, tmp_path):
    done = datakit("new", "mine.yaml", "--from", "smoke/pairs")
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load((tmp_path / "mine.yaml").read_text())["name"] == "mine"
    assert datakit("check", "mine.yaml").returncode == 0


def test_the_ledger_is_exported_and_read_back(datakit, tmp_path):
    datakit("run", "smoke/pairs")
    assert "24 answers written" in datakit("ledger", "export", "answers.jsonl").stdout
    done = datakit("ledger", "import", "answers.jsonl", "--state", "other")
    assert "24 answers read, 24 of them new" in done.stdout
    stats = json.loads(datakit("ledger", "stats", "--state", "other", "--json").stdout)
    assert stats["models"][0]["answers"] == 24


def test_a_run_is_replayed_offline_from_an_export(datakit, tmp_path):
    first = json.loads(datakit("run", "smoke/pairs", "--json").stdout)
    datakit("ledger", "export", "answers.jsonl")
    datakit("ledger", "import", "answers.jsonl", "--state", "other")
    where = ("--outputs", "elsewhere", "--state", "other")
    again = datakit("run", "smoke/pairs", "--offline", "--json", *where)
    assert json.loads(again.stdout)["digest"] == first["digest"]
    # A scripted model runs here, so that it answers offline too.
    live = ("--set", "models.judge={kind: openai, model: x, base_url: 'http://127.0.0.1:1/v1'}")
    where = ("--outputs", "x", "--state", "empty")
    empty = datakit("run", "smoke/pairs", "--offline", *live, *where)
    assert empty.returncode == 4
    assert "no recorded answer" in empty.stderr


def test_schemas_are_written(datakit, tmp_path):
    datakit("schemas", "--out", "s")
    assert (tmp_path / "s" / "recipe.schema.json").is_file()
    assert (tmp_path / "s" / "records" / "pair.schema.json").is_file()


def test_vllm_is_never_put_into_a_folder_that_holds_something(datakit, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("")
    done = datakit("doctor", "--install-vllm", "mine")
    assert done.returncode == 2
    assert "is not empty" in done.stderr


def test_doctor_says_what_is_there(datakit):
    done = datakit("doctor")
    assert done.returncode == 0, done.stderr
    assert "polars" in done.stdout
    assert "ledger" in done.stdout


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ("{max_tokens: 300}", "the same command goes on where it stopped, and may spend as much"),
        ("{max_tokens: 300, per: total}", "raise the cap to go on where it stopped; --finish"),
        ("{max_tokens: 3}", "one request may cost more; raise the cap"),
    ],
)
def test_a_spent_budget_is_one_sentence_with_what_to_do(tmp_path, budget, said):
    with Endpoint() as endpoint:
        write(tmp_path, recipe_of(endpoint.url, 40))
        done = asked(tmp_path, "run", "asking.yaml", "--set", f"budget={budget}")
    assert done.returncode == 3
    last = done.stderr.splitlines()[-1]
    assert last.startswith("datakit: the budget of ")
    assert said in last
    assert "sends no answered request again" not in last
    assert "Traceback" not in done.stderr


def test_a_partial_run_says_that_it_is_one(tmp_path):
    with Endpoint() as endpoint:
        write(tmp_path, recipe_of(endpoint.url, 40))
        none = asked(tmp_path, "run", "asking.yaml", "--finish-partial")
        assert none.returncode == 1
        assert "no row of 'asking' is complete yet" in none.stderr
        assert asked(tmp_path, "run", "asking.yaml", "--max-usd", 12).returncode == 3
        first = asked(tmp_path, "run", "asking.yaml", "--finish-partial")
        assert "asking@1.0.0-partial.1 (new; " in first.stdout
        assert "a partial pre-release: " in first.stdout
        assert "calls: 0 sent, " in first.stdout
        again = asked(tmp_path, "run", "asking.yaml", "--finish-partial")
        assert "asking@1.0.0-partial.1 (unchanged; " in again.stdout
