"""The endpoint that other tests lean on: its faults, limits, answers, scores and batches."""

import asyncio
import io
import json
import re
import subprocess
import sys
import urllib.request
from pathlib import Path

import aiohttp
import jsonschema
import openai
import pytest
from endpoint import Endpoint

VERDICT = {
    "type": "object",
    "properties": {
        "reason": {"type": "string"},
        "verdict": {"type": "string", "enum": ["A", "B", "tie"]},
        "sure": {"type": "boolean"},
    },
    "required": ["reason", "verdict", "sure"],
    "additionalProperties": False,
}
RICH = {
    "type": "object",
    "properties": {
        "kind": {"$ref": "#/$defs/Kind"},
        "score": {"type": "integer", "minimum": 1, "maximum": 5},
        "share": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
        "names": {"type": "array", "items": {"type": "string", "minLength": 300}, "minItems": 2},
        "short": {"type": "string", "maxLength": 4},
        "maybe": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
    },
    "required": ["kind", "score", "share", "names", "short", "maybe"],
    "additionalProperties": False,
    "$defs": {"Kind": {"enum": ["x", "y", "z"]}},
}


def user(text):
    return [{"role": "user", "content": text}]


def chat(text="What is 1 + 1?", **more):
    return {"model": "any", "messages": user(text), **more}


def enforced(schema):
    wanted = {"name": "answer", "schema": schema, "strict": True}
    return {"type": "json_schema", "json_schema": wanted}


def sent(endpoint, *bodies, path="/chat/completions", key=None):
    """Status, headers and body of the reply to each body, asked one after the other."""

    async def ask():
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        found = []
        async with aiohttp.ClientSession(headers=headers) as session:
            for body in bodies:
                async with session.post(endpoint.url + path, json=body) as reply:
                    found.append((reply.status, reply.headers, await reply.json()))
        return found

    return asyncio.run(ask())


def text_of(reply):
    choice = reply[2]["choices"][0]
    return choice["message"]["content"] if "message" in choice else choice["text"]


@pytest.fixture
def client():
    """Opens real clients, and closes them."""
    opened = []

    def connect(endpoint, api_key="x"):
        opened.append(openai.OpenAI(base_url=endpoint.url, api_key=api_key, max_retries=0))
        return opened[-1]

    yield connect
    for one in opened:
        one.close()


# Faults


@pytest.mark.parametrize(
    ("fault", "text", "finish"),
    [("pempty", "", "stop"), ("pfilter", "", "content_filter"), ("plength", "one tw", "length")],
)
def test_a_spoilt_answer_is_a_200_that_is_counted_under_its_knob(fault, text, finish):
    with Endpoint(**{fault: 1}, reply=lambda body: "one two three") as endpoint:
        (reply,) = sent(endpoint, chat())
        stats = endpoint.stats()
    assert (reply[0], text_of(reply)) == (200, text)
    assert reply[2]["choices"][0]["finish_reason"] == finish
    assert reply[2]["usage"]["completion_tokens"] == len(text.split())
    assert stats["errors"] == {fault: 1}


@pytest.mark.parametrize(
    ("fault", "status", "code"), [("prefuse", 400, "content_filter"), ("p503", 503, "overloaded")]
)
def test_a_refusal_has_its_status_and_code(fault, status, code):
    with Endpoint(**{fault: 1}, retry_after=1.5) as endpoint:
        ((found, headers, body),) = sent(endpoint, chat())
    assert (found, body["error"]["code"]) == (status, code)
    assert headers.get("Retry-After") == ("1.5" if fault == "p503" else None)


def test_a_fault_is_a_function_of_body_and_attempt_and_the_shares_sum_to_one_at_most():
    def statuses():
        with Endpoint(p503=0.3, prefuse=0.3, seed=3) as endpoint:
            return [r[0] for r in sent(endpoint, *[chat(str(n % 10)) for n in range(40)])]

    assert statuses() == statuses()
    assert set(statuses()) == {200, 400, 503}
    with pytest.raises(ValueError, match="more than 1"):
        Endpoint(p500=0.5, pempty=0.6)


