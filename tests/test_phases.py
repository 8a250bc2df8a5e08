"""Local models take turns where they do not fit together: whole runs, with a stand-in for vLLM."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter

import pytest
from local_models import (
    alive,
    fake_python,
    logged_pid,
    processes_below,
    real,
    tiny_spec,
    wait_for,
)
from tiny_model import make_tiny_model

from datakit.errors import InputError
from datakit.models import vllm
from datakit.models.identity import folder_identity
from datakit.models.ledger import Ledger
from datakit.pipeline import run
from datakit.plan import plan_of
from datakit.recipe import load_recipe
from datakit.session import Watch

ROWS = 12


class Rig:
    """A folder with stand-ins, runs of the smoke recipe on them, and what they have noted."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.python = fake_python(folder)
        self.journal = folder / "journal.jsonl"
        self.watch = Watch()

    def overrides(self, roles=("writer", "drafter", "judge"), every=None, **does):
        """What turns the recipe's models into stand-ins; `role={...}` is what one of them does."""
        found = []
        for role in roles:
            told = {"writes": True, "journal": str(self.journal)} | (every or {})
            fake = json.dumps(told | does.get(role, {}))
            found.append(f"models.{role}.python={self.python}")
            found.append(f"models.{role}.environment={json.dumps({'FAKE': fake})}")
        return found

    def run(self, *more, every=None, lanes=1, **does):
        self.watch = Watch()
        return run(
            "smoke/local",
            outputs=self.folder / "outputs",
            state=self.folder / "state",
            overrides=[*self.overrides(every=every, **does), *more],
            lanes=lanes,
            watch=self.watch,
        )

    def command(self, *more, every=None, **does):
        """A run in a process of its own."""
        given = [*self.overrides(every=every, **does), *more]
        sets = [word for one in given for word in ("--set", one)]
        where = ["--outputs", str(self.folder / "outputs"), "--state", str(self.folder / "state")]
        return subprocess.Popen(
            [sys.executable, "-m", "datakit", "run", "smoke/local", *where, *sets],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # Where the tests run in the background, SIGINT is ignored, and that is inherited.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    @property
    def events(self):
        if not self.journal.exists():
            return []
        return [json.loads(line) for line in self.journal.read_text().splitlines()]

    @property
    def turns(self):
        """Which models went up and down, in their order."""
        return [(e["event"], e["model"][-3:]) for e in self.events if e["event"] != "asked"]

    @property
    def asked(self):
        """How many requests each model has answered."""
        return Counter(e["model"][-3:] for e in self.events if e["event"] == "asked")

    @property
    def asked_twice(self):
        asked = Counter(
            json.dumps(e["body"], sort_keys=True) for e in self.events if e["event"] == "asked"
        )
        return [request for request, times in asked.items() if times > 1]

    def forget(self):
        self.journal.unlink(missing_ok=True)

    def are_gone(self):
        return not any(alive(pid) for pid in {event["pid"] for event in self.events})


@contextlib.contextmanager
def watched():
    """The sets of models that vLLM's servers were seen to serve at a time."""
    seen, over = set(), threading.Event()

    def look():
        while not over.wait(0.1):
            words = (name.split() for name in processes_below(os.getpid()).values())
            found = {
                word for name in words if "-c" not in name for word in name if "--model=" in word
            }
            seen.add(frozenset(found))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


@pytest.fixture
def rig(tmp_path, monkeypatch):
    """One GPU, and models that take one each."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("DATAKIT_GPUS", "1")
    made = Rig(tmp_path)
    yield made
    assert made.are_gone()


def up_and_down(*models):
    return [(event, model) for model in models for event in ("up", "down")]


def test_models_that_do_not_fit_together_take_turns_and_nothing_is_asked_twice(rig):
    with watched() as seen:
        version = rig.run()
    assert {len(models) for models in seen} == {0, 1}
    # The first of them judges, so it comes last.
    assert rig.turns == up_and_down("two", "one")
    assert rig.asked == {"one": ROWS + 2 * ROWS, "two": ROWS}
    assert not rig.asked_twice
    assert rig.watch.meter.sent == 4 * ROWS
    assert version.manifest.funnel[-1].kept == ROWS
    rig.forget()
    again = rig.run()
    assert (again.manifest.version, rig.events) == (version.manifest.version, [])
    assert rig.watch.meter.sent == 0


def test_models_that_fit_together_are_up_once(rig, monkeypatch):
    monkeypatch.setenv("DATAKIT_GPUS", "2")
    rig.run()
    assert sorted(rig.turns[:2]) == [("up", "one"), ("up", "two")]
    assert sorted(rig.turns[2:]) == [("down", "one"), ("down", "two")]
    assert {event["gpus"] for event in rig.events if event["event"] == "up"} == {"0", "1"}
    assert not rig.asked_twice


def test_a_step_waits_for_the_model_of_the_step_before(rig):
    rig.run("models.judge.model=org/six")
    assert rig.turns == up_and_down("one", "two", "six")
    assert rig.asked == {"one": ROWS, "two": ROWS, "six": 2 * ROWS}
    assert not rig.asked_twice


def test_lanes_change_nothing(rig):
    one = rig.run()
    other = Rig(rig.folder / "other")
    two = other.run(lanes=3)
    assert two.manifest.digest == one.manifest.digest
    assert other.turns == rig.turns
    assert not other.asked_twice


def test_replicas_share_the_load(rig, monkeypatch):
    monkeypatch.setenv("DATAKIT_GPUS", "2")
    more = [f"models.{role}.replicas=2" for role in ("writer", "drafter", "judge")]
    rig.run(*more, every={"takes_s": 0.05})
    assert [event for event, _ in rig.turns] == ["up", "up", "down", "down"] * 2
    loads = Counter(e["pid"] for e in rig.events if e["event"] == "asked")
    assert len(loads) == 4
    assert min(loads.values()) >= ROWS / 4
    assert not rig.asked_twice


def test_the_plan_says_who_is_up_together(rig, monkeypatch):
    recipe = load_recipe("smoke/local", rig.overrides())

    def loads():
        return plan_of(recipe, rig.folder / "outputs", rig.folder / "state").loads

    assert loads() == (("writer", "judge"), ("drafter",))
    monkeypatch.setenv("DATAKIT_GPUS", "2")
    assert loads() == (("writer", "drafter", "judge"),)
    assert not rig.events


# What can go wrong.


@pytest.mark.parametrize(
    "roles", [["writer"], ["writer", "drafter"], ["writer", "drafter", "judge"]]
)
def test_a_row_that_no_model_can_answer_does_not_keep_them_taking_turns(rig, roles):
    does = {role: {"refuses": "Write"} for role in roles}
    judge_is_apart = "models.judge.model=org/six"
    version = rig.run(judge_is_apart, "gate={failures.share: {max: 1}}", **does)
    respond = version.manifest.funnel[2]
    assert 0 < respond.unanswered < ROWS
    assert respond.kept + respond.unanswered == ROWS
    assert len(rig.turns) == 6
    assert not rig.asked_twice


def test_a_server_that_dies_in_the_middle_comes_back_and_every_row_is_answered(rig):
    dies = {"dies_at": 5, "grave": str(rig.folder / "grave"), "loads_s": 0.5, "takes_s": 0.05}
    version = rig.run("models.drafter.retries=0", drafter=dies)
    assert rig.turns == [("up", "two"), *up_and_down("two", "one")]
    assert version.manifest.funnel[-1].kept == ROWS
    assert version.manifest.funnel[2].unanswered == 0


def test_one_of_two_replicas_that_dies_is_stood_in_for(rig, monkeypatch):
    monkeypatch.setenv("DATAKIT_GPUS", "2")
    dies = {"dies_at": 3, "grave": str(rig.folder / "grave"), "takes_s": 0.05}
    version = rig.run("models.drafter.replicas=2", drafter=dies)
    assert version.manifest.funnel[2].kept == ROWS


def test_a_server_that_is_given_up_ends_the_run_and_no_row_is_blamed(rig):
    six = "models.judge.model=org/six"
    process = rig.command(six, drafter={"dies_at": 3, "takes_s": 0.05})
    _, said = process.communicate(timeout=120)
    assert process.returncode == 4, said
    assert "the vLLM server of model 'org/two' ended 4 times in 10 minutes" in said
    assert "drafter-0.log" in said
    assert rig.are_gone()
    assert rig.asked["one"] == ROWS
    version = rig.run(six)
    assert rig.asked == {"one": ROWS, "two": rig.asked["two"], "six": 2 * ROWS}
    assert version.manifest.funnel[2].unanswered == 0
    assert version.manifest.funnel[-1].kept == ROWS


@pytest.mark.parametrize(
    ("does", "code", "said"),
    [
        ({"exits": 1, "says": ["no room for the weights"]}, 4, "no room for the weights"),
        ({"exits": 2, "says": ["api_server.py: error: unrecognized arguments: --x"]}, 2, "--x"),
    ],
)
def test_a_server_that_cannot_start_ends_the_run_with_its_log_and_nothing_is_lost(
    rig, does, code, said
):
    six = "models.judge.model=org/six"
    process = rig.command(six, drafter=does)
    _, printed = process.communicate(timeout=120)
    assert process.returncode == code
    assert said in printed
    assert "Traceback" not in printed
    assert rig.turns == up_and_down("one")
    rig.forget()
    rig.run(six)
    assert rig.turns == up_and_down("two", "six")
    assert rig.asked == {"two": ROWS, "six": 2 * ROWS}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["loading", "asking"])
def test_a_signal_stops_the_servers(rig, moment, number):
    log = rig.folder / "state" / "vllm" / "smoke-local" / "writer-0.log"
    slow = {"loads_s": 30} if moment == "loading" else {"takes_s": 0.3}
    given = ["models.writer.max_in_flight=2", "models.judge.model=org/six"]
    process = rig.command(*given, writer=slow)
    try:
        if moment == "loading":
            server = wait_for(lambda: logged_pid(log, "server"), 30)
        else:
            wait_for(lambda: rig.asked["one"] > 2, 30)
            server = logged_pid(log, "server")
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 3, said
    assert "stopped by SIG" in said
    assert "Traceback" not in said
    assert not alive(server)


def test_too_large_a_model_is_told_before_anything_is_asked(rig):
    with pytest.raises(InputError, match=r"models\.drafter needs 2 GPUs"):
        rig.run("models.drafter.gpus=2")
    assert not rig.events


@pytest.mark.slow
def test_a_flow_serves_local_models_too(rig):
    quiet = {
        "PREFECT_HOME": str(rig.folder / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",
        "DO_NOT_TRACK": "1",
    }
    code = (
        "import json, sys\n"
        "from flows.curate import curate\n"
        "print(curate('smoke/local', outputs=sys.argv[1], state=sys.argv[2], lanes=3,"
        " overrides=json.loads(sys.argv[3])))"
    )
    where = [str(rig.folder / "flow"), str(rig.folder / "flow-state")]
    done = subprocess.run(
        [sys.executable, "-c", code, *where, json.dumps(rig.overrides())],
        env=os.environ | quiet,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "smoke-local@1.0.0"
    assert rig.turns == up_and_down("two", "one")
    assert not rig.asked_twice


# vLLM itself.


@real
def test_two_models_on_one_gpu_make_a_version(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("DATAKIT_GPUS", "1")
    one, two = tmp_path / "one", tmp_path / "two"
    specs = {"writer": tiny_spec(one, 1), "drafter": tiny_spec(two, 2), "judge": tiny_spec(one, 1)}
    # A random model would seldom come to an end (token 2), or close a quotation (token 4).
    overrides = [
        "models.judge.sampling={temperature: 1, max_tokens: 300}",
        "models.judge.extra_body={logit_bias: {'4': 6}}",
        "steps.judge.sampling={temperature: 1}",
        "steps.judge.need=1",
    ]
    for role in ("writer", "drafter"):
        overrides.append(f"models.{role}.extra_body={{logit_bias: {{'2': 3}}}}")
        overrides.append(f"models.{role}.sampling={{temperature: 0.8, max_tokens: 96}}")
    for role, spec in specs.items():
        fields = spec.model_dump(mode="json", include={"model", "python", "environment"})
        fields["args"] = spec.args | {"max_model_len": 2048}
        overrides += [f"models.{role}.{name}={json.dumps(value)}" for name, value in fields.items()]

    def go():
        watch = Watch()
        where = {"outputs": tmp_path / "outputs", "state": tmp_path / "state"}
        return run("smoke/local", overrides=overrides, watch=watch, **where), watch.meter

    def sent():
        sql = "SELECT run, step, model, key FROM attempts WHERE outcome != 'replayed' ORDER BY at"
        with Ledger.opened(tmp_path / "state") as ledger:
            rows = ledger.db.execute(sql).fetchall()
        last = Counter((step, model) for run, step, model, _ in rows if run == rows[-1][0])
        return len(rows), len({row[3] for row in rows}), last

    with watched() as seen:
        first, meter = go()
    assert {len(models) for models in seen} == {0, 1}
    assert len(frozenset().union(*seen)) == 2
    logs = tmp_path / "state" / "vllm" / "smoke-local"
    assert sorted(log.name for log in logs.glob("*")) == ["drafter-0.log", "writer-0.log"]
    assert first.manifest.splits
    writer, drafter = (specs[role].resolved_identity() for role in ("writer", "drafter"))
    assert first.manifest.models["drafter"].identity == drafter
    assert drafter.startswith(folder_identity(two))
    assert folder_identity(two) in (first.folder / "README.md").read_text()
    requests, distinct, by_model = sent()
    assert requests == distinct == meter.sent
    assert by_model["respond", writer] == by_model["respond", drafter] == ROWS

    with monkeypatch.context() as nothing_starts:
        nothing_starts.setattr(vllm.VLLMServer, "start", None)
        again, meter = go()
    assert (again.manifest.version, meter.sent) == (first.manifest.version, 0)

    make_tiny_model(two, 3)
    third, meter = go()
    retrained = specs["drafter"].resolved_identity()
    assert retrained != drafter
    requests, distinct, by_model = sent()
    assert requests == distinct
    assert by_model.pop(("judge", writer)) > 0
    assert by_model == {("respond", retrained): ROWS}
    assert third.manifest.version != first.manifest.version
