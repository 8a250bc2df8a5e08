"""How many requests are under way, and at which address; `test_rates` has those of a minute."""

import asyncio
import random
import time
from collections import Counter

import pytest
from endpoint import Endpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from models_kit import answers, openai, say, within

from datakit.models.limits import FIRST_WINDOW, Place, Pool

ONE, TWO = "http://one/v1", "http://two/v1"


def in_loop(work):
    """Run a coroutine function to its end, which must come soon."""
    return asyncio.run(asyncio.wait_for(work(), 10))


async def turns(count=5):
    for _ in range(count):
        await asyncio.sleep(0)


# The pool


@settings(max_examples=40, deadline=None)
@given(
    urls=st.integers(1, 3),
    most=st.integers(1, 6),
    tasks=st.integers(1, 25),
    seed=st.integers(0, 2**16),
)
def test_never_more_are_in_flight_than_the_pool_allows_and_no_place_leaks(urls, most, tasks, seed):
    rng = random.Random(seed)

    async def work():
        pool = Pool([f"http://{number}/v1" for number in range(urls)], most)
        now = held = 0

        async def one():
            nonlocal now, held
            place = await pool.take(rng.randrange(3))
            now, held = now + 1, max(held, now + 1)
            try:
                await turns(rng.randrange(4))
                match rng.randrange(4):
                    case 0:
                        place.refused(time.monotonic(), None)
                    case 1:
                        pool.answered(place, 0.01)
                    case _:
                        pass
            finally:
                now -= 1
                pool.give(place)

        running = [asyncio.create_task(one()) for _ in range(tasks)]
        for task in running:
            if rng.random() < 0.3:
                await turns(rng.randrange(3))
                task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        assert held <= most
        assert [place.in_flight for place in pool.places] == [0] * urls
        # All of it can be had again.
        for place in pool.places:
            place.window = most
        again = [await pool.take() for _ in range(most)]
        assert sum(place.in_flight for place in pool.places) == len(again) == most

    in_loop(work)


def test_of_those_who_wait_the_deepest_goes_first_and_of_equals_the_first():
    async def work():
        pool, order = Pool([ONE], 1), []

        async def one(depth, name):
            place = await pool.take(depth)
            order.append(name)
            pool.give(place)

        first = await pool.take()
        names = [(0, "a"), (2, "b"), (1, "c"), (2, "d"), (0, "e")]
        running = [asyncio.create_task(one(*name)) for name in names]
        await turns()
        pool.give(first)
        await asyncio.gather(*running)
        return order

    assert in_loop(work) == ["b", "d", "c", "a", "e"]


def test_who_is_cancelled_with_a_place_in_hand_gives_it_to_the_next():
    async def work():
        pool = Pool([ONE], 1)
        first = await pool.take()
        waiting, next_one = (asyncio.create_task(pool.take()) for _ in range(2))
        await turns()
        # The place is handed over, but the waiting task has not run since.
        pool.give(first)
        waiting.cancel()
        assert (await next_one).in_flight == 1
        with pytest.raises(asyncio.CancelledError):
            await waiting

    in_loop(work)


def test_the_load_is_spread_by_room():
    async def work():
        pool = Pool([ONE, TWO], 12)
        pool.places[0].window = 4
        for _ in range(12):
            await pool.take()
        return [place.in_flight for place in pool.places]

    assert in_loop(work) == [3, 9]


# The window


def test_the_window_halves_once_for_all_that_were_on_their_way():
    place, sent_at = Place(ONE, 32), time.monotonic()
    for _ in range(30):
        place.refused(sent_at, None)
    assert place.window == 16
    place.refused(time.monotonic(), None)
    assert place.window == 8
    for _ in range(9):
        place.refused(time.monotonic(), None)
    assert place.window == 1
    assert place.has_room(time.monotonic())


def test_refusals_that_come_before_the_answers_sent_with_them_do_not_halve_the_window():
    # Of each window 20 are refused, at once, and the others answered half a second later.
    place = Place(ONE, 256)
    for _ in range(20):
        for _ in range(20):
            place.refused(time.monotonic(), None)
        for _ in range(236):
            place.answered(0.5, 256)
    assert place.window == 256


def load(place, rounds, latency, widest=2048):
    """Keep the window full for some rounds, `latency(in flight)` seconds each."""
    for _ in range(rounds):
        for _ in range(int(place.window)):
            place.in_flight = int(place.window)
            place.answered(latency(place.in_flight), widest)
    return place.window


def test_the_window_doubles_until_it_is_refused_and_then_grows_by_one_a_round():
    place = Place(ONE, 32)
    assert load(place, 3, lambda busy: 0.1) == pytest.approx(256, abs=2)
    place.refused(time.monotonic(), 0.0)
    assert load(place, 10, lambda busy: 0.1) == pytest.approx(138, abs=1)
    assert load(place, 900, lambda busy: 0.1, widest=150) == 150


