"""The ledger: an answer is paid for once, kept under what was asked of whom, and never lost."""

import asyncio
import json
import multiprocessing

import pytest
from endpoint import Endpoint
from toys.answer import Answer

from datakit.errors import EndpointError, InputError, NotRecorded, OutsideError, Unanswered
from datakit.models.chat import Ask, Reply, wire_request
from datakit.models.ledger import Entry, Ledger, Ledgered, Meter, answer_key
from datakit.models.openai import OpenAIChat
from datakit.models.scripted import Scripted
from datakit.models.specs import HashingSpec, OpenAISpec, Sampling, ScriptedSpec
from datakit.records import Message
from datakit.session import Session, Settings, Watch, open_chat

SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "state"


@pytest.fixture
def ledger(folder):
    with Ledger.opened(folder) as ledger:
        yield ledger


def ask(text="What is 1 + 1?", **fields):
    return Ask(messages=(Message(role="user", content=text),), **fields)


def openai(url="http://127.0.0.1:9/v1", **fields):
    return OpenAISpec(**{"kind": "openai", "model": "any", "base_url": url, "retries": 0} | fields)


def entry(number=0, text="two", **reply):
    request = {"messages": [{"role": "user", "content": f"question {number}"}]}
    return Entry(model="m", draw=0, request=request, reply=Reply(text=text, **reply))


def answers(ledger, spec, asks, *, offline=False, meter=None):
    """What each ask gives through the ledger, all of them asked at once; errors in their place."""
    meter = meter or Meter()
    chat = Ledgered(open_chat(spec, meter), spec, ledger, meter, offline)

    async def all_of_them():
        try:
            return await asyncio.gather(*map(chat.answer, asks), return_exceptions=True)
        finally:
            await chat.close()

    return asyncio.run(all_of_them())


def key(spec, asked):
    return answer_key(spec.resolved_identity(), wire_request(spec, asked), asked.draw)


# What is sent


def test_8_draws_of_which_5_are_known_send_3(ledger):
    with Endpoint() as endpoint:
        spec = openai(endpoint.url)
        five = answers(ledger, spec, [ask(draw=draw) for draw in range(5)])
        assert endpoint.stats()["requests"] == 5
        meter = Meter()
        eight = answers(ledger, spec, [ask(draw=draw) for draw in range(8)], meter=meter)
        assert endpoint.stats()["requests"] == 8
    assert eight[:5] == five
    assert (meter.replayed, meter.sent) == (5, 3)


def test_equal_requests_under_way_are_sent_once(ledger):
    with Endpoint(latency="fixed:0.05") as endpoint:
        given = answers(ledger, openai(endpoint.url), [ask()] * 20)
        assert endpoint.stats()["requests"] == 1
    assert len({reply.text for reply in given}) == 1


def test_equal_requests_under_way_fail_together_after_one_request(ledger):
    with Endpoint(latency="fixed:0.05", p500=1) as endpoint:
        given = answers(ledger, openai(endpoint.url), [ask()] * 5)
        assert endpoint.stats()["requests"] == 1
    assert {(type(error), error.reason) for error in given} == {(Unanswered, "http_500")}


def test_who_waits_for_an_equal_request_gets_an_answer_though_its_first_asker_is_cancelled(ledger):
    async def cancel_the_first(chat):
        first, *others = [asyncio.create_task(chat.answer(ask())) for _ in range(4)]
        await asyncio.sleep(0.02)
        first.cancel()
        ended = await asyncio.gather(first, *others, return_exceptions=True)
        await chat.close()
        return ended

    with Endpoint(latency="fixed:0.1") as endpoint:
        spec, meter = openai(endpoint.url), Meter()
        chat = Ledgered(OpenAIChat(spec, meter), spec, ledger, meter, offline=False)
        cancelled, *others = asyncio.run(cancel_the_first(chat))
        assert endpoint.stats()["requests"] <= 2
    assert isinstance(cancelled, asyncio.CancelledError)
    assert [type(reply) for reply in others] == [Reply] * 3
    assert meter.sent == 1


def test_who_stops_waiting_for_an_equal_request_does_not_stop_the_others(ledger):
    async def cancel_the_last(chat):
        *others, last = [asyncio.create_task(chat.answer(ask())) for _ in range(4)]
        await asyncio.sleep(0.02)
        last.cancel()
        ended = await asyncio.gather(*others, last, return_exceptions=True)
        await chat.close()
        return ended

    with Endpoint(latency="fixed:0.1") as endpoint:
        spec, meter = openai(endpoint.url), Meter()
        chat = Ledgered(OpenAIChat(spec, meter), spec, ledger, meter, offline=False)
        *others, cancelled = asyncio.run(cancel_the_last(chat))
        assert endpoint.stats()["requests"] == 1
    assert isinstance(cancelled, asyncio.CancelledError)
    assert [type(reply) for reply in others] == [Reply] * 3


