"""Every way in which one attempt can fail, and what is done about it, over HTTP.

One table for the kinds: what arrives, how many requests are sent, what the ledger says of them.
"""

import itertools
import json
import time

import pytest
from aiohttp import web
from endpoint import Endpoint
from models_kit import answer, answers, attempts, entries, openai, outcomes, say, sends, server

from datakit.errors import EndpointError, InputError, Refused, RowError, Unanswered
from datakit.models.chat import Ask
from datakit.models.faults import POLICIES, fault_of, wait_s_of
from datakit.models.specs import Price
from datakit.session import Watch

TRIES = 3
TRIED_AGAIN = {kind for kind, policy in POLICIES.items() if policy.again}
STOPS = {kind for kind, policy in POLICIES.items() if policy.stops}
BILLED = {"timeout", "cut", "malformed_body"}


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    monkeypatch.setattr("datakit.models.openai._FIRST_WAIT_S", 0.001)
    monkeypatch.setattr("datakit.models.limits._LONGEST_OUT_S", 0.01)


def met(folder, url, kind, requests, **spec):
    """Ask once at `url` and hold what comes of it against the policy of `kind`."""
    watch = Watch()
    price = Price(input=1e5, output=1e5)
    fields = {"retries": TRIES - 1, "timeout_s": 0.15 if kind == "timeout" else 20, "price": price}
    with pytest.raises((RowError, EndpointError)) as caught:
        answer(folder, openai(url, **fields | spec), say(), watch=watch)
    error = caught.value
    tries = TRIES if kind in TRIED_AGAIN else 1
    if kind in STOPS:
        assert type(error) is EndpointError
    else:
        assert type(error) is (Refused if kind == "content_filter" else Unanswered)
        assert error.reason == kind
        assert error.transient is (kind != "content_filter")
        assert error.detail.endswith(f"after {TRIES} tries") is (kind in TRIED_AGAIN)
    assert requests() == tries
    assert outcomes(folder) == [kind] * tries
    assert entries(folder) == []
    # What may have been billed is charged by estimate, and nothing else is.
    paid = attempts(folder)
    assert {one.usd > 0 for one in paid} == {kind in BILLED}
    assert {one.input_tokens + one.output_tokens > 0 for one in paid} == {kind in BILLED}
    assert watch.meter.failed == tries
    assert watch.meter.usd == watch.meter.wasted_usd == pytest.approx(sum(one.usd for one in paid))
    return error


KNOBS = {
    "rate_limited": {"p429": 1, "retry_after": 0},
    "overloaded": {"p503": 1, "retry_after": 0},
    "server_error": {"p500": 1},
    "timeout": {"phang": 1},
    "cut": {"pcut": 1},
    "malformed_body": {"pbad": 1},
    "authentication": {"key": "sk-right"},
    "unknown_model": {"models": ("known",)},
    "content_filter": {"prefuse": 1},
}


@pytest.mark.parametrize("kind", KNOBS)
def test_each_fault_of_an_endpoint_has_its_policy(tmp_path, kind):
    with Endpoint(**KNOBS[kind]) as endpoint:
        error = met(tmp_path, endpoint.url, kind, lambda: endpoint.stats()["requests"])
    assert endpoint.url in str(error)


STATUSES = {
    301: "redirected",
    307: "redirected",
    400: "bad_request",
    401: "authentication",
    402: "payment",
    403: "authentication",
    404: "unknown_model",
    405: "bad_request",
    408: "server_error",
    409: "server_error",
    413: "bad_request",
    422: "bad_request",
    429: "rate_limited",
    500: "server_error",
    502: "server_error",
    503: "overloaded",
    504: "server_error",
    529: "overloaded",
    204: "malformed_body",
    200: "malformed_body",
}


@pytest.mark.parametrize("status", STATUSES)
def test_each_status_is_a_fault_of_one_kind(tmp_path, status):
    headers = {"Location": "https://elsewhere.example/v1"} if status in (301, 307) else None
    handler = sends(b"<p>Something is wrong.</p>", status=status, headers=headers)
    with server(handler) as url:
        error = met(tmp_path, url, STATUSES[status], lambda: len(handler.seen))
    if headers:
        assert "'https://elsewhere.example/v1': give that as base_url" in str(error)
    elif status >= 300:
        assert "Something is wrong." in str(error)


def test_all_kinds_are_tried():
    elsewhere = {"connection", "exhausted"}
    assert POLICIES.keys() == KNOBS.keys() | set(STATUSES.values()) | elsewhere


