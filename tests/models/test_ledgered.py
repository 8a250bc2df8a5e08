"""Asking through the ledger: what is known is replayed, what is not is asked once, over HTTP."""

import asyncio
import dataclasses

import pytest
from endpoint import Endpoint
from models_kit import answer, answers, attempts, entries, openai, outcomes, say, session, within

from datakit.errors import EndpointError, NotRecorded, Pending, Unanswered
from datakit.models.chat import Ask, Reply, request_of, wire_request
from datakit.models.ledger import Entry, Ledger, answer_of
from datakit.models.sampling import Sampling
from datakit.models.scripted import Scripted
from datakit.models.specs import Limits, OpenAISpec, Price, ScriptedSpec
from datakit.records import Message
from datakit.session import Watch

SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}


def key(spec, asked):
    return request_of(spec, spec.resolved_identity(), asked).key


def record(folder, *recorded):
    with Ledger.opened(folder / "state") as ledger:
        return ledger.put([answer_of(one) for one in recorded])


# What is sent


def test_8_draws_of_which_5_are_known_send_3(tmp_path):
    with Endpoint() as endpoint:
        spec = openai(endpoint.url)
        five = answers(tmp_path, spec, [say(draw=draw) for draw in range(5)])
        assert endpoint.stats()["requests"] == 5
        watch = Watch()
        eight = answers(tmp_path, spec, [say(draw=draw) for draw in range(8)], watch=watch)
        assert endpoint.stats()["requests"] == 8
    assert eight[:5] == five
    assert (watch.meter.replayed, watch.meter.sent) == (5, 3)


def test_equal_requests_under_way_are_sent_once(tmp_path):
    with Endpoint(latency="fixed:0.05") as endpoint:
        given = answers(tmp_path, openai(endpoint.url), [say()] * 20)
        assert endpoint.stats()["requests"] == 1
    assert len({reply.text for reply in given}) == 1


def test_equal_requests_under_way_fail_together_after_one_request(tmp_path):
    with Endpoint(latency="fixed:0.05", p500=1) as endpoint:
        given = answers(tmp_path, openai(endpoint.url), [say()] * 5)
        assert endpoint.stats()["requests"] == 1
    assert {(type(error), error.reason) for error in given} == {(Unanswered, "server_error")}


def cancelling(place):
    """Four equal asks, of which the one at `place` is cancelled while it is under way."""

    async def work(kit):
        tasks = [asyncio.create_task(kit.ask("m", say())) for _ in range(4)]
        await asyncio.sleep(0.02)
        tasks[place].cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        return ended.pop(place), ended

    return work


def test_who_waits_for_an_equal_request_gets_an_answer_though_its_first_asker_is_cancelled(
    tmp_path,
):
    watch = Watch()
    with Endpoint(latency="fixed:0.1") as endpoint:
        cancelled, others = within(tmp_path, openai(endpoint.url), cancelling(0), watch=watch)
        assert endpoint.stats()["requests"] <= 2
    assert isinstance(cancelled, asyncio.CancelledError)
    assert [type(reply) for reply in others] == [Reply] * 3
    assert watch.meter.sent == 1


def test_who_stops_waiting_for_an_equal_request_does_not_stop_the_others(tmp_path):
    with Endpoint(latency="fixed:0.1") as endpoint:
        cancelled, others = within(tmp_path, openai(endpoint.url), cancelling(3))
        assert endpoint.stats()["requests"] == 1
    assert isinstance(cancelled, asyncio.CancelledError)
    assert [type(reply) for reply in others] == [Reply] * 3


def test_no_more_than_max_in_flight_are_under_way(tmp_path):
    with Endpoint(latency="fixed:0.05") as endpoint:
        asks = [say(f"question {number}") for number in range(20)]
        answers(tmp_path, openai(endpoint.url, max_in_flight=4), asks)
        assert endpoint.stats()["max_in_flight"] == 4


def test_a_refused_key_costs_exactly_one_request_though_20_asks_wait(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "wrong")
    with Endpoint(key="right", latency="fixed:0.02") as endpoint:
        asks = [say(f"question {number}") for number in range(20)]
        given = answers(tmp_path, openai(endpoint.url, api_key_env="MY_KEY"), asks)
        assert endpoint.stats()["requests"] == 1
    assert [type(error) for error in given] == [EndpointError] * 20
    assert entries(tmp_path) == []


