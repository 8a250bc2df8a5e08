"""Each way of choosing against a plain loop, and against the best subset there is."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from selection_twins import (
    NONE,
    clumped,
    information,
    optimum,
    plain_deita,
    plain_entropy,
    plain_facility,
    plain_k_center,
    room,
    served,
    tables,
    unit,
)

from datakit.curation import _facility, _greedy
from datakit.curation._deita import score_first
from datakit.curation._entropy import entropy, rbf_entropy
from datakit.curation._facility import coverage, facility, neighbour_graph
from datakit.curation._greedy import Blend
from datakit.curation._k_center import farthest, k_center
from datakit.curation._room import Room
from datakit.errors import InputError

quick = settings(max_examples=60, deadline=None)


# -- entropy -------------------------------------------------------------------------------------


@quick
@given(tables(), st.sampled_from([0.01, 0.1, 1.0]))
def test_entropy_takes_what_a_dense_greedy_takes(table, noise):
    vectors, budget = table
    taken = entropy(vectors, room(len(vectors), budget), NONE, noise)
    rows, gains = plain_entropy(vectors, budget, noise)
    assert len(set(taken.rows.tolist())) == budget
    assert taken.gains.tolist() == pytest.approx(gains, abs=1e-7)
    total = information(vectors, taken.rows, noise)
    assert total == pytest.approx(information(vectors, rows, noise), rel=1e-6, abs=1e-6)
    assert taken.gains.sum() == pytest.approx(total, abs=1e-7)


def test_entropy_takes_the_same_rows_where_pools_are_small():
    vectors = unit(3000, 24)
    taken = entropy(vectors, room(3000, 900), NONE, 0.1)
    rows, gains = plain_entropy(vectors, 900, 0.1)
    assert (taken.rows == rows).mean() > 0.99
    assert taken.gains.sum() >= 0.99 * sum(gains)
    assert taken.gains.tolist() == pytest.approx(gains, abs=1e-8)


@pytest.mark.parametrize("noise", [1e-3, 0.1, 10.0])
def test_gains_never_grow_nor_fall_below_zero(noise):
    vectors = np.concatenate([unit(60, 6), unit(20, 6), np.zeros((2, 6), np.float32)])
    gains = entropy(vectors, room(82, 82), NONE, noise).gains
    assert (np.diff(gains) <= 1e-12).all()
    assert (gains >= 0).all()


def test_a_row_that_is_known_already_is_taken_last():
    vectors = np.eye(4, dtype=np.float32)[[0, 0, 1, 2, 3]]
    taken = entropy(vectors, room(5, 5), NONE, 0.1)
    assert taken.rows.tolist() == [0, 2, 3, 4, 1]
    assert taken.gains[:4].tolist() == pytest.approx([0.5 * np.log(11)] * 4)


def test_a_thousand_equal_rows_are_taken_in_order():
    vectors = np.tile(unit(1, 8), (1000, 1))
    for way in (
        entropy(vectors, room(1000, 1000), NONE, 0.1),
        k_center(vectors, room(1000, 1000), NONE),
        facility(vectors, room(1000, 1000), NONE),
        facility(vectors, room(1000, 1000), NONE, 8, dense=0),
    ):
        assert way.rows.tolist() == list(range(1000))


@pytest.mark.parametrize("budget", [1, 2, 3, 4])
def test_greedy_entropy_is_within_its_bound_of_the_optimum(budget):
    for seed in range(5):
        vectors = clumped(9, 4, seed)
        got = entropy(vectors, room(9, budget), NONE, 0.1).gains.sum()
        best = optimum(9, budget, lambda some, rows=vectors: information(rows, some, 0.1))
        assert (1 - 1 / np.e) * best <= got <= best + 1e-9


@quick
@given(tables(25), st.sampled_from([0.5, 1.0]))
def test_rbf_gains_are_log_determinants(table, width):
    vectors, budget = table
    lengths = np.linalg.norm(vectors, axis=1)
    vectors = vectors[lengths > 0.5]
    budget = min(budget, len(vectors))
    if not budget:
        return
    taken = rbf_entropy(vectors, room(len(vectors), budget), NONE, 0.1, width)
    kernel = np.exp((vectors.astype(np.float64) @ vectors.T - 1) / width**2)
    known = [0.0]
    for count in range(1, budget + 1):
        some = taken.rows[:count]
        inside = kernel[np.ix_(some, some)]
        known.append(np.linalg.slogdet(np.eye(count) + inside / 0.1)[1] / 2)
    assert taken.gains.tolist() == pytest.approx(np.diff(known).tolist(), abs=1e-4)


def test_an_rbf_kernel_that_does_not_fit_is_refused(monkeypatch):
    monkeypatch.setattr("datakit.curation._entropy.RBF_CELLS", 50)
    with pytest.raises(InputError, match="use `kernel: linear`"):
        rbf_entropy(unit(10, 3), room(10, 6), NONE, 0.1, 1.0)


# -- facility ------------------------------------------------------------------------------------


@quick
@given(tables())
def test_facility_takes_what_a_plain_greedy_takes(table):
    vectors, budget = table
    similarity = np.minimum(vectors.astype(np.float64) @ vectors.T.astype(np.float64), 1)
    taken = facility(vectors, room(len(vectors), budget), NONE)
    _, gains = plain_facility(similarity, budget)
    assert taken.gains.tolist() == pytest.approx(gains, abs=1e-5)
    assert taken.gains.sum() == pytest.approx(served(similarity, taken.rows), abs=1e-5)


@pytest.mark.parametrize("budget", [1, 2, 3, 4])
def test_greedy_facility_is_within_its_bound_of_the_optimum(budget):
    for seed in range(5):
        vectors = clumped(9, 4, seed)
        similarity = vectors @ vectors.T
        got = served(similarity, facility(vectors, room(9, budget), NONE).rows)
        best = optimum(9, budget, lambda some, all_=similarity: served(all_, some))
        assert (1 - 1 / np.e) * best <= got <= best + 1e-6


@pytest.mark.parametrize("make", [unit, clumped])
def test_facility_on_the_graph_is_a_plain_greedy_on_the_graph(make):
    vectors = make(300, 8)
    width = 12
    taken = facility(vectors, room(300, 60), NONE, width, dense=0)
    index, cosine = neighbour_graph(vectors, width)
    similarity = np.zeros((300, 300))
    floor = np.maximum(cosine[:, -1:], 0)
    np.put_along_axis(similarity, index.astype(int), np.maximum(cosine - floor, 0), axis=1)
    _, gains = plain_facility(similarity, 60)
    assert taken.gains.tolist() == pytest.approx(gains, abs=1e-4)


def test_the_graph_loses_next_to_nothing_of_the_objective():
    vectors = clumped(2000, 16)
    dense = coverage(vectors, facility(vectors, room(2000, 200), NONE).rows).mean()
    graph = coverage(vectors, facility(vectors, room(2000, 200), NONE, 64, dense=0).rows).mean()
    assert graph >= 0.99 * dense


def test_the_graph_by_clusters_finds_most_neighbours():
    rng = np.random.default_rng(0)
    vectors = unit(60, 32)[rng.integers(0, 60, 6000)] + 0.08 * rng.normal(size=(6000, 32))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors = vectors.astype(np.float32)
    exact, best = neighbour_graph(vectors, 16)
    index, cosine = neighbour_graph(vectors, 16, exact=0)
    assert (index[:, 0] == np.arange(6000)).all()
    found = [len(set(one) & set(other)) for one, other in zip(exact, index, strict=True)]
    assert np.mean(found) / 16 > 0.95
    assert (cosine <= best + 1e-6).all()
    assert all(len(set(row)) == 16 for row in index.tolist())


def test_gains_of_facility_add_up_exactly_in_any_order():
    vectors = clumped(500, 8)
    table = _facility._Graph(*neighbour_graph(vectors, 10))
    for row in (3, 77, 401, 20):
        table.serve(row)
    other = _facility._Graph(*neighbour_graph(vectors, 10))
    for row in (20, 401, 3, 77):
        other.serve(row)
    assert (table.gains == other.gains).all()


# -- k-centre ------------------------------------------------------------------------------------


@quick
@given(tables())
def test_k_center_takes_what_the_plain_loop_takes(table):
    vectors, budget = table
    taken = k_center(vectors, room(len(vectors), budget), NONE)
    rows, gains = plain_k_center(vectors, budget, int(taken.rows[0]))
    assert taken.rows.tolist() == rows
    assert taken.gains.tolist() == pytest.approx(gains, abs=1e-9)
    assert (np.diff(taken.gains) <= 1e-9).all()


@pytest.mark.parametrize("make", [unit, clumped])
def test_k_center_takes_the_same_rows_where_pools_are_small(make, monkeypatch):
    vectors = make(4000, 16)
    monkeypatch.setattr("datakit.curation._k_center._CENTRES", 37)
    taken = k_center(vectors, room(4000, 1500), np.array([5]))
    rows, _ = plain_k_center(vectors, 1500, 5)
    assert taken.rows.tolist() == rows
    # The next gain would be the radius.
    far = farthest(vectors, taken.rows)
    assert far[vectors.any(axis=1)].max() <= taken.gains[-1] + 1e-6


@pytest.mark.parametrize("budget", [1, 2, 3])
def test_k_center_is_within_twice_the_least_radius(budget):
    for seed in range(5):
        vectors = unit(9, 3, seed)

        def chord(some, rows=vectors):
            return float(np.sqrt(2 * np.maximum(farthest(rows, np.array(some)), 0)).max())

        best = -optimum(9, budget, lambda some: -chord(some))
        assert chord(k_center(vectors, room(9, budget), NONE).rows) <= 2 * best + 1e-6


def test_k_center_begins_in_the_middle():
    vectors = np.array([[1, 0], [0.8, 0.6], [0, 1]], np.float32)
    taken = k_center(vectors, room(3, 3), NONE)
    assert taken.rows.tolist()[0] == 1
    assert taken.gains[0] == 2


# -- deita ---------------------------------------------------------------------------------------


@quick
@given(tables(), st.integers(0, 99), st.sampled_from([0.3, 0.9, 1.0]), st.booleans())
def test_deita_takes_what_the_published_loop_takes(table, seed, threshold, is_tied):
    vectors, budget = table
    score = np.random.default_rng(seed).random(len(vectors))
    score = np.round(score, 1) if is_tied else score
    taken = score_first(vectors, score, room(len(vectors), budget), NONE, threshold)
    assert taken.rows.tolist() == plain_deita(vectors, score, budget, threshold)
    assert taken.gains.tolist() == score[taken.rows].tolist()


@pytest.mark.parametrize("block", [3, 50])
def test_deita_takes_the_same_rows_in_blocks(block, monkeypatch):
    monkeypatch.setattr("datakit.curation._deita._BLOCK", block)
    vectors = clumped(1500, 8)
    score = np.random.default_rng(0).random(1500)
    for budget in (10, 300, 1500):
        taken = score_first(vectors, score, room(1500, budget), NONE, 0.9)
        assert taken.rows.tolist() == plain_deita(vectors, score, budget, 0.9)


# -- all -----------------------------------------------------------------------------------------

WAYS = {
    "entropy": lambda vectors, room, first, blend: entropy(vectors, room, first, 0.1, blend),
    "rbf": lambda vectors, room, first, blend: rbf_entropy(vectors, room, first, 0.1, 1.0, blend),
    "facility": lambda vectors, room, first, blend: facility(vectors, room, first, blend=blend),
    "graph": lambda vectors, room, first, blend: facility(vectors, room, first, 8, blend, dense=0),
    "k_center": k_center,
}


@pytest.mark.parametrize("way", WAYS)
@quick
@given(tables(), st.data())
def test_rooms_and_first_rows_are_kept(way, table, data):
    vectors, _ = table
    rows = len(vectors)
    group = np.array(data.draw(st.lists(st.integers(0, 2), min_size=rows, max_size=rows)))
    caps = np.array(data.draw(st.lists(st.integers(0, 8), min_size=3, max_size=3)))
    first = data.draw(st.lists(st.integers(0, rows - 1), unique=True, max_size=3))
    first = [row for row in first if (group[first] == group[row]).sum() <= caps[group[row]]]
    taken = WAYS[way](vectors, Room(group, caps), np.array(first, np.int64), Blend()).rows
    assert taken[: len(first)].tolist() == first
    assert len(set(taken.tolist())) == len(taken)
    there = np.bincount(group, minlength=3)
    assert np.bincount(group[taken], minlength=3).tolist() == np.minimum(there, caps).tolist()


@pytest.mark.parametrize("way", WAYS)
def test_a_bonus_alone_takes_the_highest(way):
    vectors = unit(50, 6)
    bonus = np.random.default_rng(0).random(50)
    taken = WAYS[way](vectors, room(50, 20), NONE, Blend(0.0, bonus)).rows
    assert taken.tolist() == np.argsort(-bonus)[:20].tolist()


@pytest.mark.parametrize("way", WAYS)
def test_the_more_a_bonus_counts_the_more_of_it_is_taken(way):
    vectors = unit(200, 6)
    bonus = np.random.default_rng(0).random(200)
    got = [
        bonus[WAYS[way](vectors, room(200, 30), NONE, Blend(1 - share, share * bonus)).rows].mean()
        for share in (0.0, 0.5, 1.0)
    ]
    assert got[0] < got[1] <= got[2] + 1e-12


def test_a_blend_is_a_plain_greedy_over_the_blended_gain():
    vectors = unit(80, 6)
    bonus = np.random.default_rng(0).random(80)
    taken = k_center(vectors, room(80, 30), np.array([4]), Blend(0.7, 0.3 * bonus)).rows
    rows, exact = [4], vectors.astype(np.float64)
    for _ in range(29):
        far = 1 - (exact @ exact[rows].T).max(axis=1)
        key = 0.7 * far + 0.3 * bonus
        key[rows] = -np.inf
        rows.append(int(key.argmax()))
    assert taken.tolist() == rows


def test_small_pools_and_chunks_change_nothing():
    vectors = clumped(400, 8)

    class Way:
        """Keys that fall when a row is taken, with bounds that are not tight."""

        def __init__(self):
            self.keys = np.round(np.random.default_rng(1).random(400), 1)
            self.pool = None

        def bounds(self, rows):
            return self.keys[rows] + 0.05

        def exact(self, rows):
            return self.keys[rows].copy()

        def enter(self, rows):
            self.pool = rows
            return self.keys[rows].copy()

        def take(self, place):
            row = self.pool[place]
            gain = self.keys[row]
            self.keys = np.where(vectors @ vectors[row] > 0.5, self.keys * 0.9, self.keys)
            return gain, self.keys[self.pool].copy()

    plain, way, free = [], Way(), np.ones(400, bool)
    for _ in range(150):
        best = int(np.where(free, way.keys, -np.inf).argmax())
        plain.append(best)
        free[best] = False
        way.keys = np.where(vectors @ vectors[best] > 0.5, way.keys * 0.9, way.keys)
    for pool, chunk in ((1, 1), (3, 7), (400, 400), (64, 10)):
        taken = _greedy.greedy(Way(), room(400, 150), NONE, pool, chunk)
        assert taken.rows.tolist() == plain