def test_an_endpoint_that_is_gone_leaves_the_row_unanswered(tmp_path):
    with Endpoint() as endpoint:
        pass
    error = met(tmp_path, endpoint.url, "connection", lambda: TRIES)
    assert "Cannot connect" in error.detail


@pytest.mark.parametrize("said", ["blocked by the content filter", "violates our content policy"])
def test_a_request_that_a_filter_blocks_is_refused(tmp_path, said):
    handler = sends(json.dumps({"error": {"message": said}}).encode(), status=400)
    with server(handler) as url:
        met(tmp_path, url, "content_filter", lambda: len(handler.seen))


def test_a_request_that_the_endpoint_calls_bad_is_asked_once_and_again_by_the_next_run(tmp_path):
    for run in (1, 2):
        with Endpoint() as endpoint:
            with pytest.raises(Unanswered, match=r"answers 400: .*no stream") as caught:
                answer(tmp_path, openai(endpoint.url, retries=5), say(extra_body={"stream": True}))
            assert endpoint.stats()["requests"] == 1
        assert caught.value.reason == "bad_request"
        assert outcomes(tmp_path) == ["bad_request"] * run


# Healed


@pytest.mark.parametrize("knob", ["p500", "p429", "p503", "pbad", "phang", "pcut"])
@pytest.mark.parametrize("ask", [say, lambda text: Ask(prefix=text)], ids=["chat", "prefix"])
def test_a_passing_fault_is_healed_by_a_further_try(tmp_path, knob, ask):
    asks = [ask(f"question {number}") for number in range(6)]
    watch = Watch()
    with Endpoint(**{knob: 0.4}, retry_after=0) as endpoint:
        spec = openai(endpoint.url, retries=30, timeout_s=0.2)
        healed = answers(tmp_path / "healed", spec, asks, watch=watch)
        failed = endpoint.stats()["errors"][knob]
        endpoint.set(**{knob: 0})
        assert healed == answers(tmp_path / "well", spec, asks)
    assert watch.meter.failed == failed > 0
    assert outcomes(tmp_path / "healed").count("ok") == 6


def fails_first(*statuses, headers=None):
    """A handler that sends these statuses in turn, and then answers."""
    left = iter(statuses)

    async def handler(request):
        status = next(left, None)
        if status is None:
            said = {"choices": [{"message": {"content": "well"}, "finish_reason": "stop"}]}
            return web.json_response(said)
        return web.Response(status=status, headers=headers)

    return handler


def test_attempts_stand_in_the_ledger_in_their_order(tmp_path):
    with server(fails_first(500, 429, 503, 408)) as url:
        assert answer(tmp_path, openai(url, retries=4), say()).text == "well"
    expected = ["server_error", "rate_limited", "overloaded", "server_error", "ok"]
    assert outcomes(tmp_path) == expected
    assert len({one.key for one in attempts(tmp_path)}) == 1


def test_the_last_fault_names_what_is_left_unanswered(tmp_path):
    with server(fails_first(500, 500, 429)) as url, pytest.raises(Unanswered) as caught:
        answer(tmp_path, openai(url, retries=2), say())
    assert caught.value.reason == "rate_limited"


@pytest.mark.parametrize("ours_s", [0.001, 30.0])
@pytest.mark.parametrize("status", [429, 503, 500])
def test_retry_after_is_honoured_over_a_wait_of_our_own(tmp_path, monkeypatch, status, ours_s):
    monkeypatch.setattr("datakit.models.openai._FIRST_WAIT_S", ours_s)
    began = time.monotonic()
    with server(fails_first(status, headers={"Retry-After": "0.2"})) as url:
        answer(tmp_path, openai(url, retries=1), say())
    assert 0.2 <= time.monotonic() - began < 5


def test_the_waits_double_and_have_a_bound(tmp_path, monkeypatch):
    monkeypatch.setattr("datakit.models.openai._FIRST_WAIT_S", 0.02)
    monkeypatch.setattr("datakit.models.openai._LONGEST_WAIT_S", 0.08)
    with server(sends(status=500)) as url, pytest.raises(Unanswered):
        answer(tmp_path, openai(url, retries=6), say())
    times = [one.at for one in attempts(tmp_path)]
    waits = [after - before for before, after in itertools.pairwise(times)]
    for wait_s, least_s in zip(waits, (0.01, 0.02, 0.04, 0.04, 0.04, 0.04), strict=True):
        assert least_s <= wait_s < 2 * least_s + 0.1


# What is read out of a refusal


