"""`datakit ledger ...`: what was paid for is seen, taken along, answered elsewhere, forgotten."""

import json
import urllib.request

import pytest
from asking import datakit, finished, manifest_of, recipe_of, write
from endpoint import Endpoint

from datakit.models.chat import Reply
from datakit.models.ledger import Entry, Ledger, answer_of

ROWS = 12


@pytest.fixture(scope="module")
def endpoint():
    with Endpoint() as running:
        yield running


@pytest.fixture
def folder(tmp_path, endpoint):
    endpoint.reset()
    write(tmp_path, recipe_of(endpoint.url, ROWS))
    return tmp_path


@pytest.fixture(scope="module")
def done(tmp_path_factory, endpoint):
    """A folder with a whole run in it, and its manifest; only to be read."""
    folder = tmp_path_factory.mktemp("done")
    write(folder, recipe_of(endpoint.url, ROWS))
    return folder, manifest_of(folder, "asking.yaml")


def put(folder, text, request=None, model="m"):
    """An answer in the ledger; its key."""
    asked = request or {"messages": [{"role": "user", "content": text}]}
    entry = Entry(model=model, request=asked, reply=Reply(text=text, finish_reason="stop"))
    with Ledger.opened(folder / "state") as ledger:
        ledger.put([answer_of(entry)])
    return entry.key


def test_list_shows_the_newest_and_show_one_with_its_attempts(done):
    folder, _ = done
    lines = finished(folder, "ledger", "list", "--limit", 3).splitlines()
    assert len(lines) == 9
    key = lines[0].split()[0]
    assert len(key) == 12
    shown = json.loads(finished(folder, "ledger", "show", key))
    assert shown["key"].startswith(key)
    [attempt] = shown["attempts"]
    assert (attempt["outcome"], attempt["recipe"], attempt["step"]) == ("ok", "asking", "judge")
    assert attempt["usd"] > 0
    only = finished(folder, "ledger", "list", "--model", "the-writer@1", "--limit", 99)
    assert only.count("the-writer@1") == ROWS
    assert not finished(folder, "ledger", "list", "--model", "nobody")
    [first, *_] = finished(folder, "ledger", "list", "--limit", 1, "--json").splitlines()
    assert json.loads(first).keys() >= {"key", "written", "model", "request", "reply"}


@pytest.mark.parametrize(
    ("prefix", "said"), [("", "several answers"), ("zz", "no answer"), ("%", "no answer")]
)
def test_a_key_must_name_one_answer(done, prefix, said):
    folder, _ = done
    failed = datakit(folder, "ledger", "show", prefix)
    assert failed.returncode == 2
    assert said in failed.stderr
    assert "datakit ledger list" in failed.stderr


def test_text_of_models_cannot_move_the_terminal(tmp_path):
    evil = "\x1b[2Jgone\x9b31m\r\x07\u202e\x7f\n\x1b]0;title\x07"
    key = put(tmp_path, evil, model=f"m{evil}")
    put(tmp_path, evil, {"prompt": evil})
    put(tmp_path, evil, {"messages": [{"role": "user", "content": [{"text": evil}]}]})
    put(tmp_path, evil, {"messages": "none"})
    put(tmp_path, evil, {"other": 1})
    for command in (("list",), ("list", "--json"), ("show", key), ("stats",), ("stats", "--json")):
        printed = finished(tmp_path, "ledger", *command)
        marks = set(printed) - {"\n"}
        assert not any(ord(mark) < 32 or 127 < ord(mark) < 160 for mark in marks), command
        assert not marks & {"\x7f", "\u202e"}, command


def test_stats_count_what_was_paid_wasted_and_saved(tmp_path):
    with Endpoint(fail_first=1) as endpoint:
        write(tmp_path, recipe_of(endpoint.url, 4))
        ran = finished(tmp_path, "run", "asking.yaml")
        again = finished(tmp_path, "run", "asking.yaml", "--outputs", "elsewhere")
    assert "calls: 16 sent, 0 replayed" in ran
    assert "replaying saved $0.00" in ran
    assert "calls: 0 sent, 16 replayed" in again
    found = json.loads(finished(tmp_path, "ledger", "stats", "--json"))
    rows = found["spending"]
    assert [row["model"] for row in rows] == ["the-drafter@1", "the-judge@1", "the-writer@1"]
    for row in rows:
        good = row["sent"] - row["failed"]
        assert row["replayed"] == good == row["failed"]
        assert row["paid_usd"] == pytest.approx(row["saved_usd"] + row["wasted_usd"])
        assert row["saved_usd"] > 0
    saved = sum(row["saved_usd"] for row in rows)
    assert f"paid $0.00, $0.00 of it for failed tries; replaying saved ${saved:.2f}" in again
    wasted = sum(row["wasted_usd"] for row in rows)
    assert f"paid ${saved + wasted:.2f}, " in ran
    printed = finished(tmp_path, "ledger", "stats")
    assert "the-judge@1: 8 answers, " in printed
    assert "asking / the-judge@1: 16 sent for $" in printed
    assert "8 of them failed" in printed
    assert "8 replayed" in printed