def test_no_more_than_max_in_flight_are_under_way(ledger):
    with Endpoint(latency="fixed:0.01") as endpoint:
        asks = [ask(f"question {number}") for number in range(20)]
        answers(ledger, openai(endpoint.url, max_in_flight=4), asks)
        assert endpoint.stats()["max_in_flight"] == 4


def test_a_refused_key_costs_exactly_one_request_though_20_asks_wait(ledger, monkeypatch):
    monkeypatch.setenv("MY_KEY", "wrong")
    with Endpoint(key="right", latency="fixed:0.02") as endpoint:
        asks = [ask(f"question {number}") for number in range(20)]
        given = answers(ledger, openai(endpoint.url, api_key_env="MY_KEY"), asks)
        assert endpoint.stats()["requests"] == 1
    assert [type(error) for error in given] == [EndpointError] * 20
    assert list(ledger.entries()) == []


def test_an_exhausted_transient_failure_is_written_nowhere_and_asked_again(ledger, monkeypatch):
    monkeypatch.setattr("datakit.models.openai._FIRST_WAIT_S", 0.001)
    with Endpoint(p500=1) as endpoint:
        spec = openai(endpoint.url, retries=2)
        [failure] = answers(ledger, spec, [ask()])
        assert isinstance(failure, Unanswered)
        assert list(ledger.entries()) == []
        endpoint.set(p500=0)
        [reply] = answers(ledger, spec, [ask()])
        assert endpoint.stats()["requests"] == 4
    assert [kept.reply for kept in ledger.entries()] == [reply]


def test_a_truncated_reply_is_replayed_as_truncated(ledger):
    asked = ask(sampling=Sampling(max_tokens=1))
    with Endpoint() as endpoint:
        spec = openai(endpoint.url)
        [first] = answers(ledger, spec, [asked])
        [second] = answers(ledger, spec, [asked])
        assert endpoint.stats()["requests"] == 1
    assert first.finish_reason == second.finish_reason == "length"
    assert first == second


# Offline


@pytest.mark.parametrize(
    "asked", [ask("the last words"), Ask(prefix="so begin the last words")], ids=["chat", "prefix"]
)
def test_an_offline_miss_names_the_model_and_what_was_asked(ledger, asked):
    spec = ScriptedSpec(kind="scripted", identity="the-model@1")
    [error] = answers(ledger, spec, [asked], offline=True)
    assert isinstance(error, NotRecorded)
    assert "'the-model@1'" in str(error)
    assert "the last words" in str(error)


def test_offline_a_known_answer_is_replayed(ledger):
    spec = ScriptedSpec(kind="scripted")
    online = answers(ledger, spec, [ask()])
    assert answers(ledger, spec, [ask()], offline=True) == online


def session(tmp_path, spec):
    settings = Settings(
        outputs=tmp_path / "outputs", state=tmp_path / "state", base=tmp_path, models={"m": spec}
    )
    return Session(settings, [Answer()], Watch())


def test_a_model_without_base_url_is_recorded_and_never_sends(tmp_path, monkeypatch):
    spec = OpenAISpec(kind="openai", model="any")
    assert spec.resolved_identity() == "recorded:any"

    with Endpoint() as endpoint, session(tmp_path, spec) as opened:
        # Where the openai package would go by itself.
        monkeypatch.setenv("OPENAI_BASE_URL", endpoint.url)
        monkeypatch.setenv("OPENAI_API_KEY", "any")
        with pytest.raises(NotRecorded, match="recorded:any"):
            asyncio.run(opened.kit("a").ask("m", ask()))
        assert endpoint.stats()["requests"] == 0


def test_a_model_without_base_url_answers_what_was_imported_under_its_name(tmp_path):
    spec = OpenAISpec(kind="openai", model="any")
    recorded = Entry(
        model="recorded:any", request=wire_request(spec, ask()), reply=Reply(text="two")
    )
    path = tmp_path / "recorded.jsonl"
    path.write_text(recorded.model_dump_json() + "\n")
    with session(tmp_path, spec) as opened:
        with Ledger.opened(tmp_path / "state") as ledger:
            ledger.load(path)
        assert asyncio.run(opened.kit("a").ask("m", ask())).text == "two"


