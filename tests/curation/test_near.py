"""Near duplicates by the hashing embedder against brute force."""

import itertools
import random

import numpy as np
import pytest
from pydantic import ValidationError
from steps_kit import EQUAL_TO_ROW_0, HASHING, applied, candidates, equal_in_parts, prompt

from datakit.curation.near import Near
from datakit.models.embed import Hashing
from datakit.records import Candidates, Pair, Prompt

TOPICS = (
    "How do I prune an old apple tree in winter",
    "Write a short poem about the sea at night",
    "Explain quantum tunnelling to a curious child",
    "Which bread keeps longest in a hot summer",
    "Translate this sentence into formal German",
)
ENDINGS = ("?", " please?", " for me, please?", " in simple words", " and be brief about it")
TEXTS = [topic + ending for ending in ENDINGS for topic in TOPICS]
THRESHOLD = 0.85


def prompts(texts=TEXTS, values=None):
    """A prompt for each text, with the measure `quality.score` where it has a value."""
    values = values or {}
    return [
        prompt(text, measures={"quality.score": values[place]} if place in values else {})
        for place, text in enumerate(texts)
    ]


def cosines(texts):
    """Cosines in float64 by row number."""
    vectors = Hashing(HASHING["embedder"]).encode(texts).astype(np.float64)
    return vectors @ vectors.T


def components(texts, threshold):
    """Sets of row numbers that chains of neighbours join."""
    close = cosines(texts) >= threshold
    found = [{place} for place in range(len(texts))]
    for one, other in itertools.combinations(range(len(texts)), 2):
        if close[one, other]:
            joined = [part for part in found if one in part or other in part]
            found = [part for part in found if part not in joined] + [set().union(*joined)]
    return found


@pytest.mark.parametrize("linkage", ["components", "star"])
def test_a_dropped_row_names_a_kept_row_and_the_true_cosine_to_it(linkage, tmp_path):
    rows = prompts()
    split = applied(Near(threshold=THRESHOLD, linkage=linkage), Prompt, rows, tmp_path)
    place = {row.id: number for number, row in enumerate(rows)}
    exact = cosines(TEXTS)
    assert 0 < split.dropped.height < len(rows)
    for row in split.dropped.iter_rows(named=True):
        assert row["related"] in set(split.kept["id"])
        cosine = exact[place[row["id"]], place[row["related"]]]
        assert row["similarity"] == pytest.approx(cosine, abs=1e-6)
        assert row["reason"] == "near_duplicate"
        assert row["detail"].startswith("cosine 0.")
        if linkage == "star":
            assert cosine >= THRESHOLD


@pytest.mark.parametrize("threshold", [0.5, 0.7, THRESHOLD, 0.95])
def test_one_row_of_each_cluster_stays_and_knows_its_size(threshold, tmp_path):
    rows = prompts()
    parts = components(TEXTS, threshold)
    split = applied(Near(threshold=threshold), Prompt, rows, tmp_path)
    sizes = dict(zip(split.kept["id"], split.kept["measure.cluster_size"], strict=True))
    assert sizes == {rows[min(part)].id: len(part) for part in parts}
    assert sum(sizes.values()) == len(rows)


def test_a_star_counts_the_rows_that_were_dropped_for_it(tmp_path):
    split = applied(Near(threshold=0.7, linkage="star"), Prompt, prompts(), tmp_path)
    sizes = dict(zip(split.kept["id"], split.kept["measure.cluster_size"], strict=True))
    named = split.dropped["related"].to_list()
    assert sizes == {row: named.count(row) + 1 for row in sizes}


def test_equal_texts_are_neighbours_at_a_threshold_of_one(tmp_path):
    rows = [prompt(text, origin=str(i)) for i, text in enumerate([*TEXTS[:3], *TEXTS[:3]])]
    split = applied(Near(threshold=1), Prompt, rows, tmp_path)
    assert split.kept["id"].to_list() == [row.id for row in rows[:3]]
    assert split.dropped["related"].to_list() == [row.id for row in rows[:3]]


def test_the_longest_of_a_cluster_stays(tmp_path):
    rows = prompts()
    split = applied(Near(threshold=THRESHOLD, keep="longest"), Prompt, rows, tmp_path)
    expected = {
        rows[min(part, key=lambda place: (-len(TEXTS[place]), rows[place].id))].id
        for part in components(TEXTS, THRESHOLD)
    }
    assert set(split.kept["id"]) == expected