def test_the_window_does_not_grow_beyond_what_lengthens_the_answers():
    # Forty at a time are served as fast as one; more have to wait in line.
    place = Place(ONE, FIRST_WINDOW)
    found = load(place, 60, lambda busy: 0.1 * max(1, busy / 40))
    assert 40 <= found <= 200
    assert load(place, 60, lambda busy: 0.1 * max(1, busy / 40)) <= found + 2


def test_a_window_that_is_not_used_does_not_grow():
    place = Place(ONE, 32)
    place.in_flight = 5
    for _ in range(1_000):
        place.answered(0.1, 2048)
    assert place.window == 32


@pytest.mark.slow
def test_a_window_grows_at_an_endpoint_that_bears_it_and_halves_at_one_that_does_not(tmp_path):
    asks = [say(f"question {number}") for number in range(400)]
    with Endpoint(latency="fixed:0.1") as endpoint:
        answers(tmp_path / "1", openai(endpoint.url), asks)
        assert endpoint.stats()["max_in_flight"] > FIRST_WINDOW
    with Endpoint(latency="fixed:0.02", p429=0.3, retry_after=0) as endpoint:
        found = answers(tmp_path / "2", openai(endpoint.url, retries=60), asks[:100])
        assert endpoint.stats()["max_in_flight"] <= 1.5 * FIRST_WINDOW
    assert not [one for one in found if isinstance(one, Exception)]


# Addresses that fail


def test_an_address_that_fails_is_left_out_and_tried_again_with_one_request():
    async def work():
        pool = Pool([ONE, TWO], 8)
        bad, good = pool.places
        for _ in range(3):
            bad.failed(time.monotonic())
        assert pool.elsewhere(bad)
        taken = [await pool.take() for _ in range(8)]
        assert taken == [good] * 8
        for place in taken:
            pool.give(place)
        bad.out_until = 0.0
        again = [await pool.take() for _ in range(8)]
        assert Counter(place.url for place in again) == {ONE: 1, TWO: 7}
        pool.answered(bad, 0.1)
        assert bad.failures == 0

    in_loop(work)


def test_who_waits_for_an_address_that_is_left_out_goes_when_it_is_back():
    async def work():
        pool = Pool([ONE], 4)
        pool.places[0].refused(time.monotonic(), 0.2)
        began = time.monotonic()
        await asyncio.gather(*(pool.take() for _ in range(2)))
        return time.monotonic() - began

    assert 0.19 <= in_loop(work) < 2


def test_who_waits_goes_to_the_address_that_is_back_first():
    async def work():
        pool = Pool([ONE, TWO], 2)
        one, two = await pool.take(), await pool.take()
        first, second = (asyncio.create_task(pool.take()) for _ in range(2))
        await turns()
        one.refused(time.monotonic(), 60)
        pool.give(one)
        assert await first is two
        for _ in range(2):
            two.refused(time.monotonic(), 0.1)
            pool.give(two)
        async with asyncio.timeout(1):
            assert await second is two

    in_loop(work)


def test_requests_that_fail_together_leave_an_address_out_for_a_moment_only():
    place = Place(ONE, 64)
    for _ in range(64):
        place.failed(0.0)
    assert place.out_until - time.monotonic() < 5


def test_any_number_of_requests_may_fail_together():
    place = Place(ONE, 2048)
    for _ in range(2048):
        place.failed(time.monotonic())


def test_of_two_endpoints_one_may_go_and_come_back(tmp_path, monkeypatch):
    monkeypatch.setattr("datakit.models.openai._FIRST_WAIT_S", 0.05)
    monkeypatch.setattr("datakit.models.limits._LONGEST_OUT_S", 0.2)
    first, second = Endpoint(latency="fixed:0.01"), Endpoint(latency="fixed:0.01")

    async def work(kit):
        async def ask(stage, count):
            asks = [kit.ask("m", say(f"{stage} {number}")) for number in range(count)]
            return await asyncio.gather(*asks)

        found = await ask("both", 200)
        shares = [one.stats()["ok"] for one in (first, second)]
        port = int(second.url.split(":")[-1].removesuffix("/v1"))
        await asyncio.to_thread(second.__exit__)
        found += await ask("one", 100)
        back = Endpoint(latency="fixed:0.01", port=port)
        await asyncio.to_thread(back.__enter__)
        try:
            await asyncio.sleep(0.3)
            found += await ask("both again", 200)
            return found, shares, back.stats()["ok"]
        finally:
            await asyncio.to_thread(back.__exit__)

    with first:
        second.__enter__()
        spec = openai([first.url, second.url], max_in_flight=16, retries=6)
        found, shares, back = within(tmp_path, spec, work)
        assert first.stats()["ok"] >= 180
    assert len(found) == 500
    assert sum(shares) == 200
    assert min(shares) >= 70
    assert back >= 40