# Keys


@pytest.mark.parametrize(
    "changed",
    [
        ask("What is 2 + 2?"),
        Ask(messages=(Message(role="system", content="Be brief."), *ask().messages)),
        Ask(prefix="What is 1 + 1?"),
        ask(draw=1),
        ask(sampling=Sampling(temperature=0.5)),
        ask(sampling=Sampling(top_p=0.5)),
        ask(sampling=Sampling(max_tokens=7)),
        ask(sampling=Sampling(stop=("\n",))),
        ask(sampling=Sampling(seed=1)),
        ask(logprobs=3),
        ask(reasoning_effort="low"),
        ask(chat_template_kwargs={"enable_thinking": False}),
        ask(extra_body={"min_p": 0.1}),
    ],
    ids=lambda asked: ",".join(sorted(asked.model_fields_set)),
)
def test_another_ask_has_another_key(changed):
    assert key(openai(), changed) != key(openai(), ask())


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
    assert key(openai(**field), ask()) != key(openai(), ask())
    assert openai(**field).fingerprint() != openai().fingerprint()


@pytest.mark.parametrize(
    "field",
    [
        {"base_url": "https://elsewhere.example/v1"},
        {"api_key_env": "SOME_KEY"},
        {"timeout_s": 1},
        {"retries": 9},
        {"max_in_flight": 1},
        {"trusted": True},
    ],
    ids=lambda field: ",".join(field),
)
def test_how_a_model_is_reached_does_not_move_the_key(field):
    assert key(openai(**field), ask()) == key(openai(), ask())
    assert openai(**field).fingerprint() == openai().fingerprint()


@pytest.mark.parametrize(("json_schema", "moves"), [(True, True), (False, False)])
def test_the_answer_schema_moves_the_key_where_the_endpoint_enforces_it(json_schema, moves):
    spec = openai(json_schema=json_schema)
    assert (key(spec, ask(answer_schema=SCHEMA)) != key(spec, ask())) is moves


def test_a_setting_has_one_key_whether_the_ask_or_the_model_makes_it():
    cold = Sampling(temperature=0.0)
    assert key(openai(sampling=cold), ask()) == key(openai(), ask(sampling=cold))


# The file


def test_an_answer_outlives_its_ledger_object(folder):
    with Ledger.opened(folder) as ledger:
        ledger.put(entry())
    with Ledger.opened(folder) as ledger:
        assert ledger.get(entry().key) == entry().reply


def test_the_first_written_answer_stands_over_two_ledgers_on_one_file(folder):
    with Ledger.opened(folder) as one, Ledger.opened(folder) as other:
        assert one.put(entry(text="first")).text == "first"
        assert other.put(entry(text="second")).text == "first"
        assert one.get(entry().key) == other.get(entry().key) == entry(text="first").reply


def test_an_answer_that_comes_second_gives_way_to_the_one_that_stands(ledger, folder):
    """The reply that is used is the one that a replay will give."""
    spec = ScriptedSpec(kind="scripted")
    request = wire_request(spec, ask())
    other_answer = Entry(model="scripted", request=request, reply=Reply(text="from elsewhere"))

    class SlowScripted(Scripted):
        async def answer(self, asked):
            with Ledger.opened(folder) as elsewhere:
                elsewhere.put(other_answer)
            return await super().answer(asked)

    chat = Ledgered(SlowScripted(spec), spec, ledger, Meter(), offline=False)
    assert asyncio.run(chat.answer(ask())).text == "from elsewhere"


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutsideError, match=r"ledger\.sqlite.*--state"):
        Ledger(tmp_path / "file" / "state")


def test_stats_count_answers_and_tokens_of_each_model(ledger):
    for number in range(3):
        ledger.put(entry(number, input_tokens=5, output_tokens=2))
    ledger.put(entry().model_copy(update={"model": "another"}))
    assert ledger.stats() == [
        {"model": "another", "answers": 1, "input_tokens": 0, "output_tokens": 0},
        {"model": "m", "answers": 3, "input_tokens": 15, "output_tokens": 6},
    ]


def put_many(folder, worker, barrier):
    with Ledger.opened(folder) as ledger:
        barrier.wait()
        for number in range(500):
            ledger.put(entry(f"{worker} {number}", text=f"answer {number}"))


