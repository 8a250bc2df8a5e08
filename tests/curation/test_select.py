"""Subset selection: budgets, and gains against a brute-force greedy log-determinant."""

import random

import numpy as np
import pytest
from pydantic import ValidationError
from steps_kit import EQUAL_TO_ROW_0, HASHING, applied, equal_in_parts, prompt

from datakit.curation.select import Select, max_entropy
from datakit.models.embed import Hashing
from datakit.records import Candidates, Pair, Prompt

WORDS = [
    "apple",
    "bread",
    "cedar",
    "delta",
    "ember",
    "field",
    "grove",
    "harbor",
    "island",
    "lantern",
    "meadow",
    "north",
]


def texts(count, seed=0):
    """Distinct texts that share words, so that some say what others say."""
    rng = random.Random(seed)
    return [f"{place} {' '.join(rng.choices(WORDS, k=6))}" for place in range(count)]


def prompts(count, seed=0):
    return [prompt(text) for text in texts(count, seed)]


def unit(rows, width, seed=0):
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(rows, width)) * np.linspace(0.2, 2, width)
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def information(vectors, taken, noise):
    """Half the log-determinant of I + K/noise over the rows taken, in nats."""
    rows = vectors[list(taken)].astype(np.float64)
    sign, value = np.linalg.slogdet(np.eye(len(rows)) + rows @ rows.T / noise)
    assert sign == 1
    return value / 2


@pytest.mark.parametrize("noise", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("width", [3, 8, 64])
def test_gains_and_choices_are_those_of_a_brute_force_greedy(width, noise):
    vectors = unit(40, width)
    taken, gains = max_entropy(vectors, 40, noise)
    assert sorted(taken.tolist()) == list(range(40))
    before, known = [], 0.0
    for row, gain in zip(taken.tolist(), gains.tolist(), strict=True):
        possible = {
            other: information(vectors, [*before, other], noise) - known
            for other in set(range(40)) - set(before)
        }
        assert gain == pytest.approx(possible[row], abs=1e-8)
        assert possible[row] >= max(possible.values()) - 1e-9
        before.append(row)
        known = information(vectors, before, noise)
    assert gains.sum() == pytest.approx(known, abs=1e-8)


@pytest.mark.parametrize("noise", [1e-3, 0.1, 10.0])
def test_gains_never_grow_nor_fall_below_zero(noise):
    vectors = np.concatenate([unit(60, 6), unit(20, 6), np.zeros((2, 6), np.float32)])
    _, gains = max_entropy(vectors, len(vectors), noise)
    assert (np.diff(gains) <= 1e-12).all()
    assert (gains >= 0).all()


def test_a_row_that_is_known_already_is_taken_last():
    vectors = np.eye(4, dtype=np.float32)[[0, 0, 1, 2, 3]]
    taken, gains = max_entropy(vectors, 5, 0.1)
    assert taken.tolist()[-1] == 1
    assert gains[:4].tolist() == pytest.approx([0.5 * np.log(11)] * 4)


@pytest.mark.parametrize("method", ["entropy", "random"])
@pytest.mark.parametrize(
    ("keep", "rows", "kept"),
    [
        (1, 12, 1),
        (5, 12, 5),
        (12, 12, 12),
        (100, 12, 12),
        (0.25, 12, 3),
        (0.5, 12, 6),
        (0.99, 12, 12),
        (0.01, 12, 1),
        (0.5, 1, 1),
        (3, 0, 0),
        (0.5, 0, 0),
    ],
)
def test_a_budget_is_a_number_of_rows_or_a_share_of_them(keep, rows, kept, method, tmp_path):
    split = applied(Select(keep=keep, method=method), Prompt, prompts(rows), tmp_path)
    assert (split.kept.height, split.dropped.height) == (kept, rows - kept)


@pytest.mark.parametrize("keep", [0, -1, -0.5, 1.0, 2.5, float("inf"), float("nan")])
def test_a_budget_that_is_neither_is_refused(keep):
    with pytest.raises(ValidationError, match="keep"):
        Select(keep=keep)


def test_kept_rows_carry_their_gain_and_the_order_in_which_they_were_taken(tmp_path):
    rows = prompts(40)
    split = applied(Select(keep=15, noise=0.2), Prompt, rows, tmp_path)
    vectors = Hashing(HASHING["embedder"]).encode([row.messages[0].content for row in rows])
    place = {row.id: number for number, row in enumerate(rows)}
    kept = split.kept.sort("measure.order")
    assert kept["measure.order"].to_list() == list(range(15))
    taken = [place[row] for row in kept["id"]]
    known = [information(vectors, taken[:count], 0.2) for count in range(16)]
    assert kept["measure.gain"].to_list() == pytest.approx(np.diff(known).tolist(), abs=1e-8)


@pytest.mark.parametrize("method", ["entropy", "random"])
def test_a_dropped_row_names_its_nearest_kept_row(method, tmp_path):
    rows = prompts(40)
    split = applied(Select(keep=10, method=method), Prompt, rows, tmp_path)
    vectors = Hashing(HASHING["embedder"]).encode([row.messages[0].content for row in rows])
    place = {row.id: number for number, row in enumerate(rows)}
    exact = vectors.astype(np.float64) @ vectors.T.astype(np.float64)
    kept = [place[row] for row in split.kept["id"]]
    assert split.dropped.height == 30
    for row in split.dropped.iter_rows(named=True):
        to_kept = exact[place[row["id"]], kept]
        assert row["similarity"] == pytest.approx(to_kept.max(), abs=1e-6)
        cosine = exact[place[row["id"]], place[row["related"]]]
        assert cosine == pytest.approx(to_kept.max(), abs=1e-6)
        assert place[row["related"]] in kept
        assert row["reason"] == "not_selected"


def drawn(rows, folder, **how):
    split = applied(Select(keep=10, method="random"), Prompt, rows, folder, **how)
    assert split.kept.columns == ["id"], "a random row has no gain"
    return set(split.kept["id"])


def test_random_rows_are_drawn_by_seed_and_alias_and_not_by_order(tmp_path):
    rows = prompts(40)
    assert drawn(rows, tmp_path, seed=1) == drawn(rows, tmp_path, seed=1)
    assert drawn(rows, tmp_path, seed=1) != drawn(rows, tmp_path, seed=2)
    assert drawn(rows, tmp_path, alias="one") != drawn(rows, tmp_path, alias="two")
    assert drawn(rows, tmp_path) == drawn(rows[::-1], tmp_path)
    assert drawn(rows, tmp_path) == drawn(random.Random(3).sample(rows, 40), tmp_path)


@pytest.mark.parametrize("kind", [Pair, Candidates])
@pytest.mark.parametrize("over", EQUAL_TO_ROW_0)
def test_over_says_what_a_row_tells(over, kind, tmp_path):
    rows = equal_in_parts(kind)
    same = EQUAL_TO_ROW_0[over]
    split = applied(Select(keep=len(rows) - len(same), over=over), kind, rows, tmp_path)
    # What row 0 and its equals tell is worth taking once.
    assert len(set(split.kept["id"]) & {rows[place].id for place in same | {0}}) == 1
    assert split.dropped["similarity"].to_list() == pytest.approx([1] * len(same))
