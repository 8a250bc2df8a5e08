"""The vector cache: no text twice, over calls, threads and processes; a kill loses one chunk."""

import hashlib
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
import threading
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from steps_kit import applied, prompt

from datakit.curation.near import Near
from datakit.errors import InputError
from datakit.models import vector_cache
from datakit.models.embed import CachedEmbedder, Hashing
from datakit.models.specs import HashingSpec
from datakit.models.vector_cache import first_of_equals
from datakit.records import Prompt

HASHING = Hashing(HashingSpec(kind="hashing", dimensions=32))


class Counting:
    """Hashing that notes the texts of each call."""

    def __init__(self, identity="counting", stored_as="float32", fails_at=None):
        self.identity = identity
        self.stored_as = stored_as
        self.calls = []
        self._fails_at = fails_at

    @property
    def seen(self):
        return [text for call in self.calls for text in call]

    def encode(self, texts):
        if len(self.calls) == self._fails_at:
            raise OSError("gone")
        self.calls.append(list(texts))
        return HASHING.encode(texts)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "state"


def encoded(inner, folder, texts, progress=None):
    with closing(CachedEmbedder(inner, folder, progress)) as cache:
        return cache.encode(texts)


def numbered(count):
    return [f"text number {number}" for number in range(count)]


@given(st.lists(st.integers(0, 5) | st.integers(0, 2**128 - 1), min_size=1, max_size=60))
def test_first_of_equals_is_where_a_dictionary_finds_it(numbers):
    keys = [number.to_bytes(16) for number in numbers]
    found = first_of_equals(keys)
    assert found.tolist() == [keys.index(key) for key in keys]


def test_keys_that_share_a_half_or_end_in_nul_are_distinct():
    keys = [bytes(16), b"a" * 8 + bytes(8), bytes(8) + b"a" * 8, b"a" * 16, b"a" * 8 + bytes(8)]
    assert first_of_equals(keys).tolist() == [0, 1, 2, 3, 1]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.sampled_from("abcdefg"), max_size=12), max_size=6))
def test_any_calls_give_what_the_embedder_gives_and_ask_each_text_once(calls):
    inner = Counting()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vector_cache, "_FIRST_CHUNK", 2)
        patch.setattr(vector_cache, "_LOOKUP", 3)
        patch.setattr(vector_cache, "_FETCH", 2)
        with tempfile.TemporaryDirectory() as made:
            cache = CachedEmbedder(inner, Path(made))
            for texts in filter(None, calls):
                np.testing.assert_array_equal(cache.encode(texts), HASHING.encode(texts))
            cache.close()
    assert sorted(inner.seen) == sorted({text for texts in calls for text in texts})


def test_equal_texts_of_one_call_are_embedded_once(folder):
    inner = Counting()
    vectors = encoded(inner, folder, ["a", "b", "a"] * 1_000)
    assert sorted(inner.seen) == ["a", "b"]
    np.testing.assert_array_equal(vectors, HASHING.encode(["a", "b", "a"] * 1_000))


def test_the_longest_texts_come_first_and_chunks_grow_while_they_are_quick(folder):
    inner = Counting()
    encoded(inner, folder, ["x" * number for number in range(1_000)])
    lengths = [len(text) for text in inner.seen]
    assert lengths == sorted(lengths, reverse=True)
    assert [len(call) for call in inner.calls] == [64, 128, 256, 512, 40]


def test_chunks_shrink_while_they_are_slow(folder, monkeypatch):
    monkeypatch.setattr(vector_cache, "_CHUNK_S", (-1.0, 0.0))
    inner = Counting()
    encoded(inner, folder, numbered(128))
    assert [len(call) for call in inner.calls] == [64, 32, 16, 8, 4, 2, 1, 1]


def test_hostile_texts_have_vectors_of_their_own(folder):
    texts = ["", "\0", "\0\0", " ", "a" * 1_000_000, "🙂", "\u00e9", "e\u0301"]
    inner = Counting()
    vectors = encoded(inner, folder, texts)
    assert len(inner.seen) == len(set(texts)) == len(texts)
    np.testing.assert_array_equal(vectors, HASHING.encode(texts))


def test_progress_counts_the_texts_that_have_to_be_embedded(folder):
    heard = []
    encoded(Counting(), folder, numbered(100))
    encoded(Counting(), folder, numbered(600) * 2, lambda done, of: heard.append((done, of)))
    encoded(Counting(), folder, numbered(600), lambda done, of: heard.append((done, of)))
    assert heard == [(0, 500), (64, 500), (192, 500), (448, 500), (500, 500)]


def test_what_was_made_before_a_failure_stays(folder):
    with pytest.raises(OSError, match="gone"):
        encoded(Counting(fails_at=2), folder, numbered(1_000))
    inner = Counting()
    encoded(inner, folder, numbered(1_000))
    assert len(inner.seen) == 1_000 - 64 - 128


