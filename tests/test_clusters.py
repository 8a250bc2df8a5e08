"""Clusters of duplicates: who belongs together, and who stays."""

import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from datakit.clusters import components, heads, representatives
from datakit.neighbours import Pairs, pairs_over

LINKAGES = ("components", "star")


def pairs_of(edges, similarity=None):
    """Pairs of an edge list."""
    first = np.array([min(edge) for edge in edges], np.int64)
    second = np.array([max(edge) for edge in edges], np.int64)
    cosines = np.ones(len(edges)) if similarity is None else similarity
    return Pairs(first, second, np.array(cosines, np.float32))


def union_find(size, edges):
    """The smallest row number of each row's component, the plain way."""
    parent = list(range(size))

    def root(row):
        while parent[row] != row:
            row = parent[row]
        return row

    for one, other in edges:
        low, high = sorted((root(one), root(other)))
        parent[high] = low
    return [root(row) for row in range(size)]


@st.composite
def graphs(draw):
    size = draw(st.integers(1, 30))
    rows = st.integers(0, size - 1)
    edges = draw(st.lists(st.tuples(rows, rows), max_size=45))
    return size, list(dict.fromkeys((min(e), max(e)) for e in edges if e[0] != e[1]))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(graphs())
@example((6, [(3, 5), (4, 5), (0, 4), (1, 3), (1, 2)]))
def test_components_are_those_of_a_union_find(graph):
    size, edges = graph
    assert components(size, pairs_of(edges)).tolist() == union_find(size, edges)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_long_chain_is_one_component(reverse):
    rows = list(range(500))
    np.random.default_rng(0).shuffle(rows)
    edges = list(itertools.pairwise(rows))
    assert set(components(500, pairs_of(edges[::-1] if reverse else edges)).tolist()) == {0}


def test_no_rows_and_no_pairs_have_no_clusters():
    assert components(0, pairs_of([])).tolist() == []
    assert components(3, pairs_of([])).tolist() == [0, 1, 2]


