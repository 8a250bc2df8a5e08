"""What a run may spend: no cap is passed, by several processes together neither, and none hangs."""

import asyncio
import multiprocessing
import os
import random
import signal
import tempfile
import time
from pathlib import Path

import pytest
from endpoint import Endpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from models_kit import answers, attempts, openai, say, sends, server
from pydantic import ValidationError

import datakit as dk
from datakit.errors import InputError, Pending, Stopped
from datakit.models.book import Book, Meter
from datakit.models.budget import Allowance, Budget, scopes, spent
from datakit.models.chat import Reply, request_of
from datakit.models.ledger import Ledger
from datakit.models.specs import Price

WHOSE = {"run": "this run", "day": "this day", "month": "this month", "total": "all runs"}
PER = tuple(WHOSE)


@pytest.fixture
def ledger(tmp_path):
    with Ledger.opened(tmp_path) as ledger:
        yield ledger


def in_loop(work, within_s=20):
    """Run a coroutine function to its end, which must come soon."""
    return asyncio.run(asyncio.wait_for(work(), within_s))


def of(allowance, tokens, usd, number):
    """A request and its reply, written down through a book and charged to the allowance."""
    book = Book(allowance._ledger, Meter(), "recipe", "run-1", allowance)
    request = request_of(openai(), "m", say(f"{number}"))
    return book.write("m", request, Reply(text="x", output_tokens=tokens), (0, tokens), usd)


def leased(ledger, scope):
    """Dollars and tokens that all processes have leased."""
    rows = "SELECT COALESCE(SUM(usd), 0), COALESCE(SUM(tokens), 0) FROM leases WHERE scope = ?"
    return ledger.db.execute(rows, (scope,)).fetchone()


# The allowance


SIXTEENTHS = st.integers(0, 16).map(lambda number: number / 16)


@settings(max_examples=60, deadline=None)
@given(
    cap=st.integers(0, 40).map(lambda number: number / 8),
    caps_tokens=st.booleans(),
    wants=st.lists(st.tuples(SIXTEENTHS, SIXTEENTHS), min_size=1, max_size=25),
    seed=st.integers(0, 2**16),
)
def test_what_is_spent_and_held_never_passes_the_cap(cap, caps_tokens, wants, seed):
    """Two allowances on one ledger; each request holds `want` and costs `share` of it."""
    rng = random.Random(seed)
    tokens = int(cap * 16)
    budget = Budget(max_tokens=tokens) if caps_tokens else Budget(max_usd=cap)
    scope = scopes("recipe", "run-1", time.time())["run"]

    async def work():
        with tempfile.TemporaryDirectory() as folder:
            ledgers = [Ledger(Path(folder)) for _ in range(2)]
            shares = [Allowance(budget, one, "recipe", "run-1") for one in ledgers]
            held = used = 0.0

            async def one(number, want, share):
                nonlocal held, used
                allowance = shares[number % 2]
                whole = (want, want * 16)
                cost = (want * share, int(want * share * 16))
                try:
                    await allowance.hold(*whole)
                except Pending:
                    return
                held += want
                assert held + used <= cap
                for _ in range(rng.randrange(4)):
                    await asyncio.sleep(0)
                await of(allowance, cost[1], cost[0], number)
                held, used = held - want, used + (cost[1] / 16 if caps_tokens else cost[0])
                allowance.settle(whole, (cost[0], float(cost[1])))
                together = (
                    spent(ledgers[0], scope)[caps_tokens] + leased(ledgers[0], scope)[caps_tokens]
                )
                assert together <= (tokens if caps_tokens else cap)

            await asyncio.gather(*(one(n, *pair) for n, pair in enumerate(wants)))
            for allowance in shares:
                allowance.close()
            assert leased(ledgers[0], scope) == (0, 0)
            assert spent(ledgers[0], scope)[caps_tokens] == (used * 16 if caps_tokens else used)
            # What is left can be had by another.
            fresh = Allowance(budget, ledgers[0], "recipe", "run-1")
            await fresh.hold(cap - used, (cap - used) * 16)
            for one_ledger in ledgers:
                one_ledger.close()

    in_loop(work)


def test_who_asks_for_more_than_is_left_waits_for_what_is_under_way(ledger):
    async def work():
        allowance = Allowance(Budget(max_usd=1), ledger, "recipe", "run-1")
        await allowance.hold(0.75, 0)
        waiting = asyncio.create_task(allowance.hold(0.5, 0))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        # It cost less than was held back for it.
        await of(allowance, 1, 0.25, "one")
        allowance.settle((0.75, 0), (0.25, 1))
        await waiting
        waiting = asyncio.create_task(allowance.hold(0.5, 0))
        await asyncio.sleep(0.01)
        await of(allowance, 1, 0.5, "two")
        allowance.settle((0.5, 0), (0.5, 1))
        with pytest.raises(Pending, match=r"\$1\.00 for this run is spent \(\$0\.75"):
            await waiting
        assert allowance.is_spent
        with pytest.raises(Pending):
            await allowance.hold(0.3, 0)

    in_loop(work)


