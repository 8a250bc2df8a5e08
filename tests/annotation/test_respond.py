"""Answers of several models: all of them, in order, and what happens when one fails."""

import json

import pytest
from endpoint import Endpoint
from pydantic import ValidationError
from steps_kit import each, prompt, scripted, served

from datakit.annotation.respond import Respond, read
from datakit.errors import Refused, RowError, Truncated, Unanswered, Unparsable
from datakit.models.chat import Reply, wire_request
from datakit.models.ledger import Entry, Ledger, answer_of
from datakit.models.sampling import Sampling
from datakit.models.specs import OpenAISpec
from datakit.records import Message, Prompt
from datakit.session import Watch

ROW = prompt("What is a lantern?")
TALKER = scripted("says_what_it_was_asked", "talker")
MUTE = scripted("says_nothing", "mute")


def test_each_model_gives_each_sample_in_the_order_of_the_models(tmp_path):
    models = {"one": TALKER, "two": scripted("says_what_it_was_asked", "second")}
    step = Respond(models=("two", "one"), samples=3, sampling=Sampling(temperature=0.5))
    (made,) = each(step, ROW, tmp_path, models)
    assert made.prompt == ROW.messages
    assert [(one.model, one.text[:2]) for one in made.responses] == [
        (model, f"{draw}:") for model in ("second", "talker") for draw in range(3)
    ]
    assert {one.sampling for one in made.responses} == {'{"temperature":0.5}'}
    assert {one.finish_reason for one in made.responses} == {"stop"}
    assert made.failures == ()


def test_responses_keep_their_order_however_fast_the_models_are(tmp_path):
    with (
        Endpoint(latency="fixed:0.15", reply=lambda body: "slow") as slow,
        Endpoint(reply=lambda body: "fast") as fast,
    ):
        models = {"slow": served(slow.url, "s"), "fast": served(fast.url, "f")}
        (made,) = each(Respond(models=("slow", "fast")), ROW, tmp_path, models)
    assert [one.text for one in made.responses] == ["slow", "fast"]


def test_a_sampling_of_the_step_goes_over_that_of_the_model(tmp_path):
    default = Sampling(temperature=1, top_p=0.9)
    models = {"m": scripted(sampling=default)}
    step = Respond(models=("m",), sampling=Sampling(temperature=0, max_tokens=5))
    (made,) = each(step, ROW, tmp_path, models)
    given = json.loads(made.responses[0].sampling)
    assert given == {"temperature": 0, "top_p": 0.9, "max_tokens": 5}


def test_further_samples_ask_only_for_those_that_are_new(tmp_path):
    with Endpoint() as server:
        models = {"m": served(server.url, "m")}
        (few,) = each(Respond(models=("m",), samples=2), ROW, tmp_path, models)
        (more,) = each(Respond(models=("m",), samples=5), ROW, tmp_path, models)
        assert server.stats()["ok"] == 5
    assert more.responses[:2] == few.responses


@pytest.mark.parametrize(
    ("system", "own", "asked"),
    [
        (None, None, ["user"]),
        ("Be brief.", None, ["system", "user"]),
        (None, "Be kind.", ["system", "user"]),
        ("Be brief.", "Be kind.", ["system", "user"]),
        ("", None, ["system", "user"]),
    ],
)
def test_a_system_prompt_is_for_rows_that_have_none(system, own, asked, tmp_path):
    turns = (Message(role="user", content="Hi"),)
    if own is not None:
        turns = (Message(role="system", content=own), *turns)
    row = Prompt(messages=turns).identified("x")
    step = Respond(models=("m",), system=system)
    (made,) = each(step, row, tmp_path, {"m": TALKER})
    assert [turn.role for turn in made.prompt] == asked
    if len(asked) == 2:
        first = own if own is not None else system
        assert made.prompt[0].content == first
        assert made.responses[0].text == f"0: system={first} | user=Hi"


def test_a_prompt_with_braces_is_asked_as_it_is(tmp_path):
    row = prompt("Fill {this} and {system} and %s")
    (made,) = each(Respond(models=("m",), system="{x}"), row, tmp_path, {"m": TALKER})
    assert made.responses[0].text == "0: system={x} | user=Fill {this} and {system} and %s"


@pytest.mark.parametrize("models", [(), ("",)])
def test_a_step_without_models_is_refused(models):
    with pytest.raises(ValidationError, match="models"):
        Respond(models=models)


# -- failures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("need", [None, 2, 9])
def test_a_model_that_does_not_answer_leaves_what_was_paid_for_in_the_error(need, tmp_path):
    with Endpoint(fail_matching="broken-model", reply=lambda body: "a paid answer") as server:
        models = {"good": served(server.url, "good"), "bad": served(server.url, "broken-model")}
        step = Respond(models=("bad", "good"), need=need)
        with pytest.raises(RowError) as caught:
            each(step, ROW, tmp_path, models)
        asked = server.stats()["requests"]
        assert asked == 2
        # Once it is well again, only the missing answer is asked for.
        server.set(fail_matching="")
        (made,) = each(step, ROW, tmp_path, models)
        assert server.stats()["requests"] == asked + 1
    error = caught.value
    assert (type(error), error.reason, error.transient) == (Unanswered, "too_few_answers", True)
    assert error.detail.startswith("1 of 2 answers, 2 needed; ")
    paid = json.loads(error.partial)
    assert paid["id"] == ROW.id
    assert [one["text"] for one in paid["responses"]] == ["a paid answer"]
    assert [one.text for one in made.responses] == ["a paid answer"] * 2