def test_the_row_with_the_highest_measure_stays_and_one_without_it_is_worth_least(tmp_path):
    parts = components(TEXTS, THRESHOLD)
    rng = random.Random(7)
    values = {place: rng.uniform(-5, 5) for place in range(len(TEXTS)) if place % 3}
    rows = prompts(values=values)
    step = Near(threshold=THRESHOLD, keep="highest", by="quality.score")
    split = applied(step, Prompt, rows, tmp_path)
    lowest = float("-inf")
    expected = {
        rows[min(part, key=lambda place: (-values.get(place, lowest), rows[place].id))].id
        for part in parts
    }
    assert set(split.kept["id"]) == expected
    assert expected != {rows[min(part)].id for part in parts}


@pytest.mark.parametrize(
    "fields", [{"keep": "highest"}, {"by": "quality.score"}, {"keep": "longest", "by": "x"}]
)
def test_highest_and_its_measure_go_together(fields):
    with pytest.raises(ValidationError, match="`keep: highest` and `by: <measure>` go together"):
        Near(**fields)


@pytest.mark.parametrize("threshold", [0, -0.1, 1.01])
def test_a_threshold_is_a_similarity_above_0_and_at_most_1(threshold):
    with pytest.raises(ValidationError, match="threshold"):
        Near(threshold=threshold)


@pytest.mark.parametrize("linkage", ["components", "star"])
@pytest.mark.parametrize("seed", range(4))
def test_with_the_longest_kept_the_order_of_the_rows_does_not_matter(seed, linkage, tmp_path):
    step = Near(threshold=0.8, keep="longest", linkage=linkage)
    rows = prompts()
    expected = applied(step, Prompt, rows, tmp_path)
    random.Random(seed).shuffle(rows)
    shuffled = applied(step, Prompt, rows, tmp_path)
    assert expected.dropped.height > 0
    assert set(shuffled.kept["id"]) == set(expected.kept["id"])
    columns = ["id", "related"]
    assert shuffled.dropped.sort("id")[columns].equals(expected.dropped.sort("id")[columns])


@pytest.mark.parametrize("kind", [Pair, Candidates])
@pytest.mark.parametrize("over", EQUAL_TO_ROW_0)
def test_over_says_which_part_of_a_row_is_compared(over, kind, tmp_path):
    rows = equal_in_parts(kind)
    split = applied(Near(over=over, threshold=0.99), kind, rows, tmp_path)
    found = dict(zip(split.dropped["id"], split.dropped["related"], strict=True))
    assert found == {rows[place].id: rows[0].id for place in EQUAL_TO_ROW_0[over]}


@pytest.mark.parametrize("linkage", ["components", "star"])
@pytest.mark.parametrize(
    "keep", [{"keep": "first"}, {"keep": "longest"}, {"keep": "highest", "by": "x.y"}]
)
@pytest.mark.parametrize("count", [0, 1])
def test_a_table_of_no_or_one_row_stays_as_it_is(count, keep, linkage, tmp_path):
    rows = prompts(TEXTS[:count])
    split = applied(Near(linkage=linkage, **keep), Prompt, rows, tmp_path)
    assert split.kept["id"].to_list() == [row.id for row in rows]
    assert split.kept["measure.cluster_size"].to_list() == [1.0] * count
    assert split.dropped.is_empty()


@pytest.mark.parametrize("linkage", ["components", "star"])
def test_rows_without_any_text_are_neighbours_of_nothing(linkage, tmp_path):
    rows = [candidates(f"question {place}", text) for place, text in enumerate(("", "hi", " "))]
    step = Near(threshold=0.01, over="response", linkage=linkage)
    assert applied(step, Candidates, rows, tmp_path).kept["id"].to_list() == [r.id for r in rows]


def test_a_thousand_equal_texts_are_one_comparison(tmp_path):
    rows = [prompt("Say hello", origin=str(place)) for place in range(1000)]
    split = applied(Near(), Prompt, rows, tmp_path)
    assert split.kept["measure.cluster_size"].to_list() == [1000.0]
    assert split.dropped["similarity"].to_list() == pytest.approx([1.0] * 999, abs=1e-6)