def test_no_one_waits_where_nothing_is_under_way(ledger):
    async def work():
        allowance = Allowance(Budget(max_usd=1), ledger, "recipe", "run-1")
        for usd in (0.1, 0.2, 0.3):
            await allowance.hold(usd, 1)
        for usd in (0.1, 0.2, 0.3):
            allowance.settle((usd, 1), (0.0, 0.0))
        with pytest.raises(Pending):
            await allowance.hold(2.0, 1)

    in_loop(work, 1)


@pytest.mark.parametrize("per", PER)
def test_a_cap_is_for_a_run_a_day_a_month_or_all_runs(ledger, per):
    async def work():
        one = Allowance(Budget(max_usd=1, per=per), ledger, "recipe", "run-1")
        await one.hold(1, 0)
        await of(one, 1, 1.0, "one")
        one.settle((1, 0), (1.0, 1))
        one.close()
        with pytest.raises(Pending, match=f"for {WHOSE[per]}"):
            await one.hold(0.1, 0)
        other_run = Allowance(Budget(max_usd=1, per=per), ledger, "recipe", "run-2")
        if per == "run":
            await other_run.hold(1, 0)
        else:
            with pytest.raises(Pending):
                await other_run.hold(0.1, 0)
        other_recipe = Allowance(Budget(max_usd=1, per=per), ledger, "another", "run-1")
        await other_recipe.hold(1, 0)

    in_loop(work)


def test_scopes_follow_the_calendar_of_utc():
    at = 1_735_689_599  # the last second of 2024
    before, after = scopes("r", "1", at), scopes("r", "1", at + 1)
    assert (before["day"], before["month"]) == ("r day 2024-12-31", "r month 2024-12")
    assert (after["day"], after["month"]) == ("r day 2025-01-01", "r month 2025-01")
    assert (before["run"], before["total"]) == (after["run"], after["total"])


@pytest.mark.parametrize("wrong", [{"max_usd": -1}, {"max_tokens": -1}, {"max_usd": float("nan")}])
def test_a_cap_is_a_number_not_below_nothing(wrong):
    with pytest.raises(ValidationError):
        Budget(**wrong)


# Several processes


def spends(folder, name, barrier, found):
    """Ask for cents until nothing is left."""

    async def work():
        with Ledger.opened(folder) as ledger:
            allowance = Allowance(Budget(max_usd=2, per="total"), ledger, "recipe", name)
            barrier.wait(60)
            count = 0
            try:
                while True:
                    await allowance.hold(0.03125, 10)
                    await of(allowance, 5, 0.015625, f"{name} {count}")
                    allowance.settle((0.03125, 10), (0.015625, 5))
                    count += 1
            except Pending:
                allowance.close()
                return count

    found.put(asyncio.run(work()))