def test_half_precision_takes_two_bytes_and_comes_back_to_the_bit(folder):
    texts = numbered(40)
    before = encoded(Counting(stored_as="float16"), folder, texts)
    inner = Counting(stored_as="float16")
    after = encoded(inner, folder, texts)
    assert inner.seen == []
    np.testing.assert_array_equal(before, after)
    np.testing.assert_allclose(np.linalg.norm(after, axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(after, HASHING.encode(texts), atol=1e-3)
    with closing(sqlite3.connect(folder / "vectors.sqlite")) as db:
        assert db.execute("SELECT DISTINCT length(vector) FROM embedding").fetchall() == [(64,)]


def test_vectors_of_another_width_under_one_name_are_refused(folder):
    encoded(Counting(), folder, ["a"])

    class Wider(Counting):
        def encode(self, texts):
            return np.ones((len(texts), 33), np.float32)

    with pytest.raises(InputError, match="33 numbers, and the cache has its vectors of 32"):
        encoded(Wider(), folder, ["b"])
    np.testing.assert_array_equal(encoded(Counting(), folder, ["b"]), HASHING.encode(["b"]))


def test_a_file_of_version_0_1_keeps_its_vectors(folder):
    folder.mkdir()
    texts = numbered(30)
    with closing(sqlite3.connect(folder / "vectors.sqlite")) as db, db:
        db.execute(
            "CREATE TABLE vectors (embedder TEXT, text BLOB, vector BLOB, "
            "PRIMARY KEY (embedder, text)) WITHOUT ROWID"
        )
        for text, vector in zip(texts, HASHING.encode(texts), strict=True):
            key = hashlib.blake2b(text.encode(), digest_size=16).digest()
            db.execute("INSERT INTO vectors VALUES ('counting', ?, ?)", [key, vector.tobytes()])
    inner = Counting()
    np.testing.assert_array_equal(encoded(inner, folder, texts), HASHING.encode(texts))
    assert inner.seen == []
    with closing(sqlite3.connect(folder / "vectors.sqlite")) as db:
        assert not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'vectors'").fetchall()


def test_a_vector_takes_little_more_than_its_numbers(folder):
    class Wide(Counting):
        def encode(self, texts):
            return np.random.default_rng(0).random((len(texts), 384), np.float32)

    encoded(Wide(), folder, numbered(2_000))
    # Closing the last connection has moved all into the one file.
    assert (folder / "vectors.sqlite").stat().st_size < 2_000 * 384 * 4 * 1.15


def test_caches_of_two_threads_embed_no_text_twice(folder):
    inners = [Counting(), Counting()]
    threads = [
        threading.Thread(target=encoded, args=(inner, folder, numbered(2_000))) for inner in inners
    ]
    CachedEmbedder(Counting(), folder).close()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seen = [text for inner in inners for text in inner.seen]
    assert sorted(seen) == sorted(numbered(2_000))


SCRIPT = textwrap.dedent(
    """
    import os, signal, sys, time
    from pathlib import Path
    from datakit.models.embed import CachedEmbedder, Hashing
    from datakit.models.specs import HashingSpec

    folder, log, start, stop, kill_at = sys.argv[1:]

    class Logging:
        identity = "counting"
        inner = Hashing(HashingSpec(kind="hashing", dimensions=32))
        calls = 0

        def encode(self, texts):
            self.calls += 1
            if self.calls == int(kill_at):
                os.kill(os.getpid(), signal.SIGKILL)
            with open(log, "a") as file:
                file.writelines(text + "\\n" for text in texts)
            time.sleep(0.05)
            return self.inner.encode(texts)

    while not Path(folder, "go").exists():
        time.sleep(0.005)
    cache = CachedEmbedder(Logging(), Path(folder))
    cache.encode([f"text number {n}" for n in range(int(start), int(stop))])
    cache.close()
    """
)


def started(folder, log, start, stop, kill_at=0):
    command = [sys.executable, "-c", SCRIPT, str(folder), str(log), str(start), str(stop)]
    return subprocess.Popen([*command, str(kill_at)], env=os.environ)


def test_processes_on_one_cache_embed_no_text_twice(folder, tmp_path):
    folder.mkdir()
    log = tmp_path / "log"
    running = [started(folder, log, 0, 3_000), started(folder, log, 1_000, 4_000)]
    (folder / "go").touch()
    assert [process.wait(60) for process in running] == [0, 0]
    seen = log.read_text().splitlines()
    assert len(seen) == len(set(seen)) == 4_000
    inner = Counting()
    texts = numbered(4_000)
    np.testing.assert_array_equal(encoded(inner, folder, texts), HASHING.encode(texts))
    assert inner.seen == []


def test_a_killed_process_loses_one_chunk_and_holds_up_nobody(folder, tmp_path):
    folder.mkdir()
    (folder / "go").touch()
    log = tmp_path / "log"
    assert started(folder, log, 0, 3_000, kill_at=3).wait(60) == -signal.SIGKILL
    made = log.read_text().splitlines()
    assert len(made) == 64 + 128
    inner = Counting()
    encoded(inner, folder, numbered(3_000))
    assert sorted(inner.seen + made) == sorted(numbered(3_000))


def test_a_new_threshold_of_near_embeds_nothing(tmp_path, monkeypatch):
    rows = [prompt(text) for text in numbered(20)]
    applied(Near(threshold=0.9), Prompt, rows, tmp_path)

    def never(self, texts):
        raise AssertionError("a text was embedded again")

    monkeypatch.setattr(Hashing, "encode", never)
    assert applied(Near(threshold=0.5), Prompt, rows, tmp_path).dropped.height > 0
