"""The offline batch API: the same rows as live, and nothing paid twice, whatever dies when."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import endpoint_batch
import openai
import pytest
from endpoint import Endpoint

from datakit.errors import EndpointError, InputError, Stopped
from datakit.models.batch import Queue
from datakit.models.batch_book import BatchBook
from datakit.models.batch_files import CHAT, holds_responses, read_responses, write_requests
from datakit.models.batch_wire import Provider
from datakit.models.ledger import Ledger
from datakit.models.specs import OpenAISpec
from datakit.pipeline import run

PRICE = {"input": 1_000, "output": 2_000}


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    monkeypatch.setattr("datakit.models.batch_wire.FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr("datakit.models.batch_wire.LONGEST_PAUSE_S", 0.02)


def model(endpoint, **more):
    given = {"kind": "openai", "model": "any", "base_url": endpoint.url, "mode": "batch"}
    return given | {"price": PRICE} | more


def recipe(endpoint, rows=20, bound=0.1, steps=(), **more):
    return {
        "name": "batched",
        "rows_per_part": 8,
        "gate": {"failures.share": {"max": bound}, "rows": {"min": 0}},
        "models": {"m": model(endpoint, **more), "other": model(endpoint, model="other", **more)},
        "steps": [{"step": "toys.numbers", "rows": rows}, *(steps or [{"step": "toys.answer"}])],
    }


@pytest.fixture
def go(tmp_path):
    """Runs a recipe; folder by name, one state for all but those named otherwise."""

    def made(given, folder="it", state="state", **options):
        where = {"outputs": tmp_path / folder, "state": tmp_path / state}
        return run(given, **where, **options)

    return made


@pytest.fixture
def ledger(tmp_path):
    with Ledger.opened(tmp_path / "state") as opened:
        yield opened


def one(ledger, sql, *values):
    return ledger.db.execute(sql, values).fetchone()


def outcomes(ledger):
    rows = ledger.db.execute(
        "SELECT outcome, SUM(answers) FROM attempts WHERE outcome != 'replayed' GROUP BY outcome"
    )
    return dict(rows.fetchall())


def answer(version):
    return version.manifest.funnel[1]


JUDGED = [
    {"step": "annotation.respond", "models": ["m", "other"]},
    {"step": "annotation.judge", "judge": "m"},
    {"step": "annotation.pair"},
]


def test_a_recipe_of_batches_gives_the_rows_of_the_live_one_for_half_the_price(go, ledger):
    with Endpoint() as endpoint:
        live = go(recipe(endpoint, steps=JUDGED, mode="live"), "live", "live")
        endpoint.reset()
        batched = go(recipe(endpoint, steps=JUDGED))
        stats = endpoint.stats()
        assert batched.manifest.digest == live.manifest.digest
        # Two writers at the same time, then the judge.
        assert (stats["batches"], stats["batch_requests"], stats["requests"]) == (3, 80, 0)
        assert stats["answered_twice"] == 0
        assert outcomes(ledger) == {"ok": 80}
        with Ledger.opened(ledger.path.parent.parent / "live") as other:
            sql = "SELECT usd, tokens FROM spent WHERE scope = 'batched total'"
            (usd, tokens), (live_usd, live_tokens) = one(ledger, sql), one(other, sql)
        assert tokens == live_tokens
        assert usd == pytest.approx(live_usd / 2)
        assert one(ledger, "SELECT COUNT(*) FROM queue") == (0,)
        go(recipe(endpoint, steps=JUDGED), "again")
        assert endpoint.stats()["batch_requests"] == 80


def test_a_lot_is_sent_in_files_of_the_size_that_a_provider_takes(go, monkeypatch):
    monkeypatch.setattr("datakit.models.batch.MOST_REQUESTS", 7)
    with Endpoint(batch_s=0.05) as endpoint:
        assert answer(go(recipe(endpoint))).kept == 20
        assert endpoint.stats()["batches"] == 3
        monkeypatch.setattr("datakit.models.batch_book.MOST_BYTES", 600)
        endpoint.reset()
        assert answer(go(recipe(endpoint), "other", "other")).kept == 20
        assert endpoint.stats()["batches"] > 4
        assert endpoint.stats()["batch_requests"] == 20


@pytest.mark.parametrize("most", [50_000, 5])
def test_a_provider_that_takes_less_gets_less(go, monkeypatch, most):
    monkeypatch.setattr("datakit.models.batch.MOST_REQUESTS", most)
    with Endpoint(batch_limit=3) as endpoint:
        assert answer(go(recipe(endpoint))).kept == 20
        assert endpoint.stats()["answered_twice"] == 0


@pytest.mark.parametrize("most", [50_000, 8])
def test_where_too_much_is_under_way_it_is_tried_again(go, monkeypatch, most):
    monkeypatch.setattr("datakit.models.batch.MOST_REQUESTS", most)
    error = {"code": "token_limit_exceeded", "message": "Enqueued token limit reached."}
    check, refusals = endpoint_batch.checked, iter([error] * 4)

    def crowded(*given):
        requests, errors = check(*given)
        return requests, [*errors, *filter(None, [next(refusals, None)])]

    monkeypatch.setattr(endpoint_batch, "checked", crowded)
    with Endpoint() as endpoint:
        assert answer(go(recipe(endpoint))).kept == 20
        assert endpoint.stats()["batch_requests"] == 20


def test_one_that_never_takes_any_stops_the_run(go):
    with Endpoint(batch_limit=1) as endpoint, pytest.raises(EndpointError, match="after 2 tries"):
        go(recipe(endpoint, retries=1))


def test_only_failed_lines_are_sent_again(go, ledger):
    faults = {"p500": 0.1, "p429": 0.1, "pbad": 0.1, "pcut": 0.05, "p503": 0.05}
    with Endpoint(**faults) as endpoint:
        assert answer(go(recipe(endpoint, rows=60))).kept == 60
        stats = endpoint.stats()
        assert stats["answered_twice"] == stats["sent_again_after_ok"] == 0
        failed = sum(stats["batch_errors"].values())
        assert stats["batch_requests"] == 60 + failed
        found = outcomes(ledger)
        assert found.pop("ok") == 60
        assert sum(found.values()) == failed
        assert set(found) == {"server_error", "rate_limited", "malformed_body", "overloaded"}


def test_what_expires_is_sent_again(go, ledger):
    with Endpoint(pexpire=0.4) as endpoint:
        assert answer(go(recipe(endpoint))).kept == 20
        assert endpoint.stats()["answered_twice"] == 0
        assert outcomes(ledger)["timeout"] == endpoint.stats()["batch_errors"]["pexpire"]


def test_a_row_fails_for_its_own_reason_and_the_next_run_asks_again_where_none_answered(go):
    faults = {"p500": 0.3, "prefuse": 0.2}
    with Endpoint(**faults) as endpoint:
        given = recipe(endpoint, rows=40, bound=1, retries=0)
        first = answer(go(given))
        errors = endpoint.stats()["batch_errors"]
        assert first.reasons == {
            "server_error": errors["p500"],
            "content_filter": errors["prefuse"],
        }
        assert first.unanswered == errors["p500"]
        endpoint.set(p500=0, prefuse=0)
        endpoint.reset()
        second = answer(go(given))
        # Refused rows stand in parts with unanswered ones, which are done again.
        assert errors["p500"] <= endpoint.stats()["batch_requests"] <= sum(errors.values())
        assert second.unanswered == 0
        assert endpoint.stats()["answered_twice"] == 0


def test_a_file_that_is_wrong_stops_the_run_in_one_sentence(go, ledger):
    with Endpoint(models=("another",)) as endpoint:
        with pytest.raises(
            EndpointError, match=r"refuses a batch of 20 requests: line 1: "
        ) as said:
            go(recipe(endpoint))
        assert "model_not_found" in str(said.value)
        endpoint.set(models=())
        assert answer(go(recipe(endpoint))).kept == 20
        assert one(ledger, "SELECT COUNT(*) FROM queue") == (0,)


def test_a_wrong_key_stops_the_run_and_is_named_by_its_variable(go, monkeypatch, ledger):
    monkeypatch.setenv("SOME_KEY", "sk-wrong")
    with Endpoint(key="sk-right") as endpoint:
        with pytest.raises(EndpointError, match="SOME_KEY") as said:
            go(recipe(endpoint, api_key_env="SOME_KEY"))
        assert "sk-wrong" not in str(said.value)
        assert b"sk-wrong" not in ledger.path.read_bytes()
        monkeypatch.setenv("SOME_KEY", "sk-right")
        assert answer(go(recipe(endpoint, api_key_env="SOME_KEY"))).kept == 20


def test_an_endpoint_that_is_not_there_is_said(go):
    with Endpoint() as endpoint:
        given = recipe(endpoint, retries=1)
    with pytest.raises(EndpointError, match="connection failed"):
        go(given)


def test_an_endpoint_without_batches_is_said(go):
    with Endpoint() as endpoint:
        given = recipe(endpoint, base_url=f"{endpoint.url}/elsewhere")
        with pytest.raises(EndpointError, match="leave out `mode: batch`"):
            go(given)


def test_a_cancelled_batch_keeps_its_answers_and_the_next_run_sends_the_rest(go, ledger):
    with Endpoint(batch_s=0.4) as endpoint:

        def cancel(*_):
            with openai.OpenAI(base_url=endpoint.url, api_key="x") as client:
                for batch in client.batches.list():
                    if batch.request_counts.completed and batch.status == "in_progress":
                        client.batches.cancel(batch.id)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("datakit.models.batch.time.sleep", cancel)
            with pytest.raises(EndpointError, match="was cancelled"):
                go(recipe(endpoint, rows=100))
        (known,) = one(ledger, "SELECT COUNT(*) FROM answers")
        assert 0 < known < 100
        endpoint.set(batch_s=0)
        assert answer(go(recipe(endpoint, rows=100))).kept == 100
        assert endpoint.stats()["answered_twice"] == 0
        assert endpoint.stats()["batch_requests"] == 100


# A process that dies


def started(tmp_path, given):
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(given))
    where = ["--outputs", str(tmp_path / "it"), "--state", str(tmp_path / "state")]
    return subprocess.Popen(
        [sys.executable, "-m", "datakit", "run", str(path), *where],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def under_way(endpoint, process):
    while not endpoint.stats()["batches"]:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


@pytest.mark.slow
def test_kill_9_while_a_batch_runs_and_the_next_process_collects_it(go, tmp_path, ledger):
    with Endpoint(batch_s=3600) as endpoint:
        process = started(tmp_path, recipe(endpoint))
        under_way(endpoint, process)
        process.kill()
        process.communicate()
        endpoint.set(batch_s=0)
        assert answer(go(recipe(endpoint))).kept == 20
        stats = endpoint.stats()
        assert (stats["batches"], stats["batch_requests"]) == (1, 20)
        assert outcomes(ledger) == {"ok": 20}
        with Endpoint() as fresh:
            live = go(recipe(fresh, mode="live"), "live", "live")
        assert go(recipe(endpoint)).manifest.digest == live.manifest.digest


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_it_waits_is_a_clean_stop(go, tmp_path, number):
    with Endpoint(batch_s=3600) as endpoint:
        process = started(tmp_path, recipe(endpoint))
        under_way(endpoint, process)
        process.send_signal(number)
        said = process.communicate()[1]
        assert process.returncode == 3, said
        assert "Traceback" not in said
        endpoint.set(batch_s=0)
        assert answer(go(recipe(endpoint))).kept == 20
        assert endpoint.stats()["batch_requests"] == 20


@pytest.fixture
def dying(monkeypatch):
    """Has a method end, before or after its work, in what no handler catches."""

    class Killed(BaseException):
        pass

    def die(name, after):
        where = BatchBook if hasattr(BatchBook, name) else Provider
        method = getattr(where, name)

        def fatal(self, *args):
            if after:
                method(self, *args)
            raise Killed

        monkeypatch.setattr(where, name, fatal)
        return Killed, lambda: monkeypatch.setattr(where, name, method)

    return die


@pytest.mark.parametrize(
    ("name", "after"),
    [
        ("claim", True),
        ("upload", True),
        ("create", False),
        ("create", True),
        ("write", True),
        ("end", False),
    ],
)
def test_wherever_a_process_dies_nothing_is_paid_twice(go, ledger, dying, name, after):
    with Endpoint() as endpoint:
        killed, mend = dying(name, after)
        with pytest.raises(killed):
            go(recipe(endpoint))
        mend()
        assert answer(go(recipe(endpoint))).kept == 20
        stats = endpoint.stats()
        assert (stats["batches"], stats["batch_requests"]) == (1, 20)
        assert outcomes(ledger) == {"ok": 20}
        assert one(ledger, "SELECT COUNT(*) FROM batches WHERE NOT collected") == (0,)


def test_a_batch_at_another_address_is_named_and_given_up_after_its_day(go, ledger, dying):
    with Endpoint(batch_s=3600) as endpoint:
        killed, mend = dying("look", False)
        with pytest.raises(killed):
            go(recipe(endpoint))
        mend()
    with Endpoint() as moved:
        with pytest.raises(EndpointError, match="not at http") as said:
            go(recipe(moved))
        assert endpoint.url in str(said.value)
        assert moved.stats()["batches"] == 0
        ledger.db.execute("UPDATE batches SET made = made - 100000")
        assert answer(go(recipe(moved))).kept == 20


def test_a_batch_that_nobody_knows_is_given_up_only_after_its_day(go, ledger, dying):
    with Endpoint() as endpoint:
        killed, mend = dying("look", False)
        with pytest.raises(killed):
            go(recipe(endpoint))
        mend()
        ledger.db.execute("UPDATE batches SET id = 'batch_gone'")
        with pytest.raises(EndpointError, match="'batch_gone', which holds 20 requests"):
            go(recipe(endpoint))
        ledger.db.execute("UPDATE batches SET made = made - 100000")
        assert answer(go(recipe(endpoint))).kept == 20


def test_what_nobody_asks_for_any_more_is_not_sent(go, dying):
    with Endpoint() as endpoint:
        killed, mend = dying("claim", False)
        with pytest.raises(killed):
            go(recipe(endpoint, rows=30))
        mend()
        assert answer(go(recipe(endpoint, rows=10))).kept == 10
        assert endpoint.stats()["batch_requests"] == 10


def test_the_network_may_fail_while_a_batch_runs(go, monkeypatch):
    with Endpoint(batch_s=0.3) as endpoint:
        calls = []
        with openai.OpenAI(api_key="x") as client:
            transport = type(client._client)
        send = transport.send

        def failing(self, request, **options):
            calls.append(request.url.path)
            if request.method == "GET" and len(calls) % 2:
                raise openai.APIConnectionError(request=request)
            return send(self, request, **options)

        monkeypatch.setattr(transport, "send", failing)
        assert answer(go(recipe(endpoint, retries=0))).kept == 20
        assert endpoint.stats()["batches"] == 1


@pytest.mark.slow
def test_two_processes_that_ask_the_same_pay_once(tmp_path, ledger):
    with Endpoint(batch_s=2) as endpoint:
        both = [started(tmp_path, recipe(endpoint)) for _ in range(2)]
        ends = [process.communicate()[1] for process in both]
        assert [process.returncode for process in both] == [0, 0], ends
        assert endpoint.stats()["batch_requests"] == 20
        assert outcomes(ledger) == {"ok": 20}
        assert one(ledger, "SELECT COUNT(*) FROM queue") == (0,)


# Budgets


def test_only_what_fits_the_budget_is_sent_and_a_higher_cap_goes_on(go, ledger):
    sampling = {"max_tokens": 50}
    with Endpoint() as endpoint:
        given = recipe(endpoint, rows=40, sampling=sampling)
        with pytest.raises(Stopped, match=r"the budget of 300 tokens .* is spent"):
            go(given, max_tokens=300)
        asked = endpoint.stats()["batch_requests"]
        assert 0 < asked < 40
        (tokens,) = one(ledger, "SELECT tokens FROM spent WHERE scope LIKE '% run %'")
        assert tokens <= 300
        assert one(ledger, "SELECT COUNT(*) FROM leases") == (0,)
        with pytest.raises(Stopped):
            go(given, max_usd=0.001)
        assert endpoint.stats()["batch_requests"] == asked
        assert answer(go(given, max_usd=1_000)).kept == 40
        assert endpoint.stats()["answered_twice"] == 0


def test_what_a_batch_may_cost_is_held_back_when_its_process_is_dead(go, ledger, dying):
    with Endpoint(batch_s=3600) as endpoint:
        budget = {"budget": {"max_tokens": 100_000, "per": "total"}}
        killed, mend = dying("look", False)
        with pytest.raises(killed):
            go(recipe(endpoint) | budget)
        mend()
        (held,) = one(ledger, "SELECT tokens FROM leases WHERE scope = 'batched total'")
        assert held > 20 * 1024
        endpoint.set(batch_s=0)
        go(recipe(endpoint) | budget)
        assert one(ledger, "SELECT COUNT(*) FROM leases") == (0,)


# Files


@pytest.fixture
def queued(go, dying, tmp_path):
    """An endpoint that answers lines of a file, and a ledger that holds 12 queued requests."""
    with Endpoint() as endpoint:
        killed, mend = dying("claim", False)
        with pytest.raises(killed):
            go(recipe(endpoint, rows=12))
        mend()
        yield endpoint


def answered(endpoint, path, spoil=""):
    """What an endpoint answers to a file of requests, as a batch would."""
    import urllib.request

    lines = []
    for line in path.read_text().splitlines():
        asked = json.loads(line)
        url = endpoint.url.removesuffix("/v1") + asked["url"]
        call = urllib.request.Request(url, json.dumps(asked["body"]).encode())
        with urllib.request.urlopen(call) as reply:
            body = json.loads(reply.read())
        told = {"status_code": 200, "body": body}
        if spoil and spoil in line:
            told = {"status_code": 500, "body": {"error": {"message": "no"}}}
        lines.append(json.dumps({"custom_id": asked["custom_id"], "response": told}))
    return lines


def test_requests_go_out_as_a_file_and_the_responses_come_back(queued, go, ledger, tmp_path):
    out, back = tmp_path / "out.jsonl", tmp_path / "back.jsonl"
    assert write_requests(ledger, out, CHAT) == 12
    assert write_requests(ledger, tmp_path / "none", "/v1/completions") == 0
    assert write_requests(ledger, tmp_path / "none", model="else") == 0
    assert write_requests(ledger, tmp_path / "none", run="another") == 0
    back.write_text("\n".join(answered(queued, out, "question 7")))
    assert [holds_responses(path) for path in (back, out, tmp_path / "none")] == [
        True,
        False,
        False,
    ]
    assert read_responses(ledger, back) == (12, 11)
    assert read_responses(ledger, back) == (12, 0)
    assert write_requests(ledger, out) == 1
    back.write_text("\n".join(answered(queued, out)))
    assert read_responses(ledger, back) == (1, 1)
    assert answer(go(recipe(queued, rows=12))).kept == 12
    assert queued.stats()["batch_requests"] == 0
    ledger.export(out)
    assert not holds_responses(out)


def test_envelopes_may_be_left_out(queued, ledger, tmp_path):
    out, back = tmp_path / "out.jsonl", tmp_path / "back.jsonl"
    write_requests(ledger, out)
    lines = [json.loads(line) for line in answered(queued, out)]
    bare = [{"custom_id": one["custom_id"], "body": one["response"]["body"]} for one in lines[:6]]
    bare += [{"custom_id": one["custom_id"], **one["response"]["body"]} for one in lines[6:]]
    back.write_text("\n".join(map(json.dumps, bare)))
    assert read_responses(ledger, back) == (12, 12)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{half", "line 13"),
        ("[1]", "no object with a custom_id"),
        ("[" * 100_000, "line 13"),
        ('{"custom_id": "x"}', "neither response nor error"),
        ('{"custom_id": "x", "response": {"status_code": 200}}', "nobody queued"),
        ('{"custom_id": "x", "method": "POST", "body": {}}', "it is a request"),
    ],
)
def test_a_broken_line_is_named_and_nothing_is_read(queued, ledger, tmp_path, line, said):
    out, back = tmp_path / "out.jsonl", tmp_path / "back.jsonl"
    write_requests(ledger, out)
    back.write_text("\n".join([*answered(queued, out), line]))
    with pytest.raises(InputError, match=said):
        read_responses(ledger, back)
    assert one(ledger, "SELECT COUNT(*) FROM answers") == (0,)
    with pytest.raises(InputError, match="cannot read"):
        read_responses(ledger, tmp_path / "nowhere")


# Hearing of it


def test_progress_tells_how_far_the_batches_are(queued, ledger, go):
    queued.set(batch_s=0.2)
    heard = []
    spec = OpenAISpec.model_validate(model(queued))
    (name,) = one(ledger, "SELECT DISTINCT run FROM queue")
    Queue(spec, ledger, recipe="batched", run=name, progress=heard.append).settle()
    assert heard[0][1:] == (1, 12, 0)
    assert heard[-1][1:] == (0, 0, 0)
    assert any(0 < one.answered < 12 for one in heard)
