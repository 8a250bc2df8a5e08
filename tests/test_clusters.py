"""Clusters of duplicates: who belongs together, and who stays."""

import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from datakit.clusters import components, representatives
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
    stands, similarity = representatives(vectors, pairs, priority, "components")
    labels = components(len(vectors), pairs)
    rank = {row: place for place, row in enumerate(priority)}
    for label in set(labels.tolist()):
        members = np.flatnonzero(labels == label).tolist()
        assert {int(stands[row]) for row in members} == {min(members, key=rank.__getitem__)}
    exact = np.einsum("nd,nd->n", vectors.astype(float), vectors[stands].astype(float))
    assert similarity == pytest.approx(exact, abs=1e-6)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(tables())
def test_a_star_drops_a_row_only_for_its_nearest_kept_neighbour_that_is_worth_more(table):
    vectors, threshold, priority = table
    stands, similarity = representatives(vectors, pairs_over(vectors, threshold), priority, "star")
    cosines = vectors.astype(float) @ vectors.T.astype(float)
    rank = {row: place for place, row in enumerate(priority)}
    kept = [row for row in range(len(vectors)) if stands[row] == row]
    for one in kept:
        assert all(cosines[one, other] < threshold for other in kept if other != one)
    for row in set(range(len(vectors))) - set(kept):
        better = [k for k in kept if cosines[row, k] >= threshold and rank[k] < rank[row]]
        assert stands[row] in better
        assert cosines[row, stands[row]] == pytest.approx(cosines[row, better].max(), abs=1e-6)
        assert similarity[row] == pytest.approx(cosines[row, stands[row]], abs=1e-6)


@pytest.mark.parametrize("linkage", LINKAGES)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(table=tables(), seed=st.integers(0, 1000))
def test_survivors_do_not_depend_on_the_order_of_the_rows(linkage, table, seed):
    vectors, threshold, priority = table

    def decided(order):
        """Who stands for whom, by the rows' numbers before they were ordered anew."""
        place = np.argsort(order)
        moved = vectors[order]
        stands, _ = representatives(
            moved, pairs_over(moved, threshold), place[list(priority)].tolist(), linkage
        )
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
    found, similarity = representatives(CHAIN, pairs_over(CHAIN, 0.7), priority, linkage)
    assert found.tolist() == stands
    expected = [float(CHAIN[row] @ CHAIN[stand]) for row, stand in enumerate(stands)]
    assert similarity == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("priority", [(0, 1, 2, 3), (1, 0, 2, 3)])
def test_a_row_between_two_kept_neighbours_names_the_nearer(priority):
    # 0 and 1 are no neighbours; 2 lies between them, nearer to 1.
    angles = np.radians([0, 60, 40, 180])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    stands, _ = representatives(vectors, pairs_over(vectors, 0.7), priority, "star")
    assert stands.tolist() == [0, 1, 1, 3]


@pytest.mark.parametrize("priority", [(0, 1, 2), (1, 0, 2)])
def test_a_row_between_two_equally_near_names_the_one_worth_more(priority):
    pairs = pairs_of([(0, 2), (1, 2)], [0.8, 0.8])
    stands, _ = representatives(CHAIN[[0, 2, 1]], pairs, priority, "star")
    assert stands[2] == priority[0]


@pytest.mark.parametrize("linkage", LINKAGES)
@pytest.mark.parametrize("rows", [0, 1])
def test_fewer_than_two_rows_all_stay(rows, linkage):
    vectors = CHAIN[:rows]
    stands, similarity = representatives(vectors, pairs_over(vectors, 0.5), range(rows), linkage)
    assert stands.tolist() == list(range(rows))
    assert similarity.tolist() == [1.0] * rows


@pytest.mark.parametrize("linkage", LINKAGES)
def test_rows_without_neighbours_all_stay_with_similarity_one(linkage):
    vectors = np.eye(5, dtype=np.float32)
    stands, similarity = representatives(vectors, pairs_over(vectors, 0.5), range(5), linkage)
    assert stands.tolist() == [0, 1, 2, 3, 4]
    assert similarity.tolist() == [1.0] * 5
