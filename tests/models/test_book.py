"""The book of a run: answers are safe before they are used, many in one transaction."""

import asyncio

import pytest
from models_kit import answers, openai, say, sends, server

from datakit.errors import OutsideError
from datakit.models.book import Book, Meter
from datakit.models.chat import Reply, request_of
from datakit.models.ledger import Attempt, Ledger

SPEC = openai()


def request(number=0):
    return request_of(SPEC, "m", say(f"question {number}"), "step")


def reply(text="two"):
    return Reply(text=text, input_tokens=2, output_tokens=1)


@pytest.fixture
def ledger(tmp_path):
    with Ledger.opened(tmp_path) as ledger:
        yield ledger


@pytest.fixture
def book(ledger):
    return Book(ledger, Meter(), "recipe", "run-1", None)


def written(book, numbers, text="two"):
    """What stands after all these are written at once; errors in their place."""

    async def all_of_them():
        writes = (book.write("m", request(number), reply(text), (2, 1), 0.5) for number in numbers)
        return await asyncio.gather(*writes, return_exceptions=True)

    return asyncio.run(all_of_them())


def test_thousands_of_writes_are_few_transactions(book, ledger):
    begun = []
    ledger.db.set_trace_callback(lambda sql: begun.append(sql) if sql.startswith("BEGIN") else None)
    assert written(book, range(3_000)) == [reply()] * 3_000
    assert 1 <= len(begun) <= 3
    assert ledger.stats()[0]["answers"] == 3_000
    assert (book.meter.sent, book.meter.input_tokens, book.meter.usd) == (3_000, 6_000, 1_500)


def test_an_answer_is_there_for_other_processes_before_its_write_returns(book, tmp_path):
    async def work():
        for number in range(5):
            await book.write("m", request(number), reply(), (1, 1), 0.0)
            with Ledger.opened(tmp_path) as other:
                assert other.get(request(number).key) == reply()
                found = other.db.execute("SELECT COUNT(*) FROM attempts").fetchone()
                assert found == (number + 1,)

    asyncio.run(work())


def test_the_first_written_answer_stands_for_both(book, ledger, tmp_path):
    with Ledger.opened(tmp_path) as elsewhere:
        other = Book(elsewhere, Meter(), "recipe", "run-2", None)
        assert written(book, [1], "first") == [reply("first")]
        # Beside new ones, in one transaction.
        assert [one.text for one in written(other, [0, 1, 2], "second")] == [
            "second",
            "first",
            "second",
        ]
        # It was paid for all the same.
        assert other.meter.sent == 3
    assert ledger.get(request(1).key).text == "first"
    assert ledger.db.execute("SELECT COUNT(*) FROM attempts").fetchone() == (4,)


def test_equal_requests_that_are_answered_at_once_have_one_answer(book):
    assert {one.text for one in written(book, [1, 1, 1])} == {"two"}


@pytest.mark.parametrize("how", ["closed", "read-only", "full"])
def test_a_failing_disk_is_an_outside_error_for_every_writer(tmp_path, how):
    ledger = Ledger(tmp_path)
    book = Book(ledger, Meter(), "recipe", "run-1", None)
    match how:
        case "closed":
            ledger.close()
        case "read-only":
            ledger.db.execute("PRAGMA query_only = 1")
        case _:
            ledger.db.execute("PRAGMA max_page_count = 12")
    found = written(book, range(500))
    assert {type(one) for one in found} == {OutsideError}
    assert "ledger.sqlite" in str(found[0])
    ledger.close()


def test_what_could_not_be_written_is_written_with_the_next(book, ledger):
    ledger.db.execute("PRAGMA query_only = 1")
    written(book, [1])
    ledger.db.execute("PRAGMA query_only = 0")
    assert written(book, [2]) == [reply()]
    assert ledger.get(request(1).key) == reply()


def test_an_answer_whose_asker_is_gone_is_kept(book, ledger):
    async def work():
        task = asyncio.create_task(book.write("m", request(), reply(), (1, 1), 0.0))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await book.write("m", request(1), reply(), (1, 1), 0.0)

    asyncio.run(work())
    assert ledger.get(request().key) == reply()


def test_failed_and_replayed_attempts_are_written_at_the_end(book, ledger):
    async def fail():
        book.failed("m", request(), "timeout", (9, 5), 0.25)

    asyncio.run(fail())
    for _ in range(3):
        book.replayed("m", "m", "step", reply(), 0.5)
    book.replayed("m", "m", "another", reply(), 0.5)
    book.close()
    found = [Attempt(*row) for row in ledger.db.execute("SELECT * FROM attempts ORDER BY rowid")]
    assert [(one.step, one.outcome, one.answers, one.usd) for one in found] == [
        ("step", "timeout", 1, 0.25),
        ("step", "replayed", 3, 1.5),
        ("another", "replayed", 1, 0.5),
    ]
    spent = ledger.db.execute("SELECT usd, tokens FROM spent WHERE scope LIKE '%total'").fetchall()
    assert spent == [(0.25, 14)]
    meter = book.meter
    assert (meter.failed, meter.wasted_usd, meter.usd, meter.saved_usd) == (1, 0.25, 0.25, 2.0)
    book.close()
    assert ledger.db.execute("SELECT COUNT(*) FROM attempts").fetchone() == (3,)


def test_a_ledger_that_cannot_be_written_stops_the_asking(tmp_path, monkeypatch):
    """Over HTTP: every asker gets the error, and none an answer that would be lost."""
    body = b'{"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}]}'
    put = Ledger.put

    def fails(self, given):
        self.db.execute("PRAGMA query_only = 1")
        return put(self, given)

    monkeypatch.setattr(Ledger, "put", fails)
    # The rest cannot be written at the end either.
    monkeypatch.setattr(Book, "close", lambda self: None)
    with server(sends(body)) as url:
        found = answers(tmp_path, openai(url, retries=3), [say(str(n)) for n in range(20)])
    assert {type(one) for one in found} == {OutsideError}