@pytest.mark.parametrize("told", ["enforced", "in the text"])
def test_an_invalid_answer_misses_the_schema_until_it_is_repaired(told):
    def body(text):
        if told == "enforced":
            return chat(text, response_format=enforced(RICH))
        return chat(f"{text} Fit this JSON schema, and nothing else:\n{json.dumps(RICH)}")

    with Endpoint(pinvalid=1) as endpoint:
        bad = sent(endpoint, *[body(str(n)) for n in range(20)])
        values = [json.loads(text_of(reply)) for reply in bad]
        assert all(not jsonschema.Draft202012Validator(RICH).is_valid(value) for value in values)
        assert len({json.dumps(value) for value in values}) > 3
        again = body("1")
        again["messages"] += [{"role": "assistant", "content": "{}"}, *user("That does not fit.")]
        plain = chat("no such thing is asked")
        mended, words = map(text_of, sent(endpoint, again, plain))
        jsonschema.validate(json.loads(mended), RICH)
        assert re.fullmatch(r"[A-Z][a-z ]+\. [A-Z][a-z ]+\.", words)
        assert endpoint.stats()["errors"] == {"pinvalid": 20}


# Limits


def test_tokens_a_minute_are_charged_with_prompt_and_answer():
    with Endpoint(tpm=10, reply=lambda body: "one two") as endpoint:
        good, bad = sent(endpoint, chat("1 2 3 4"), chat("1 2 3"))
        assert good[1]["x-ratelimit-limit-tokens"] == "10"
        assert good[1]["x-ratelimit-remaining-tokens"] == "4"
        assert re.fullmatch(r"3\d\.\d+s", good[1]["x-ratelimit-reset-tokens"])
        assert (bad[0], bad[2]["error"]["code"]) == (429, "rate_limit_exceeded")
        assert 1 <= int(bad[1]["Retry-After"]) <= 6
        assert endpoint.stats()["errors"] == {"tpm": 1}


@pytest.mark.parametrize("quiet", [True, False])
def test_limits_may_be_kept_without_a_word(quiet):
    with Endpoint(rpm=2, tpm=1000, quiet_limits=quiet) as endpoint:
        replies = sent(endpoint, *[chat()] * 3)
    assert [status for status, *_ in replies] == [200, 200, 429]
    for _, headers, _ in replies:
        assert quiet != any(name.lower().startswith("x-ratelimit") for name in headers)
    assert int(replies[2][1]["Retry-After"]) > 0


# JSON


@pytest.mark.parametrize("told", ["enforced", "in the text"])
def test_json_that_is_asked_for_fits_its_schema_and_varies(told):
    named = f"Fit this JSON schema: {json.dumps(RICH)}"
    more = {"response_format": enforced(RICH)} if told == "enforced" else {}
    with Endpoint() as endpoint:
        bodies = [chat(f"{n} {'' if more else named}", **more) for n in range(30)]
        values = [json.loads(text_of(reply)) for reply in sent(endpoint, *bodies)]
    for value in values:
        jsonschema.validate(value, RICH)
    assert {value["kind"] for value in values} == {"x", "y", "z"}
    assert {value["score"] for value in values} == {1, 2, 3, 4, 5}


@pytest.mark.parametrize("form", [None, VERDICT])
def test_a_judge_prefers_the_same_text_in_both_orders(form):
    def asked(first, second):
        blocks = f"<answer_a>\n{first}\n</answer_a>\n<answer_b>\n{second}\n</answer_b>"
        more = {"response_format": enforced(form)} if form else {}
        return chat(f"{blocks}\nReply in JSON with reason and verdict.", **more)

    with Endpoint() as endpoint:
        pairs = [(f"left {n}", f"right {n}") for n in range(10)]
        there = sent(endpoint, *[asked(*pair) for pair in pairs])
        back = sent(endpoint, *[asked(*pair[::-1]) for pair in pairs])
    for one, other in zip(there, back, strict=True):
        values = [json.loads(text_of(reply)) for reply in (one, other)]
        assert {value["verdict"] for value in values} == {"A", "B"}
        for value in values if form else []:
            jsonschema.validate(value, form)


def test_the_real_client_parses_an_answer_into_a_model(client):
    with Endpoint() as endpoint:
        made = client(endpoint).chat.completions.create(
            model="any", messages=user("hi"), response_format=enforced(VERDICT)
        )
    jsonschema.validate(json.loads(made.choices[0].message.content), VERDICT)


# Scores