def test_an_exhausted_transient_failure_is_no_answer_and_asked_again(tmp_path, monkeypatch):
    monkeypatch.setattr("datakit.models.openai._FIRST_WAIT_S", 0.001)
    with Endpoint(p500=1) as endpoint:
        spec = openai(endpoint.url, retries=2)
        [failure] = answers(tmp_path, spec, [say()])
        assert isinstance(failure, Unanswered)
        assert entries(tmp_path) == []
        endpoint.set(p500=0)
        [reply] = answers(tmp_path, spec, [say()])
        assert endpoint.stats()["requests"] == 4
    assert [kept.reply for kept in entries(tmp_path)] == [reply]
    assert outcomes(tmp_path) == ["server_error"] * 3 + ["ok"]


def test_a_truncated_reply_is_replayed_as_truncated(tmp_path):
    asked = say(sampling=Sampling(max_tokens=1))
    with Endpoint() as endpoint:
        spec = openai(endpoint.url)
        [first] = answers(tmp_path, spec, [asked])
        [second] = answers(tmp_path, spec, [asked])
        assert endpoint.stats()["requests"] == 1
    assert first.finish_reason == second.finish_reason == "length"
    assert first == second


def test_attempts_say_who_asked_and_what_replaying_saved(tmp_path):
    with Endpoint(reply=lambda body: "one two three") as endpoint:
        spec = openai(endpoint.url, price=Price(input=1e5, output=1e6))
        answer(tmp_path, spec, say())
        watch = Watch()
        answers(tmp_path, spec, [say(), say()], watch=watch, run="run-2")
    paid, saved = attempts(tmp_path)
    assert (paid.run, paid.recipe, paid.step, paid.model) == ("run-1", "recipe", "step", "any")
    assert (paid.outcome, paid.answers, paid.key) == ("ok", 1, key(spec, say()))
    assert (paid.input_tokens, paid.output_tokens) == (5, 3)
    assert paid.usd == pytest.approx(0.5 + 3)
    assert (saved.run, saved.outcome, saved.answers) == ("run-2", "replayed", 2)
    assert (saved.input_tokens, saved.output_tokens) == (10, 6)
    assert saved.usd == watch.meter.saved_usd == pytest.approx(7)
    assert (watch.meter.usd, watch.meter.sent) == (0, 0)


# What does not send


@pytest.mark.parametrize(
    "asked", [say("the last words"), Ask(prefix="so begin the last words")], ids=["chat", "prefix"]
)
@pytest.mark.parametrize("spec", [openai(model="one", identity="the-model@1")])
def test_an_offline_miss_names_the_model_and_what_was_asked(tmp_path, spec, asked):
    [error] = answers(tmp_path, spec, [asked], offline=True)
    assert isinstance(error, NotRecorded)
    assert "'the-model@1'" in str(error)
    assert "the last words" in str(error)
    assert outcomes(tmp_path) == []


def test_offline_a_known_answer_is_replayed(tmp_path):
    with Endpoint() as endpoint:
        spec = openai(endpoint.url)
        online = answer(tmp_path, spec, say())
        assert answer(tmp_path, spec, say(), offline=True) == online
        assert endpoint.stats()["requests"] == 1


def test_what_is_finished_as_far_as_it_goes_sends_nothing(tmp_path):
    with Endpoint() as endpoint:
        spec = openai(endpoint.url)
        known = answer(tmp_path, spec, say())
        given = answers(tmp_path, spec, [say(), say("new")], finish_partial=True)
        assert endpoint.stats()["requests"] == 1
    assert given[0] == known
    assert (type(given[1]), given[1].reason) == (Pending, "unfinished")


def test_a_model_without_base_url_is_recorded_and_never_sends(tmp_path, monkeypatch):
    spec = OpenAISpec(kind="openai", model="any")
    assert spec.resolved_identity() == "recorded:any"
    with Endpoint() as endpoint:
        # Where the openai package would go by itself.
        monkeypatch.setenv("OPENAI_BASE_URL", endpoint.url)
        monkeypatch.setenv("OPENAI_API_KEY", "any")
        with pytest.raises(NotRecorded, match="recorded:any"):
            answer(tmp_path, spec, say())
        assert endpoint.stats()["requests"] == 0


def test_a_model_without_base_url_answers_what_was_imported_under_its_name(tmp_path):
    spec = OpenAISpec(kind="openai", model="any")
    recorded = Entry(
        model="recorded:any", request=wire_request(spec, say()), reply=Reply(text="two")
    )
    path = tmp_path / "recorded.jsonl"
    path.write_text(recorded.model_dump_json() + "\n")
    with session(tmp_path, spec) as opened:
        with Ledger.opened(tmp_path / "state") as ledger:
            ledger.load(path)
        assert asyncio.run(opened.kit("a").ask("m", say())).text == "two"


# Models that run here