def unit(rows, width, seed):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(max(rows // 3, 1), width))
    vectors = centres[rng.integers(len(centres), size=rows)] + 0.4 * rng.normal(size=(rows, width))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@st.composite
def tables(draw):
    """Vectors, a threshold that is the cosine of no pair, and a priority."""
    rows, seed = draw(st.integers(1, 30)), draw(st.integers(0, 10_000))
    vectors = unit(rows, 5, seed)
    threshold = draw(st.sampled_from([0.3, 0.6, 0.8, 0.9]))
    cosines = (vectors.astype(float) @ vectors.T.astype(float))[np.triu_indices(rows, 1)]
    while len(cosines) and np.abs(cosines - threshold).min() < 1e-5:
        threshold += 1e-4
    return vectors, threshold, draw(st.permutations(range(rows)))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(tables())
def test_each_component_has_one_representative_and_it_is_the_best(table):
    vectors, threshold, priority = table
    pairs = pairs_over(vectors, threshold)
    stands = representatives(len(vectors), pairs, priority, "components")
    labels = components(len(vectors), pairs)
    rank = {row: place for place, row in enumerate(priority)}
    for label in set(labels.tolist()):
        members = np.flatnonzero(labels == label).tolist()
        assert {int(stands[row]) for row in members} == {min(members, key=rank.__getitem__)}


@settings(max_examples=80, deadline=None, derandomize=True)
@given(tables())
def test_a_star_drops_a_row_only_for_its_nearest_kept_neighbour_that_is_worth_more(table):
    vectors, threshold, priority = table
    stands = representatives(len(vectors), pairs_over(vectors, threshold), priority, "star")
    cosines = vectors.astype(float) @ vectors.T.astype(float)
    rank = {row: place for place, row in enumerate(priority)}
    kept = [row for row in range(len(vectors)) if stands[row] == row]
    for one in kept:
        assert all(cosines[one, other] < threshold for other in kept if other != one)
    for row in set(range(len(vectors))) - set(kept):
        better = [k for k in kept if cosines[row, k] >= threshold and rank[k] < rank[row]]
        assert stands[row] in better
        assert cosines[row, stands[row]] == pytest.approx(cosines[row, better].max(), abs=1e-6)


@pytest.mark.parametrize("linkage", LINKAGES)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(table=tables(), seed=st.integers(0, 1000))
def test_survivors_do_not_depend_on_the_order_of_the_rows(linkage, table, seed):
    vectors, threshold, priority = table

    def decided(order):
        """Who stands for whom, by the rows' numbers before they were ordered anew."""
        place = np.argsort(order)
        moved = vectors[order]
        pairs = pairs_over(moved, threshold)
        stands = representatives(len(moved), pairs, place[list(priority)], linkage)
        return {int(order[row]): int(order[stand]) for row, stand in enumerate(stands)}

    standing = np.arange(len(vectors))
    assert decided(np.random.default_rng(seed).permutation(standing)) == decided(standing)


CHAIN = np.array([[1, 0], [0.8, 0.6], [0.28, 0.96]], np.float32)
"""Three rows A, B, C: A ~ B and B ~ C with a cosine of 0.8, A and C with 0.28."""


@pytest.mark.parametrize(
    ("linkage", "priority", "stands"),
    [
        ("components", (0, 1, 2), [0, 0, 0]),
        ("components", (1, 0, 2), [1, 1, 1]),
        ("components", (2, 0, 1), [2, 2, 2]),
        ("star", (0, 1, 2), [0, 0, 2]),
        ("star", (1, 0, 2), [1, 1, 1]),
        ("star", (2, 1, 0), [0, 2, 2]),
        ("star", (0, 2, 1), [0, 0, 2]),
        ("star", (2, 0, 1), [0, 2, 2]),
    ],
)
def test_a_chain_is_joined_by_components_and_cut_by_stars(linkage, priority, stands):
    found = representatives(3, pairs_over(CHAIN, 0.7), priority, linkage)
    assert found.tolist() == stands


@pytest.mark.parametrize("priority", [(0, 1, 2, 3), (1, 0, 2, 3)])
def test_a_row_between_two_kept_neighbours_names_the_nearer(priority):
    # 0 and 1 are no neighbours; 2 lies between them, nearer to 1.
    angles = np.radians([0, 60, 40, 180])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    stands = representatives(4, pairs_over(vectors, 0.7), priority, "star")
    assert stands.tolist() == [0, 1, 1, 3]


@pytest.mark.parametrize("priority", [(0, 1, 2), (1, 0, 2)])
def test_a_row_between_two_equally_near_names_the_one_worth_more(priority):
    pairs = pairs_of([(0, 2), (1, 2)], [0.8, 0.8])
    stands = representatives(3, pairs, priority, "star")
    assert stands[2] == priority[0]


@pytest.mark.parametrize("linkage", LINKAGES)
@pytest.mark.parametrize("rows", [0, 1])
def test_fewer_than_two_rows_all_stay(rows, linkage):
    pairs = pairs_over(CHAIN[:rows], 0.5)
    assert representatives(rows, pairs, range(rows), linkage).tolist() == list(range(rows))


@pytest.mark.parametrize("linkage", LINKAGES)
def test_rows_without_neighbours_all_stay(linkage):
    pairs = pairs_over(np.eye(5, dtype=np.float32), 0.5)
    assert representatives(5, pairs, range(5), linkage).tolist() == [0, 1, 2, 3, 4]


def greedy(size, edges, priority, fixed=()):
    """The rows that a star keeps, the plain way."""
    kept = set()
    for row in priority:
        near = {a if b == row else b for a, b in edges if row in (a, b)}
        if row in fixed or not near & kept:
            kept.add(row)
    return kept


@settings(max_examples=150, deadline=None, derandomize=True)
@given(graphs(), st.data())
def test_stars_keep_what_a_walk_in_order_of_priority_keeps(graph, data):
    size, edges = graph
    priority = data.draw(st.permutations(range(size)))
    count = data.draw(st.integers(0, size))
    fixed = np.isin(np.arange(size), priority[:count])
    stands = representatives(size, pairs_of(edges), priority, "star", fixed)
    kept = {row for row in range(size) if stands[row] == row}
    assert kept == greedy(size, edges, priority, set(priority[:count]))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(graphs(), st.data())
def test_rows_that_are_fixed_stay_and_take_their_neighbours(graph, data):
    size, edges = graph
    priority = data.draw(st.permutations(range(size)))
    fixed = set(priority[: data.draw(st.integers(0, size))])
    similarity = data.draw(st.lists(st.floats(0, 1, width=32), min_size=45, max_size=45))
    pairs = pairs_of(edges, similarity[: len(edges)])
    mask = np.isin(np.arange(size), list(fixed))
    stands = representatives(size, pairs, priority, "components", mask)
    labels = union_find(size, edges)
    rank = {row: place for place, row in enumerate(priority)}
    near = dict(zip(edges, pairs.similarity.tolist(), strict=True))
    for row in range(size):
        members = [other for other in range(size) if labels[other] == labels[row]]
        if row in fixed:
            assert stands[row] == row
            continue
        assert stands[row] == row or rank[stands[row]] < rank[row]
        direct = {
            other: near[min(row, other), max(row, other)]
            for other in fixed
            if (min(row, other), max(row, other)) in near
        }
        if direct:
            assert direct[stands[row]] == pytest.approx(max(direct.values()), abs=1e-6)
        else:
            assert stands[row] == min(members, key=rank.__getitem__)


@pytest.mark.parametrize("size", [10, 5_000])
def test_a_chain_longer_than_the_rounds_keeps_every_second_row(size):
    edges = list(itertools.pairwise(range(size)))
    stands = representatives(size, pairs_of(edges), range(size), "star")
    assert stands.tolist() == [row - row % 2 for row in range(size)]


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 5), max_size=20), st.randoms(use_true_random=False))
def test_the_head_of_equal_rows_is_the_best_of_them(codes, random):
    priority = list(range(len(codes)))
    random.shuffle(priority)
    best, place = heads(np.array(codes, np.int64), priority)
    assert best.tolist() == sorted(set(best.tolist()))
    for row, code in enumerate(codes):
        same = [other for other, one in enumerate(codes) if one == code]
        assert best[place[row]] == min(same, key=priority.index)