def test_an_echo_scores_the_prompt_token_by_token(client):
    prompt = "Once upon  a time,\n\tthere was — "
    with Endpoint() as endpoint:

        def scored(text, **more):
            made = client(endpoint).completions.create(
                model="any", prompt=text, echo=True, max_tokens=0, logprobs=2, **more
            )
            return made.choices

        (choice,) = scored(prompt)
        (longer,) = scored(f"{prompt}\nand so on")
        both = scored([prompt, "Another one"])
    found = choice.logprobs
    assert choice.text == prompt == "".join(found.tokens)
    for at, token in zip(found.text_offset, found.tokens, strict=True):
        assert prompt[at:].startswith(token)
    assert found.token_logprobs[0] is found.top_logprobs[0] is None
    assert all(-11 < value < 0 for value in found.token_logprobs[1:])
    for token, value, top in list(
        zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True)
    )[1:]:
        assert top[token] == value
        assert 2 <= len(top) <= 3
    # What stands before a token decides, what comes behind it does not.
    assert longer.logprobs.token_logprobs[1:5] == found.token_logprobs[1:5]
    assert [one.text for one in both] == [prompt, "Another one"]
    assert both[0].logprobs == found


def test_answers_carry_their_logprobs_in_both_shapes(client):
    with Endpoint(reply=lambda body: "one two three") as endpoint:
        connected = client(endpoint)
        made = connected.chat.completions.create(
            model="any", messages=user("hi"), logprobs=True, top_logprobs=3
        )
        content = made.choices[0].logprobs.content
        assert "".join(entry.token for entry in content) == "one two three"
        for entry in content:
            values = [top.logprob for top in entry.top_logprobs]
            assert len(values) == 3
            assert values == sorted(values, reverse=True)
            assert entry.logprob in values
            assert bytes(entry.bytes).decode() == entry.token
        text = connected.completions.create(model="any", prompt="hi ", logprobs=1)
        assert text.choices[0].logprobs.text_offset == [3, 6, 10]
        assert None not in text.choices[0].logprobs.token_logprobs
        echoed = connected.completions.create(model="any", prompt="hi ", echo=True, max_tokens=1)
        assert (echoed.choices[0].text, echoed.usage.completion_tokens) == ("hi one", 1)
        assert echoed.choices[0].logprobs is None


# Batches


def lines_of(*bodies, url="/v1/chat/completions"):
    lines = [
        {"custom_id": f"row-{number}", "method": "POST", "url": url, "body": body}
        for number, body in enumerate(bodies)
    ]
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def submitted(connected, data, url="/v1/chat/completions"):
    file = connected.files.create(file=("in.jsonl", io.BytesIO(data)), purpose="batch")
    return connected.batches.create(
        input_file_id=file.id, endpoint=url, completion_window="24h", metadata={"run": "1"}
    )


def told(connected, file_id):
    """The lines of a file, by custom_id."""
    if file_id is None:
        return {}
    found = [json.loads(line) for line in connected.files.content(file_id).text.splitlines()]
    assert len({line["custom_id"] for line in found}) == len(found)
    return {line["custom_id"]: line for line in found}


def test_a_batch_goes_through_its_states_and_answers_as_single_calls_do(client):
    bodies = [chat(f"number {number}") for number in range(30)]
    with Endpoint(batch_s=3600) as endpoint:
        made = submitted(client(endpoint), lines_of(*bodies))
        assert (made.status, made.metadata) == ("validating", {"run": "1"})
        # A client that comes later, as after a crash, finds it.
        later = client(endpoint)
        assert [batch.id for batch in later.batches.list()] == [made.id]
        assert later.batches.retrieve(made.id).status == "validating"
        endpoint.set(batch_s=0)
        done = later.batches.retrieve(made.id)
        assert (done.status, done.error_file_id) == ("completed", None)
        assert done.completed_at >= done.in_progress_at >= done.created_at
        counts = done.request_counts
        assert (counts.total, counts.completed, counts.failed) == (30, 30, 0)
        answers = told(later, done.output_file_id)
        assert list(answers) != sorted(answers, key=lambda name: int(name[4:]))
        singly = [reply for *_, reply in sent(endpoint, *bodies[:5])]
        for number, reply in enumerate(singly):
            line = answers[f"row-{number}"]
            assert (line["error"], line["response"]["status_code"]) == (None, 200)
            assert line["response"]["body"] == reply
        stats = endpoint.stats()
        names = ("requests", "ok", "files", "batches", "batch_requests", "distinct")
        assert [stats[name] for name in names] == [5, 5, 1, 1, 30, 30]
        assert (stats["answered_twice"], stats["sent_again_after_ok"]) == (5, 5)
        assert later.files.retrieve(done.output_file_id).purpose == "batch_output"
        assert later.files.delete(made.input_file_id).deleted
        with pytest.raises(openai.NotFoundError):
            later.files.content(made.input_file_id)
        assert [file.id for file in later.files.list()] == [done.output_file_id]