def test_a_failed_model_is_on_record_where_enough_answered(tmp_path):
    with Endpoint(fail_matching="broken-model") as server:
        models = {"good": served(server.url, "good"), "bad": served(server.url, "broken-model")}
        step = Respond(models=("bad", "good"), samples=2, need=2)
        (made,) = each(step, ROW, tmp_path, models)
    assert [one.model for one in made.responses] == ["good", "good"]
    assert [one.slot for one in made.failures] == ["bad/0", "bad/1"]
    assert {one.kind for one in made.failures} == {"Unanswered"}


@pytest.mark.parametrize(
    ("need", "kept"), [(1, True), (3, True), (4, False), (6, False), (None, False), (100, False)]
)
def test_need_is_the_least_number_of_answers(need, kept, tmp_path):
    models = {"m": scripted("says_nothing_at_odd_draws")}
    step = Respond(models=("m",), samples=6, need=need)
    if kept:
        (made,) = each(step, ROW, tmp_path, models)
        assert [one.text for one in made.responses] == ["answer 0", "answer 2", "answer 4"]
        assert [one.slot for one in made.failures] == ["m/1", "m/3", "m/5"]
        assert {(one.kind, one.reason.split(":")[0]) for one in made.failures} == {
            ("Unparsable", "empty")
        }
    else:
        with pytest.raises(Unparsable, match="too_few_answers: 3 of 6 answers") as caught:
            each(step, ROW, tmp_path, models)
        assert not caught.value.transient
        assert len(json.loads(caught.value.partial)["responses"]) == 3


def test_a_transient_failure_counts_before_a_lasting_one(tmp_path):
    with Endpoint(fail_matching="broken-model") as server:
        models = {"mute": MUTE, "bad": served(server.url, "broken-model")}
        with pytest.raises(Unanswered, match="0 of 2 answers, 2 needed"):
            each(Respond(models=("mute", "bad")), ROW, tmp_path, models)


def recorded(folder, reply):
    """A model that answers the only request from a record."""
    spec = OpenAISpec(kind="openai", model="old")
    request = wire_request(spec, Respond(models=("m",)).ask(ROW, 0))
    with Ledger.opened(folder / "state") as ledger:
        entry = Entry(model=spec.resolved_identity(), request=request, reply=reply)
        ledger.put([answer_of(entry)])
    return {"m": spec}


@pytest.mark.parametrize("text", ["", "I cannot help with that."])
def test_a_filtered_answer_is_a_refusal_with_its_text(text, tmp_path):
    models = recorded(tmp_path, Reply(text=text, finish_reason="content_filter"))
    with pytest.raises(Refused) as caught:
        each(Respond(models=("m",)), ROW, tmp_path, models)
    assert caught.value.reason == "too_few_answers"
    assert "content_filter" in caught.value.detail
    assert caught.value.raw == text
    assert not caught.value.transient


@pytest.mark.parametrize("reason", ["length", "stop", ""])
def test_an_answer_is_kept_with_the_reason_for_its_end(reason, tmp_path):
    reply = Reply(text="Half an ans", reasoning="hm", finish_reason=reason)
    (made,) = each(Respond(models=("m",)), ROW, tmp_path, recorded(tmp_path, reply))
    (response,) = made.responses
    assert (response.text, response.reasoning) == ("Half an ans", "hm")
    assert response.finish_reason == reason
    assert response.model == "recorded:old"
    assert made.failures == ()


def test_an_answer_cut_by_the_endpoint_is_kept_as_cut(tmp_path):
    with Endpoint(reply=lambda body: "one two three four") as server:
        models = {"m": served(server.url, "m")}
        step = Respond(models=("m",), sampling=Sampling(max_tokens=2))
        (made,) = each(step, ROW, tmp_path, models)
    assert [(r.text, r.finish_reason) for r in made.responses] == [("one two", "length")]


def test_what_a_model_was_paid_is_counted_once(tmp_path):
    watch = Watch()
    step = Respond(models=("m", "mute"), need=1)
    models = {"m": TALKER, "mute": MUTE}
    for _ in range(2):
        each(step, ROW, tmp_path, models, watch=watch)
    assert (watch.meter.sent, watch.meter.replayed) == (2, 2)


@pytest.mark.parametrize(
    ("reply", "error", "reason"),
    [
        (Reply(text=""), Unparsable, "empty"),
        (Reply(text=" \n\t\u3000"), Unparsable, "empty"),
        (Reply(text="", reasoning="I thought", finish_reason="length"), Truncated, "length"),
        (Reply(text="a\x00b"), Unparsable, "not_text"),
        (Reply(text="x", finish_reason="content_filter"), Refused, "content_filter"),
    ],
)
def test_what_is_no_answer_is_an_error_with_its_reason(reply, error, reason):
    with pytest.raises(error) as caught:
        read(reply, "m", "{}")
    assert (caught.value.reason, caught.value.raw) == (reason, reply.text or reply.reasoning)


def test_an_answer_keeps_its_spaces():
    assert read(Reply(text="  indented\n"), "m", "{}").text == "  indented\n"


def test_a_request_that_the_endpoint_calls_bad_is_a_rows_own_failure(tmp_path):
    with Endpoint() as server:
        models = {"m": served(server.url, "m", extra_body={"max_tokens": -1})}
        with pytest.raises(Unanswered, match="too_few_answers"):
            each(Respond(models=("m",)), ROW, tmp_path, models)