def test_two_processes_that_write_at_once_lose_nothing(folder):
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    workers = [
        context.Process(target=put_many, args=(folder, name, barrier)) for name in ("one", "other")
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    with Ledger.opened(folder) as ledger:
        for name in ("one", "other"):
            for number in range(500):
                assert ledger.get(entry(f"{name} {number}").key).text == f"answer {number}"
        assert ledger.stats()[0]["answers"] == 1_000


# Export and import

ODD = [
    Entry(model="m", request={"prompt": "p"}, reply=Reply(text="")),
    Entry(model="m", draw=3, request={"prompt": "p"}, reply=Reply(text="x", finish_reason="stop")),
    Entry(model="m", request={"prompt": "a\nb\r\u2028\0é🙂"}, reply=Reply(text="\n\r\u2028\0é🙂")),
    Entry(model="ä/b@1", request={"prompt": "p"}, reply=Reply(text="cut", finish_reason="length")),
    Entry(
        model="m",
        request={"prompt": "p", "temperature": 0.1 + 0.2, "top_p": 1.0, "seed": 2**70},
        reply=Reply(text="x", reasoning="y", input_tokens=1, output_tokens=2),
    ),
    Entry(
        model="m",
        request={"prompt": "p", "logprobs": 1, "nested": {"b": [1, None, {"a": -0.0}]}},
        reply=Reply(text="x", logprobs={"tokens": ["x"], "token_logprobs": [-1.5e-17]}),
    ),
]


def exported(ledger, path):
    ledger.export(path)
    return path.read_bytes()


def test_export_then_import_into_another_ledger_is_the_identity(ledger, tmp_path):
    for one in ODD:
        ledger.put(one)
    assert ledger.export(tmp_path / "a.jsonl") == len(ODD)
    with Ledger.opened(tmp_path / "another") as other:
        assert other.load(tmp_path / "a.jsonl") == (len(ODD), len(ODD))
        assert list(other.entries()) == list(ledger.entries())
        assert all(other.get(one.key) == one.reply for one in ODD)
        assert exported(other, tmp_path / "b.jsonl") == (tmp_path / "a.jsonl").read_bytes()


def test_importing_twice_adds_nothing(ledger, tmp_path):
    for one in ODD:
        ledger.put(one)
    before = exported(ledger, tmp_path / "a.jsonl")
    assert ledger.load(tmp_path / "a.jsonl") == (len(ODD), 0)
    assert exported(ledger, tmp_path / "b.jsonl") == before


def test_an_import_does_not_replace_an_answer_that_stands(ledger, tmp_path):
    ledger.put(entry(text="first"))
    path = tmp_path / "a.jsonl"
    path.write_text(entry(text="second").model_dump_json())
    assert ledger.load(path) == (1, 0)
    assert ledger.get(entry().key).text == "first"


def test_an_export_can_be_of_one_model(ledger, tmp_path):
    for one in ODD:
        ledger.put(one)
    assert ledger.export(tmp_path / "a.jsonl", "ä/b@1") == 1
    assert json.loads((tmp_path / "a.jsonl").read_text())["model"] == "ä/b@1"


GOOD = entry().model_dump_json()


@pytest.mark.parametrize(
    "broken",
    [
        b"{",
        b"[]",
        b"null",
        b"{}",
        b'{"model": "m", "request": {}}',
        b'{"model": "m", "request": {}, "reply": {"text": 1}}',
        GOOD.replace('"draw":0', '"draw":"x"').encode(),
        GOOD.replace('"draw":0', '"unknown":0').encode(),
        GOOD.replace('"content"', '"content":NaN,"b"').encode(),
        GOOD.replace("two", "\\ud800").encode(),
        GOOD.encode()[:-9],
        b"\xff\xfe",
        b"[" * 5_000,
    ],
)
def test_a_broken_line_names_file_and_line_and_imports_nothing(ledger, tmp_path, broken):
    path = tmp_path / "export.jsonl"
    path.write_bytes(GOOD.encode() + b"\n\n" + broken + b"\n" + GOOD.encode())
    with pytest.raises(InputError, match=r"export\.jsonl, line 3: "):
        ledger.load(path)
    assert list(ledger.entries()) == []
    assert ledger.put(entry(text="and goes on")).text == "and goes on"


@pytest.mark.parametrize("name", ["missing.jsonl", "."])
def test_an_export_that_cannot_be_read_is_an_input_error(ledger, tmp_path, name):
    with pytest.raises(InputError, match="cannot read the ledger export"):
        ledger.load(tmp_path / name)


def test_the_ledger_keeps_answers_of_chat_models_only():
    with pytest.raises(TypeError, match="HashingSpec"):
        open_chat(HashingSpec(kind="hashing"), Meter())