def test_a_batch_is_seen_at_work(client):
    with Endpoint(batch_s=0.4) as endpoint:
        connected, seen = client(endpoint), []
        made = submitted(connected, lines_of(*map(chat, "abcdefgh")))
        while not seen or seen[-1] != "completed":
            batch = connected.batches.retrieve(made.id)
            seen.append(batch.status)
            assert (batch.output_file_id is None) is (batch.status != "completed")
    assert list(dict.fromkeys(seen)) == ["validating", "in_progress", "completed"]


def test_a_fault_in_a_batch_is_a_line_of_its_error_file_and_heals_in_the_next(client):
    bodies = [chat(str(number)) for number in range(60)]
    shares = {"p500": 0.2, "p429": 0.2, "p503": 0.1, "prefuse": 0.1, "plength": 0.1, "pcut": 0.1}
    with Endpoint(**shares) as endpoint:
        connected = client(endpoint)
        done = connected.batches.retrieve(submitted(connected, lines_of(*bodies)).id)
        good, bad = told(connected, done.output_file_id), told(connected, done.error_file_id)
        assert done.status == "completed"
        assert {line["response"]["status_code"] for line in bad.values()} == {500, 429, 503, 400}
        assert {line["response"]["status_code"] for line in good.values()} == {200}
        choices = [line["response"]["body"]["choices"][0] for line in good.values()]
        assert {choice["finish_reason"] for choice in choices} == {"stop", "length"}
        errors = endpoint.stats()["batch_errors"]
        assert len(good) + len(bad) == 60 - errors["pcut"]
        assert (done.request_counts.completed, done.request_counts.total) == (len(good), 60)
        endpoint.set(**dict.fromkeys(shares, 0))
        again = submitted(connected, lines_of(*[bodies[int(name[4:])] for name in bad]))
        assert connected.batches.retrieve(again.id).request_counts.completed == len(bad)
        assert endpoint.stats()["answered_twice"] == 0


def test_half_an_answer_keeps_its_line(client):
    with Endpoint(pbad=1) as endpoint:
        connected = client(endpoint)
        done = connected.batches.retrieve(submitted(connected, lines_of(chat())).id)
        body = told(connected, done.output_file_id)["row-0"]["response"]["body"]
    with pytest.raises(ValueError):
        json.loads(body)


def test_a_batch_that_expires_names_what_it_left(client):
    bodies = [chat(str(number)) for number in range(40)]
    with Endpoint(pexpire=0.5) as endpoint:
        connected = client(endpoint)
        made = submitted(connected, lines_of(*bodies))
        done = connected.batches.retrieve(made.id)
        left, given = told(connected, done.error_file_id), told(connected, done.output_file_id)
        assert done.status == "expired"
        assert len(left) + len(given) == 40
        assert {line["error"]["code"] for line in left.values()} == {"batch_expired"}
        assert {line["response"] for line in left.values()} == {None}
        assert endpoint.stats()["batch_requests"] == len(given) < 40


def test_a_cancelled_batch_keeps_what_was_answered(client):
    with Endpoint(batch_s=0.4) as endpoint:
        connected = client(endpoint)
        made = submitted(connected, lines_of(*[chat(str(number)) for number in range(400)]))
        while not connected.batches.retrieve(made.id).request_counts.completed:
            pass
        endpoint.set(batch_s=3600)
        assert connected.batches.cancel(made.id).status == "cancelling"
        done = connected.batches.retrieve(made.id)
        assert done.status == "cancelled"
        assert 0 < len(told(connected, done.output_file_id)) == done.request_counts.completed < 400
        assert endpoint.stats()["batch_requests"] == done.request_counts.completed
        with pytest.raises(openai.BadRequestError):
            connected.batches.cancel(made.id)


GOOD = lines_of(chat(), chat("again"))


@pytest.mark.parametrize(
    ("data", "code", "line"),
    [
        (GOOD + b"{half\n", "invalid_json_line", 3),
        (GOOD + GOOD, "duplicate_custom_id", 3),
        (GOOD + lines_of(chat() | {"model": "other"}), "model_not_found", 3),
        (GOOD + lines_of(chat() | {"model": "more"}), "mismatched_model", 3),
        (GOOD + b'{"custom_id": "x"}\n', "missing_required_parameter", 3),
        (lines_of(chat(), url="/v1/elsewhere"), "invalid_url", 1),
        (lines_of(*map(chat, "abcdef")), "too_many_tasks", None),
        (b"", "empty_file", None),
    ],
)
def test_a_file_that_is_wrong_fails_its_batch(client, data, code, line):
    with Endpoint(models=("any", "more"), batch_limit=5) as endpoint:
        connected = client(endpoint)
        made = submitted(connected, data)
        done = connected.batches.retrieve(made.id)
        assert (made.status, done.status) == ("validating", "failed")
        assert (code, line) in [(error.code, error.line) for error in done.errors.data]
        assert endpoint.stats()["batch_requests"] == 0