def test_processes_together_stay_below_one_cap(tmp_path, ledger):
    context = multiprocessing.get_context("spawn")
    barrier, found = context.Barrier(2), context.Queue()
    workers = [
        context.Process(target=spends, args=(tmp_path, name, barrier, found), daemon=True)
        for name in "ab"
    ]
    for worker in workers:
        worker.start()
    counts = [found.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    usd, tokens = spent(ledger, "recipe total")
    assert leased(ledger, "recipe total") == (0, 0)
    assert usd == sum(counts) * 0.015625
    assert tokens == sum(counts) * 5
    assert 1.8 <= usd <= 2


def holds_and_hangs(folder, held):
    async def work():
        with Ledger.opened(folder) as ledger:
            await Allowance(Budget(max_usd=1), ledger, "recipe", "run-1").hold(1, 0)
            held.set()
            await asyncio.sleep(60)

    asyncio.run(work())


def test_what_a_killed_process_had_leased_is_free_again(tmp_path, ledger):
    context = multiprocessing.get_context("spawn")
    held = context.Event()
    worker = context.Process(target=holds_and_hangs, args=(tmp_path, held), daemon=True)
    worker.start()
    assert held.wait(60)

    async def work():
        with pytest.raises(Pending):
            await Allowance(Budget(max_usd=1), ledger, "recipe", "run-1").hold(0.5, 0)
        os.kill(worker.pid, signal.SIGKILL)
        worker.join()
        await Allowance(Budget(max_usd=1), ledger, "recipe", "run-1").hold(1, 0)

    in_loop(work)


# Over the wire


CENT = Price(input=1e4, output=1e4)  # a token
PRICED = {"price": CENT, "sampling": {"max_tokens": 3}}


def test_what_cannot_be_paid_for_is_not_sent(tmp_path):
    with Endpoint() as endpoint:
        found = answers(
            tmp_path,
            openai(endpoint.url, **PRICED),
            [say(f"question {number}") for number in range(10)],
            budget=Budget(max_usd=0.5),
        )
        assert endpoint.stats()["requests"] == 0
    assert [(type(one), one.reason) for one in found] == [(Pending, "budget")] * 10
    assert "the budget of $0.50 for this run is spent ($0.0000, 0 tokens)" in str(found[0])


@pytest.mark.parametrize(("budget"), [Budget(max_usd=4.0), Budget(max_tokens=400)])
def test_a_cap_holds_to_the_last_request_and_what_fits_below_it_is_answered(tmp_path, budget):
    asks = [say(f"question {number}") for number in range(200)]
    with Endpoint(latency="fixed:0.005", p500=0.05) as endpoint:
        found = answers(tmp_path, openai(endpoint.url, **PRICED, retries=9), asks, budget=budget)
        stats = endpoint.stats()
    replies = [one for one in found if isinstance(one, Reply)]
    assert {type(one) for one in found} == {Reply, Pending}
    assert stats["ok"] == len(replies)
    paid = sum(one.input_tokens + one.output_tokens for one in attempts(tmp_path))
    assert 0.9 * 400 <= paid <= 400


def test_a_cap_of_what_is_enough_stops_nothing(tmp_path):
    asks = [say(f"question {number}") for number in range(30)]
    with Endpoint() as endpoint:
        spec = openai(endpoint.url, **PRICED)
        found = answers(tmp_path, spec, asks, budget=Budget(max_usd=90, max_tokens=9_000))
    assert {type(one) for one in found} == {Reply}


def test_a_cap_holds_at_an_endpoint_that_counts_no_tokens(tmp_path):
    handler = sends(b'{"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}]}')
    asks = [say(f"question {number}") for number in range(40)]
    with server(handler) as url:
        spec = openai(url, **PRICED)
        found = answers(tmp_path, spec, asks, budget=Budget(max_tokens=300))
    assert Pending in {type(one) for one in found}


def recipe(url, rows=200, model=None, **fields):
    spec = {"kind": "openai", "model": "any", "base_url": url, "price": CENT.model_dump()}
    spec |= {"sampling": {"max_tokens": 3}, "max_in_flight": 16} | (model or {})
    steps = [{"step": "toys.numbers", "rows": rows}, {"step": "toys.answer"}]
    return {"name": "capped", "rows_per_part": 20, "models": {"m": spec}, "steps": steps} | fields


def run(folder, recipe, **more):
    return dk.run(recipe, outputs=folder / "outputs", state=folder / "state", **more)


def paid(folder):
    return sum(one.usd for one in attempts(folder) if one.outcome != "replayed")


def test_a_whole_run_stops_at_its_cap_and_the_next_sends_nothing_again(tmp_path):
    with Endpoint(latency="fixed:0.005", reply=lambda body: "two words") as endpoint:
        capped = recipe(endpoint.url)
        with pytest.raises(Stopped, match=r"the budget of \$4\.00 for this run is spent"):
            run(tmp_path, capped, max_usd=4)
        assert 0.9 * 4 <= paid(tmp_path) <= 4 * 1.02
        answered = endpoint.stats()["ok"]
        assert 0 < answered < 200
        assert not (tmp_path / "outputs" / "datasets" / "capped" / "versions").exists()
        # The cap is for one run, so the next goes on where this one stopped.
        version = run(tmp_path, capped, max_usd=90)
        stats = endpoint.stats()
    assert version.manifest.funnel[-1].kept == 200
    assert stats["requests"] == stats["ok"] == stats["distinct"] == 200


def test_a_cap_for_all_runs_lets_the_next_run_send_nothing_until_it_is_raised(tmp_path):
    with Endpoint(reply=lambda body: "two words") as endpoint:
        for _ in range(2):
            with pytest.raises(Stopped, match="for all runs of the recipe is spent"):
                run(tmp_path, recipe(endpoint.url, 60, budget={"max_tokens": 150, "per": "total"}))
        stopped_at = endpoint.stats()["requests"]
        raised = recipe(endpoint.url, 60, budget={"max_tokens": 9_000, "per": "total"})
        assert run(tmp_path, raised).manifest.funnel[-1].kept == 60
        assert stopped_at < endpoint.stats()["requests"] == 60


def test_dollars_without_a_known_price_are_refused_before_any_call(tmp_path):
    with Endpoint(reply=lambda body: "two words") as endpoint:
        unknown = recipe(endpoint.url, 5, {"price": None})
        with pytest.raises(InputError, match=r"models\.m \('any'\).*price"):
            run(tmp_path, unknown, max_usd=1)
        assert endpoint.stats()["requests"] == 0
        # Tokens can be capped all the same.
        assert run(tmp_path, unknown, max_tokens=9_000).manifest.funnel[-1].kept == 5


def test_a_new_day_has_a_budget_of_its_own(ledger, monkeypatch):
    clock = [1_700_000_000 // 86_400 * 86_400 + 86_390.0]
    monkeypatch.setattr("datakit.models.budget.time.time", lambda: clock[0])

    async def work():
        one = Allowance(Budget(max_usd=1, per="day"), ledger, "recipe", "run-1")
        for _ in range(3):
            await one.hold(1, 0)
            one.settle((1, 0), (1.0, 1))
            with pytest.raises(Pending):
                await one.hold(1, 0)
            assert one.is_spent
            clock[0] += 86_400

    in_loop(work)