class Elsewhere(Scripted):
    """While it answers, another process writes down another answer to the same."""

    folder, answers_there = None, 0

    async def answer(self, request):
        other = Entry(model=self.identity, request=request.body, reply=Reply(text="from elsewhere"))
        record(self.folder, other)
        self.answers_there += 1
        return await super().answer(request)


def test_an_answer_that_comes_second_gives_way_to_the_one_that_stands(tmp_path):
    """The reply that is used is the one that a replay will give."""
    spec = ScriptedSpec(kind="scripted")
    own = Elsewhere(spec)
    own.folder = tmp_path
    for _ in range(2):
        assert answer(tmp_path, spec, say(), models={"m": own}).text == "from elsewhere"
    assert own.answers_there == 1


class Counting(Scripted):
    """Counts how many requests it has at a time."""

    now = most = 0

    async def answer(self, request):
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(0.002)
        self.now -= 1
        return await super().answer(request)


@pytest.mark.parametrize(("given", "most"), [(3, 3), (None, 256)])
def test_a_model_of_the_callers_own_gets_no_more_than_its_window_and_is_written_down(
    tmp_path, given, most
):
    spec = ScriptedSpec(kind="scripted", max_in_flight=given)
    own, watch = Counting(spec), Watch()
    asks = [say(f"question {number}") for number in range(300 if given is None else 20)]
    first = answers(tmp_path, spec, asks, models={"m": own})
    assert own.most == most
    assert answers(tmp_path, spec, asks, models={"m": own}, watch=watch) == first
    assert (watch.meter.sent, watch.meter.replayed) == (0, len(asks))


# Keys


@pytest.mark.parametrize(
    "changed",
    [
        say("What is 2 + 2?"),
        Ask(messages=(Message(role="system", content="Be brief."), *say().messages)),
        Ask(prefix="What is 1 + 1?"),
        say(draw=1),
        say(sampling=Sampling(temperature=0.5)),
        say(sampling=Sampling(top_p=0.5)),
        say(sampling=Sampling(max_tokens=7)),
        say(sampling=Sampling(stop=("\n",))),
        say(sampling=Sampling(seed=1)),
        say(logprobs=3),
        say(reasoning_effort="low"),
        say(chat_template_kwargs={"enable_thinking": False}),
        say(extra_body={"min_p": 0.1}),
        say(answer_schema=SCHEMA),
    ],
    ids=lambda asked: ",".join(
        one.name
        for one in dataclasses.fields(asked)
        if getattr(asked, one.name) != getattr(say(), one.name)
    ),
)
def test_another_ask_has_another_key(changed):
    assert key(openai(), changed) != key(openai(), say())


@pytest.mark.parametrize(
    "field",
    [
        {"model": "another"},
        {"revision": "2"},
        {"identity": "my-own-name"},
        {"base_url": None},
        {"sampling": Sampling(temperature=0.5)},
        {"reasoning_effort": "low"},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"extra_body": {"min_p": 0.1}},
    ],
    ids=lambda field: ",".join(field),
)
def test_another_model_has_another_key(field):
    assert key(openai(**field), say()) != key(openai(), say())
    assert openai(**field).fingerprint() != openai().fingerprint()


@pytest.mark.parametrize(
    "field",
    [
        {"base_url": "https://elsewhere.example/v1"},
        {"base_url": ("https://one.example/v1", "https://two.example/v1")},
        {"api_key_env": "SOME_KEY"},
        {"timeout_s": 1},
        {"retries": 9},
        {"max_in_flight": 1},
        {"limits": Limits(requests=9)},
        {"price": Price(input=1, output=1)},
        {"mode": "batch"},
        {"trusted": True},
    ],
    ids=lambda field: ",".join(field),
)
def test_how_a_model_is_reached_does_not_move_the_key(field):
    assert key(openai(**field), say()) == key(openai(), say())
    assert openai(**field).fingerprint() == openai().fingerprint()


def test_a_schema_that_is_enforced_is_asked_for_in_another_way_than_one_in_text():
    asked = say(answer_schema=SCHEMA)
    assert key(openai(json_schema=True), asked) != key(openai(json_schema=False), asked)
    assert key(openai(json_schema=True), say()) == key(openai(json_schema=False), say())


def test_who_asks_and_when_does_not_move_the_key():
    spec = openai()
    plain = request_of(spec, "m", say())
    assert plain.key == request_of(spec, "m", say(), "a step", 7).key


def test_a_setting_has_one_key_whether_the_ask_or_the_model_makes_it():
    cold = Sampling(temperature=0.0)
    assert key(openai(sampling=cold), say()) == key(openai(), say(sampling=cold))