def test_completions_are_scored_in_batches_too(client):
    body = {"model": "any", "prompt": "a b", "echo": True, "max_tokens": 0, "logprobs": 0}
    with Endpoint() as endpoint:
        connected, url = client(endpoint), "/v1/completions"
        done = connected.batches.retrieve(submitted(connected, lines_of(body, url=url), url).id)
        line = told(connected, done.output_file_id)["row-0"]
    assert line["response"]["body"]["choices"][0]["logprobs"]["tokens"] == ["a", " b"]


def test_every_route_asks_for_the_key(client):
    with Endpoint(key="sk-right") as endpoint:
        right, wrong = client(endpoint, "sk-right"), client(endpoint, "sk-wrong")
        made = submitted(right, GOOD)
        for refused in (
            lambda: submitted(wrong, GOOD),
            lambda: wrong.batches.create(
                input_file_id=made.input_file_id,
                endpoint="/v1/chat/completions",
                completion_window="24h",
            ),
            lambda: wrong.batches.retrieve(made.id),
            lambda: wrong.batches.cancel(made.id),
            wrong.batches.list,
            wrong.files.list,
            lambda: wrong.files.content(made.input_file_id),
            lambda: wrong.files.delete(made.input_file_id),
            wrong.models.list,
            lambda: wrong.chat.completions.create(model="any", messages=user("hi")),
        ):
            with pytest.raises(openai.AuthenticationError):
                refused()
        assert right.batches.retrieve(made.id).status == "completed"
        assert endpoint.stats()["files"] == 1


# The short way


def test_the_short_way_answers_as_the_long_one_and_keeps_nothing_of_a_body(client):
    bodies = [chat(str(number), max_tokens=5) for number in range(20)]
    with Endpoint() as long_way, Endpoint(per_body=False) as short:
        assert [r[2] for r in sent(long_way, *bodies)] == [r[2] for r in sent(short, *bodies)]
        stats = short.stats(bodies=True)
        assert (stats["requests"], stats["ok"], stats["connections"]) == (20, 20, 1)
        assert stats["bodies"] == {}
        # A body may come in pieces, be wrong, or be told in another way.
        made = client(short).chat.completions.create(model="any", messages=user("é" * 200_000))
        assert made.choices[0].finish_reason == "stop"
        assert sent(short, chat(stream=True))[0][0] == 400
        short.set(p500=1)
        assert [status for status, *_ in sent(short, *bodies[:3])] == [500] * 3
        short.set(p500=0)
        assert short.stats()["errors"] == {"bad_request": 1, "p500": 3}
        assert short.stats()["ok"] == 21


def test_a_connection_leaves_the_short_way_when_something_is_to_befall_it():
    async def ask(endpoint):
        found = []
        async with aiohttp.ClientSession() as session:
            for share in (0, 1, 0):
                endpoint.set(p500=share)
                async with session.post(f"{endpoint.url}/chat/completions", json=chat()) as reply:
                    found.append(reply.status)
            async with session.get(f"{endpoint.url}/models") as reply:
                found.append(reply.status)
        return found

    with Endpoint(per_body=False) as endpoint:
        assert asyncio.run(ask(endpoint)) == [200, 500, 200, 200]
        stats = endpoint.stats()
        assert (stats["connections"], stats["requests"], stats["in_flight"]) == (1, 3, 0)


def test_the_program_takes_knobs_and_says_where_it_serves():
    path = Path(__file__).with_name("endpoint.py")
    options = ["--port", "0", "--p500", "1", "--batch-s", "2", "--quiet-limits", "--no-per-body"]
    command = [sys.executable, path, *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as program:
        word, url = program.stdout.readline().split()
        with urllib.request.urlopen(f"{url.removesuffix('/v1')}/stats") as reply:
            knobs = json.load(reply)["knobs"]
        program.terminate()
    assert word == "ready"
    assert (knobs["p500"], knobs["batch_s"], knobs["quiet_limits"]) == (1, 2, True)
    assert knobs["per_body"] is False