def test_what_batches_cost_is_counted_as_paid_and_not_as_saved(tmp_path, endpoint, monkeypatch):
    monkeypatch.setattr("datakit.models.batch_wire.FIRST_PAUSE_S", 0.01)
    write(tmp_path, recipe_of(endpoint.url, 4, mode="batch"))
    ran = finished(tmp_path, "run", "asking.yaml")
    paid = sum(
        row["paid_usd"]
        for row in json.loads(finished(tmp_path, "ledger", "stats", "--json"))["spending"]
    )
    assert "calls: 16 sent, 0 replayed" in ran
    assert f"paid ${paid:.2f}, $0.00 of it for failed tries; replaying saved $0.00" in ran
    again = finished(tmp_path, "run", "asking.yaml", "--outputs", "elsewhere")
    assert f"paid $0.00, $0.00 of it for failed tries; replaying saved ${paid:.2f}" in again


def test_what_is_pruned_is_asked_again_and_only_with_yes(folder, endpoint):
    first = manifest_of(folder, "asking.yaml")
    sent = endpoint.stats()["requests"]
    elsewhere = ("--outputs", "elsewhere")
    said = finished(folder, "ledger", "prune", "--model", "the-writer@1")
    assert said == f"{ROWS} answers; --yes removes them\n"
    finished(folder, "run", "asking.yaml", *elsewhere)
    assert endpoint.stats()["requests"] == sent
    said = finished(folder, "ledger", "prune", "--model", "the-writer@1", "--yes")
    assert said == f"{ROWS} answers removed\n"
    again = manifest_of(folder, "asking.yaml", "--outputs", "third")
    assert endpoint.stats()["requests"] == sent + ROWS
    assert again["digest"] == first["digest"]
    assert finished(folder, "ledger", "prune", "--before", "2020-01-01", "--yes").startswith("0 ")
    assert finished(folder, "ledger", "prune", "--unusable").startswith("0 answers")
    for more in ((), ("--yes",)):
        failed = datakit(folder, "ledger", "prune", *more)
        assert failed.returncode == 2
        assert "name what to prune" in failed.stderr
    assert datakit(folder, "ledger", "prune", "--before", "soon").returncode == 2


def test_an_export_replays_offline_to_the_same_rows(done, tmp_path, endpoint):
    folder, manifest = done
    file = tmp_path / "answers.jsonl"
    assert f"{4 * ROWS} answers written" in finished(folder, "ledger", "export", file)
    write(tmp_path, recipe_of(endpoint.url, ROWS))
    state = ("--state", "fresh")
    counts = f"{4 * ROWS} answers read, {4 * ROWS} of them new"
    assert counts in finished(tmp_path, "ledger", "import", file, *state)
    assert "0 of them new" in finished(tmp_path, "ledger", "import", file, *state)
    endpoint.reset()
    again = manifest_of(tmp_path, "asking.yaml", "--offline", *state)
    assert again["digest"] == manifest["digest"]
    assert endpoint.stats()["requests"] == 0


def answered_elsewhere(file, url, spoil=0):
    """Answer a batch file by hand, all but the first `spoil` lines, which fail."""
    lines = []
    for number, line in enumerate(file.read_text().splitlines()):
        asked = json.loads(line)
        body = json.dumps(asked["body"]).encode()
        request = urllib.request.Request(
            url.removesuffix("/v1") + asked["url"], body, {"Content-Type": "application/json"}
        )
        told = {"status_code": 500, "body": {"error": {"message": "no"}}}
        if number >= spoil:
            with urllib.request.urlopen(request) as reply:
                told = {"status_code": 200, "body": json.load(reply)}
        lines.append(json.dumps({"custom_id": asked["custom_id"], "response": told}))
    out = file.with_suffix(".out.jsonl")
    out.write_text("\n".join(lines))
    return out


def test_requests_that_are_answered_elsewhere_are_not_sent(folder, endpoint, done):
    _, manifest = done
    rounds = []
    for number in range(9):
        file = folder / f"asks-{number}.jsonl"
        said = finished(folder, "ledger", "requests", "asking.yaml", file)
        if not file.exists():
            assert "every request that can be asked now is answered" in said
            break
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        rounds.append(len(lines))
        assert f"{len(lines)} requests written" in said
        out = answered_elsewhere(file, endpoint.url, spoil=2 if number == 0 else 0)
        assert f"{len(lines)} answers read" in finished(folder, "ledger", "import", out)
    # What failed is written again; the next step's follow when a part is through.
    assert rounds[0] == 2 * ROWS
    assert sum(rounds) == 4 * ROWS + 2
    endpoint.reset()
    live = manifest_of(folder, "asking.yaml")
    assert endpoint.stats()["requests"] == 0
    assert live["digest"] == manifest["digest"]


def test_a_run_sends_only_what_remains(folder, endpoint, done):
    _, manifest = done
    file = folder / "asks.jsonl"
    finished(folder, "ledger", "requests", "asking.yaml", file)
    assert datakit(folder, "ledger", "requests", "asking.yaml", file).returncode == 2
    finished(folder, "ledger", "import", answered_elsewhere(file, endpoint.url))
    endpoint.reset()
    live = manifest_of(folder, "asking.yaml")
    assert endpoint.stats()["requests"] == 2 * ROWS
    assert live["digest"] == manifest["digest"]


def test_a_broken_file_changes_nothing(folder):
    (folder / "bad.jsonl").write_text('{"custom_id": "nobody", "response": {"body": {}}}\n')
    failed = datakit(folder, "ledger", "import", "bad.jsonl")
    assert failed.returncode == 2
    assert "line 1" in failed.stderr
    assert not finished(folder, "ledger", "list")
