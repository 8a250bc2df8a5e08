"""MinHash against brute force: every pair that is found is one, and few are missed."""

import itertools
import random
import re
import unicodedata
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from steps_kit import EQUAL_TO_ROW_0, applied, candidates, equal_in_parts, prompt

from datakit.curation import _shingles
from datakit.curation._shingles import candidates as candidate_pairs
from datakit.curation._shingles import jaccard, sketch
from datakit.curation.minhash import Minhash
from datakit.records import Candidates, Pair, Prompt

DATA = Path(__file__).parents[3] / "shared" / "data" / "instructions_mixed.parquet"
ALWAYS = {"permutations": 256, "bands": 256}
"""A band of one permutation: pairs of any similarity that matters are candidates."""

SYMBOLS = set("$+<=>^`|~*/%&#@\\-")
WORDS = ("the", "sea", "at", "night", "is", "dark", "and", "cold", "but", "full", "of", "light")


def words(text):
    """The words of a text, the plain way, for scripts with spaces."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    found = re.findall(r"[\w]|\S|\s", text.lower())
    spaced = "".join(f" {one} " if one in SYMBOLS else one for one in found)
    spaced = re.sub(r"[^\w\s$+<=>^`|~*/%&#@\\-]", " ", spaced)
    return spaced.split()


def shingles(text, ngram):
    found = words(text)
    if not found:
        return {text.strip()}
    return {tuple(found[i : i + ngram]) for i in range(max(1, len(found) - ngram + 1))}


def similarity(one, other, ngram):
    a, b = shingles(one, ngram), shingles(other, ngram)
    return len(a & b) / len(a | b)


def grams_of(texts, ngram):
    """The n-grams after each other and their numbers, as `jaccard` takes them."""
    made = sketch(pl.Series(texts, dtype=pl.String), ngram, 4, 2)["grams"]
    return made.explode().to_numpy(), made.list.len().to_numpy().astype(np.int64)


ASCII = st.text(st.characters(max_codepoint=127), max_size=40)
SPEECH = st.lists(st.sampled_from([*WORDS, "3", "+", "-", "don't", "C++", "x_y"]), max_size=14)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(ASCII | SPEECH.map(" ".join), min_size=2, max_size=6), st.integers(1, 4))
def test_the_similarity_of_two_texts_is_that_of_their_sets_of_ngrams(texts, ngram):
    pairs = np.array(list(itertools.combinations(range(len(texts)), 2)))
    found = jaccard(*grams_of(texts, ngram), pairs[:, 0], pairs[:, 1])
    expected = [similarity(texts[one], texts[other], ngram) for one, other in pairs]
    assert found.tolist() == expected


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Hello, World!", "hello world", True),
        ("“Hello” – world…", "hello world", True),
        ("Ｈｅｌｌｏ　ｗｏｒｌｄ", "hello world", True),
        ("CAFÉ au lait", "cafe\u0301 AU LAIT", True),
        ("你好，世界！", "你好 世界", True),
        ("What is 3 + 4?", "What is 3+4", True),
        ("What is 3 + 4?", "What is 3 - 4?", False),
        ("C++ and C#", "C and C", False),
        ("🙂", "🙁", False),
        ("🙂", " 🙂\n", True),
        ("...", "...", True),
        ("...", "?", False),
        ("", " \n", True),
        ("a b", "b a", False),
        ("नमस्ते दुनिया", "नमस्ते दुनिय", False),
        ("x" * 100, "x" * 101, False),
        ("x" * 64 + "a", "x" * 64 + "b", False),
        ("nul\x00s", "nul s", True),
    ],
)
def test_case_width_and_marks_fold_and_symbols_do_not(one, other, same):
    found = jaccard(*grams_of([one, other], 2), np.array([0]), np.array([1]))
    assert bool(found[0] == 1) is same


def test_each_character_of_a_script_without_spaces_is_a_word():
    found = jaccard(
        *grams_of(["今日は天気がいい", "今日は天気が悪い"], 1), np.array([0]), np.array([1])
    )
    assert found.tolist() == [7 / 8]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.text(max_size=30), max_size=8), st.integers(1, 3))
def test_a_text_is_told_apart_by_itself_whatever_stands_beside_it(texts, ngram):
    together = sketch(pl.Series(texts, dtype=pl.String), ngram, 8, 4)
    for place, text in enumerate(texts):
        alone = sketch(pl.Series([text]), ngram, 8, 4)
        assert together[place].equals(alone)


def test_blocks_do_not_change_what_is_found(monkeypatch):
    rng = random.Random(3)
    texts = [" ".join(rng.choices(WORDS, k=rng.randrange(0, 60))) for _ in range(200)]
    texts += ["über " * 9, "word " * 5000, ""]
    whole = sketch(pl.Series(texts), 3, 32, 8)
    pairs = np.array(list(itertools.combinations(range(0, 200, 7), 2)))
    grams = whole["grams"].explode().to_numpy()
    sizes = whole["grams"].list.len().to_numpy().astype(np.int64)
    found = jaccard(grams, sizes, pairs[:, 0], pairs[:, 1])
    monkeypatch.setattr(_shingles, "_BLOCK", 100)
    monkeypatch.setattr(_shingles, "_CELLS", 64)
    assert sketch(pl.Series(texts), 3, 32, 8).equals(whole)
    assert jaccard(grams, sizes, pairs[:, 0], pairs[:, 1]).tolist() == found.tolist()


def test_hashes_are_what_they_were():
    """They are stored: if they change, `Minhash.version` must be raised."""
    made = sketch(pl.Series(["Hello, big world", "über 3 + 4"]), 2, 4, 2)
    assert made["grams"].to_list() == [
        [60594358426997, 257155298282625],
        [22164487864886, 44635553522847, 265173766714716],
    ]
    assert made["bands"].to_list() == [[1456370029, 53584018], [784534281, 2582767865]]


def test_bands_are_equal_as_often_as_the_similarity_says():
    rng = random.Random(5)
    vocabulary = [f"w{number}" for number in range(100_000)]
    shared = 0
    expected = 0.0
    for _ in range(40):
        common = rng.sample(vocabulary, 60)
        one = " ".join(common + rng.sample(vocabulary, 20))
        other = " ".join(common + rng.sample(vocabulary, 20))
        bands = sketch(pl.Series([one, other]), 1, 512, 512)["bands"].to_numpy()
        shared += int((bands[0] == bands[1]).sum())
        expected += 512 * similarity(one, other, 1)
    # 20,480 draws of 0.6: three standard deviations are 210.
    assert shared == pytest.approx(expected, abs=210)


# -- candidates ----------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.integers(0, 25), st.integers(0, 25))
def test_every_pair_that_shares_a_band_is_a_candidate_once(seed, size, ours):
    rng = np.random.default_rng(seed)
    bands = rng.integers(0, 8, (size, 3), dtype=np.uint32)
    ours = min(ours, size)
    first, second = candidate_pairs(bands, rng.permutation(size), ours)
    expected = [
        (one, other)
        for one, other in itertools.combinations(range(size), 2)
        if one < ours and (bands[one] == bands[other]).any()
    ]
    assert list(zip(first.tolist(), second.tolist(), strict=True)) == expected


def test_a_huge_bucket_stays_linear_and_joins_all_with_the_best():
    size = 5_000
    rank = np.random.default_rng(1).permutation(size)
    bands = np.zeros((size, 4), np.uint32)
    first, second = candidate_pairs(bands, rank, size)
    assert len(first) < 5 * size
    best = int(rank.argmin())
    joined = {a if b == best else b for a, b in zip(first, second, strict=True) if best in (a, b)}
    assert len(joined) == size - 1


# -- the step ------------------------------------------------------------------------------------


def texts_with_copies(seed, count=60):
    """Sentences of few words, and copies of some with words changed."""
    rng = random.Random(seed)
    texts = [" ".join(rng.choices(WORDS, k=rng.randrange(1, 12))) for _ in range(count)]
    for text in rng.choices(texts, k=count):
        changed = text.split()
        changed[rng.randrange(len(changed))] = rng.choice(WORDS)
        texts.append(" ".join(changed))
    return texts


@pytest.mark.parametrize(("ngram", "threshold"), [(1, 0.7), (2, 0.5), (3, 0.4), (2, 1.0)])
@pytest.mark.parametrize("linkage", ["components", "star"])
def test_what_is_dropped_is_what_brute_force_drops(linkage, ngram, threshold, tmp_path):
    texts = texts_with_copies(ngram)
    rows = [prompt(text, origin=str(place)) for place, text in enumerate(texts)]
    step = Minhash(ngram=ngram, threshold=threshold, linkage=linkage, **ALWAYS)
    split = applied(step, Prompt, rows, tmp_path)
    close = {
        (one, other)
        for one, other in itertools.combinations(range(len(texts)), 2)
        if similarity(texts[one], texts[other], ngram) >= threshold
    }
    label = list(range(len(texts)))
    kept = []
    for row in range(len(texts)):
        if linkage == "star":
            if not any((other, row) in close for other in kept):
                kept.append(row)
            continue
        joined = {label[other] for other in range(row) if (other, row) in close} | {row}
        label = [min(joined) if one in joined else one for one in label]
    expected = kept if linkage == "star" else sorted(set(label))
    assert split.kept["id"].to_list() == [rows[row].id for row in expected]
    text = {row.id: row.messages[0].content for row in rows}
    for row in split.dropped.iter_rows(named=True):
        exact = similarity(text[row["id"]], text[row["related"]], ngram)
        assert row["similarity"] == exact
        assert row["related"] in set(split.kept["id"])
        assert row["reason"] == "near_duplicate"
        start = f"Jaccard similarity of {ngram}-grams {round(exact, 4)}"
        assert row["detail"] == f"{start} to a row that stays"
        if linkage == "star":
            assert exact >= threshold
    sizes = split.kept["measure.cluster_size"].to_list()
    assert sum(sizes) == len(rows)
    assert split.dropped.height > 5


@pytest.mark.parametrize("kind", [Pair, Candidates])
@pytest.mark.parametrize("over", EQUAL_TO_ROW_0)
def test_over_says_which_part_of_a_row_is_compared(over, kind, tmp_path):
    rows = equal_in_parts(kind)
    split = applied(Minhash(over=over), kind, rows, tmp_path)
    found = dict(zip(split.dropped["id"], split.dropped["related"], strict=True))
    assert found == {rows[place].id: rows[0].id for place in EQUAL_TO_ROW_0[over]}


def test_texts_without_words_are_like_those_that_are_equal(tmp_path):
    texts = ("", " ", "...", "🙂", "🙂", "!!!", "... ")
    rows = [candidates(f"question {place}", text) for place, text in enumerate(texts)]
    split = applied(Minhash(over="response"), Candidates, rows, tmp_path)
    assert split.kept["id"].to_list() == [rows[place].id for place in (0, 2, 3, 5)]


@pytest.mark.parametrize("count", [0, 1])
def test_a_table_of_no_or_one_row_stays_as_it_is(count, tmp_path):
    rows = [prompt("hello")][:count]
    split = applied(Minhash(), Prompt, rows, tmp_path)
    assert split.kept["id"].to_list() == [row.id for row in rows]
    assert split.dropped.is_empty()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"permutations": 100, "bands": 32}, "100 is none of 32"),
        ({"threshold": 0}, "threshold"),
        ({"threshold": 1.01}, "threshold"),
        ({"ngram": 0}, "ngram"),
        ({"bands": 0}, "bands"),
    ],
)
def test_fields_that_cannot_be_are_refused(fields, said):
    with pytest.raises(ValidationError, match=said):
        Minhash(**fields)


def test_a_threshold_enters_nothing_that_is_stored():
    assert "threshold" not in Minhash.prepared_by
    assert Minhash.prepared_by == {"over", "ngram", "permutations", "bands"}


# -- public data ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def instructions():
    if not DATA.is_file():
        pytest.skip("the public data sets are not beside the checkout")
    return pl.read_parquet(DATA, columns=["instruction"])["instruction"].drop_nulls().to_list()


@pytest.mark.data
def test_on_public_instructions_no_pair_is_false_and_few_are_missed(instructions, tmp_path):
    threshold, ngram = 0.6, 2
    # The plain way knows the words of ASCII only as ours does; folding has tests of its own.
    texts = random.Random(0).sample([text for text in instructions if text.isascii()], 4_000)
    # Planted: copies of 300 with every tenth word gone.
    copies = [" ".join(w for i, w in enumerate(t.split()) if i % 10 != 5) for t in texts[:300]]
    texts += copies
    made = sketch(pl.Series(texts), ngram, 128, 32)
    grams = made["grams"].explode().to_numpy()
    sizes = made["grams"].list.len().to_numpy().astype(np.int64)
    # Brute force over an index of n-grams, which no hash of ours enters.
    at = {}
    for row, text in enumerate(texts):
        for one in shingles(text, ngram):
            at.setdefault(one, []).append(row)
    common = {}
    for rows in at.values():
        for pair in itertools.combinations(rows, 2):
            common[pair] = common.get(pair, 0) + 1
    counts = [len(shingles(text, ngram)) for text in texts]
    true = {
        pair: many / (counts[pair[0]] + counts[pair[1]] - many)
        for pair, many in common.items()
        if many >= threshold * max(counts[pair[0]], counts[pair[1]])
    }
    true = {pair: share for pair, share in true.items() if share >= threshold}
    first, second = candidate_pairs(made["bands"].to_numpy(), np.arange(len(texts)), len(texts))
    share = jaccard(grams, sizes, first, second)
    found = {
        (one, other): value
        for one, other, value in zip(first.tolist(), second.tolist(), share, strict=True)
        if value >= threshold
    }
    assert found.keys() <= true.keys()
    assert all(true[pair] == value for pair, value in found.items())
    missed = sum((1 - value**4) ** 32 for value in true.values())
    assert len(true) > 250
    assert len(true) - len(found) <= missed + 3 * missed**0.5 + 1
    assert all((min(p), max(p)) in found for p, value in true.items() if value == 1)


@pytest.mark.data
def test_on_public_instructions_every_cluster_keeps_exactly_one_row(instructions, tmp_path):
    rows = [prompt(text, origin=str(i)) for i, text in enumerate(instructions) if text.strip()]
    split = applied(Minhash(keep="longest"), Prompt, rows, tmp_path)
    named = split.dropped["related"]
    assert set(named) <= set(split.kept["id"])
    sizes = dict(zip(split.kept["id"], split.kept["measure.cluster_size"], strict=True))
    counted = dict(named.value_counts().iter_rows())
    assert sizes == {row: counted.get(row, 0) + 1.0 for row in sizes}
    assert split.kept.height + split.dropped.height == len(rows)
    random.Random(1).shuffle(rows)
    again = applied(Minhash(keep="longest"), Prompt, rows, tmp_path)
    assert set(again.kept["id"]) == set(split.kept["id"])
    columns = ["id", "related", "similarity"]
    assert again.dropped.sort("id")[columns].equals(split.dropped.sort("id")[columns])
