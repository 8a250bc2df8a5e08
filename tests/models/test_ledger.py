"""The ledger's file: an answer is kept under what was asked of whom, and never lost."""

import json
import multiprocessing
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from datakit.errors import InputError, OutsideError
from datakit.models.chat import Reply
from datakit.models.ledger import Entry, Ledger, answer_of


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "state"


@pytest.fixture
def ledger(folder):
    with Ledger.opened(folder) as ledger:
        yield ledger


def entry(number=0, text="two", **reply):
    request = {"messages": [{"role": "user", "content": f"question {number}"}]}
    return Entry(model="m", draw=0, request=request, reply=Reply(text=text, **reply))


def put(ledger, *entries):
    """How many of these are new."""
    return ledger.put([answer_of(one) for one in entries])


# The file


def test_an_answer_outlives_its_ledger_object(folder):
    with Ledger.opened(folder) as ledger:
        assert put(ledger, entry()) == 1
    with Ledger.opened(folder) as ledger:
        assert ledger.get(entry().key) == entry().reply


def test_the_first_written_answer_stands_over_two_ledgers_on_one_file(folder):
    with Ledger.opened(folder) as one, Ledger.opened(folder) as other:
        assert put(one, entry(text="first")) == 1
        assert put(other, entry(text="second")) == 0
        assert one.get(entry().key) == other.get(entry().key) == entry(text="first").reply


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutsideError, match=r"ledger\.sqlite.*--state"):
        Ledger(tmp_path / "file" / "state")


def test_many_that_open_a_new_ledger_at_once_all_succeed(tmp_path):
    def use(place):
        with Ledger.opened(tmp_path / str(place // 8)) as ledger:
            return put(ledger, entry(place))

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(use, range(64))) == [1] * 64


OPENING = """
import os, pathlib, sys
from datakit.errors import OutsideError
from datakit.models.ledger import Ledger

def opens(folder):
    os.read(ready, 1)
    try:
        Ledger(folder).close()
    except OutsideError as error:
        print(error, flush=True)
    os._exit(0)

for number in range(50):
    ready, go = os.pipe()
    folder = pathlib.Path(sys.argv[1], str(number))
    children = []
    for _ in range(6):
        child = os.fork()
        if not child:
            os.close(go)
            opens(folder)
        children.append(child)
    os.close(ready), os.close(go)
    for child in children:
        os.waitpid(child, 0)
"""


@pytest.mark.slow
def test_many_processes_that_open_a_new_ledger_at_once_all_succeed(tmp_path):
    command = [sys.executable, "-c", OPENING, tmp_path]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == ""


def test_answers_are_written_all_or_none(ledger, folder):
    def stumbles():
        with ledger.transaction():
            put(ledger, entry(1))
            put(ledger, entry(2))
            raise KeyError

    with pytest.raises(KeyError):
        stumbles()
    assert list(ledger.entries()) == []
    assert put(ledger, entry(1), entry(2), entry(1, text="again")) == 2
    assert ledger.get(entry(1).key).text == "two"


def test_a_lock_that_does_not_end_names_the_file(ledger):
    ledger.db.execute("PRAGMA busy_timeout = 10")
    other = sqlite3.connect(ledger.path, isolation_level=None)
    try:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(OutsideError, match=r"ledger\.sqlite.*locked"):
            put(ledger, entry())
        other.execute("ROLLBACK")
    finally:
        other.close()
    assert put(ledger, entry()) == 1


def test_a_full_disk_is_named(ledger):
    ledger.db.execute("PRAGMA max_page_count = 20")
    with pytest.raises(OutsideError, match=r"ledger\.sqlite.*full"):
        put(ledger, *(entry(number, text="x" * 10_000) for number in range(100)))
    assert list(ledger.entries()) == []
    ledger.db.execute("PRAGMA max_page_count = 100000")
    assert put(ledger, entry("after")) == 1


def test_stats_count_answers_and_tokens_of_each_model(ledger):
    for number in range(3):
        put(ledger, entry(number, input_tokens=5, output_tokens=2))
    put(ledger, entry().model_copy(update={"model": "another"}))
    assert ledger.stats() == [
        {"model": "another", "answers": 1, "input_tokens": 0, "output_tokens": 0},
        {"model": "m", "answers": 3, "input_tokens": 15, "output_tokens": 6},
    ]


def put_many(folder, worker, barrier):
    with Ledger.opened(folder) as ledger:
        barrier.wait()
        for number in range(500):
            put(ledger, entry(f"{worker} {number}", text=f"answer {number}"))


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
    assert put(ledger, *ODD) == len(ODD)
    assert ledger.export(tmp_path / "a.jsonl") == len(ODD)
    with Ledger.opened(tmp_path / "another") as other:
        assert other.load(tmp_path / "a.jsonl") == (len(ODD), len(ODD))
        assert list(other.entries()) == list(ledger.entries())
        assert all(other.get(one.key) == one.reply for one in ODD)
        assert exported(other, tmp_path / "b.jsonl") == (tmp_path / "a.jsonl").read_bytes()


def test_importing_twice_adds_nothing(ledger, tmp_path):
    assert put(ledger, *ODD) == len(ODD)
    before = exported(ledger, tmp_path / "a.jsonl")
    assert ledger.load(tmp_path / "a.jsonl") == (len(ODD), 0)
    assert exported(ledger, tmp_path / "b.jsonl") == before


def test_an_import_does_not_replace_an_answer_that_stands(ledger, tmp_path):
    put(ledger, entry(text="first"))
    path = tmp_path / "a.jsonl"
    path.write_text(entry(text="second").model_dump_json())
    assert ledger.load(path) == (1, 0)
    assert ledger.get(entry().key).text == "first"


def test_an_export_can_be_of_one_model(ledger, tmp_path):
    assert put(ledger, *ODD) == len(ODD)
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
    assert put(ledger, entry(text="and goes on")) == 1
    assert ledger.get(entry().key).text == "and goes on"


@pytest.mark.parametrize("name", ["missing.jsonl", "."])
def test_an_export_that_cannot_be_read_is_an_input_error(ledger, tmp_path, name):
    with pytest.raises(InputError, match="cannot read the ledger export"):
        ledger.load(tmp_path / name)