@pytest.mark.parametrize(
    ("headers", "wait_s"),
    [
        ({}, None),
        ({"Retry-After": "2"}, 2.0),
        ({"Retry-After": "0.5"}, 0.5),
        ({"Retry-After": "-3"}, 0.0),
        ({"Retry-After": ""}, None),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0),
        ({"retry-after-ms": "250"}, 0.25),
        ({"retry-after-ms": "250", "Retry-After": "9"}, 0.25),
        ({"retry-after-ms": "soon", "Retry-After": "9"}, 9.0),
    ],
)
def test_how_long_an_endpoint_asks_to_be_left_alone(headers, wait_s):
    assert wait_s_of(headers) == wait_s


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b'{"error": {"message": "too long", "code": "context"}}', "too long (context)"),
        (b'{"error": {"message": "too long", "code": null}}', "too long"),
        (b'{"error": "too long"}', '{"error": "too long"}'),
        (b'{"detail": "too long"}', '{"detail": "too long"}'),
        (b"[]", "[]"),
        (b"", ""),
        (b"\xff\xfe", "\ufffd\ufffd"),
        (b"[" * 100_000, "[" * 199 + "…"),
        (b"a\n\x1b[31mred" + b"\x00", "a \\x1b[31mred\\x00"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_what_an_error_body_says_is_one_safe_line(raw, said):
    fault = fault_of(400, {}, raw, "http://x/v1", "m", "")
    assert str(fault) == f"http://x/v1 answers 400: {said}"


SECRET = "sk-planted-0123456789"


@pytest.mark.parametrize("status", [*(s for s in STATUSES if s >= 400), 418])
@pytest.mark.parametrize(
    "raw",
    [
        json.dumps({"error": {"message": f"bad key {SECRET}", "code": SECRET}}).encode(),
        json.dumps({"error": {"message": {"key": SECRET}}}).encode(),
        f"Authorization: Bearer {SECRET}".encode(),
        b"x" * 190 + SECRET.encode(),
    ],
)
def test_an_endpoint_that_repeats_the_key_is_not_repeated(status, raw):
    assert "sk-pl" not in str(fault_of(status, {}, raw, "http://x/v1", "m", SECRET))


LEAKS = {
    "in the address of a redirect": (302, b"", {"Location": f"https://x.example/?key={SECRET}"}),
    "in a body that is no completion": (200, b'{"seen": "Bearer %s"}' % SECRET.encode(), None),
    "cut where an error body is cut": (400, b" " * 985 + SECRET.encode(), None),
}


@pytest.mark.parametrize("where", LEAKS)
def test_a_key_that_comes_back_elsewhere_is_not_repeated(tmp_path, monkeypatch, where):
    status, body, headers = LEAKS[where]
    monkeypatch.setenv("MY_KEY", SECRET)
    spec = {"api_key_env": "MY_KEY"}
    with (
        server(sends(body, status=status, headers=headers)) as url,
        pytest.raises((RowError, EndpointError)) as caught,
    ):
        answer(tmp_path, openai(url, **spec), say())
    assert "sk-pl" not in str(caught.value)


def test_a_key_with_a_line_break_is_an_input_error_that_names_the_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-one\nsk-two")
    with Endpoint() as endpoint:
        with pytest.raises(InputError, match="MY_KEY") as caught:
            answers(tmp_path, openai(endpoint.url, api_key_env="MY_KEY"), [say()])
        assert endpoint.stats()["requests"] == 0
    assert "sk-one" not in str(caught.value)


@pytest.mark.parametrize(
    ("headers", "body", "kind"),
    [
        ({"Retry-After": "86400"}, b"", "exhausted"),
        ({"Retry-After": "Wed, 21 Oct 2099 07:28:00 GMT"}, b"", "exhausted"),
        ({}, b'{"error": {"message": "no", "code": "insufficient_quota"}}', "payment"),
        ({"Retry-After": "60"}, b"", "rate_limited"),
    ],
)
def test_a_limit_that_no_run_should_wait_out_stops_it(headers, body, kind):
    fault = fault_of(429, headers, body, "http://x/v1", "m", "")
    assert fault.kind == kind
    assert isinstance(fault.error(1), EndpointError) == (kind != "rate_limited")


@pytest.mark.parametrize("status", [400, 403])
def test_a_flagged_input_is_the_rows_own(status):
    raw = b'{"error": {"message": "Your input was flagged by moderation"}}'
    assert fault_of(status, {}, raw, "http://x/v1", "m", "").kind == "content_filter"
