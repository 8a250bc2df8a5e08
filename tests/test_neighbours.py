"""Neighbours by blocks against the whole matrix at once."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datakit.neighbours import dots, nearest, pairs_over

BLOCKS = (1, 2, 7, 40, 41, 2048)


def unit(rows, width, seed=0):
    """Random float32 unit vectors, some of them near each other."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(max(rows // 4, 1), width))
    vectors = centres[rng.integers(len(centres), size=rows)] + 0.5 * rng.normal(size=(rows, width))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def brute_pairs(vectors, threshold):
    """Every pair i < j at or over the threshold and its cosine, in float64."""
    exact = vectors.astype(np.float64)
    return {
        (i, j): float(exact[i] @ exact[j])
        for i in range(len(exact))
        for j in range(i + 1, len(exact))
        if exact[i] @ exact[j] >= threshold
    }


def as_dict(pairs):
    found = dict(
        zip(
            zip(pairs.first.tolist(), pairs.second.tolist(), strict=True),
            pairs.similarity.tolist(),
            strict=True,
        )
    )
    assert len(found) == len(pairs.first), "no pair comes twice"
    return found


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.55, 0.9])
def test_pairs_are_those_of_the_whole_matrix_whatever_the_block(block, threshold):
    vectors = unit(41, 8)
    expected = brute_pairs(vectors, threshold)
    found = as_dict(pairs_over(vectors, threshold, block))
    assert found.keys() == expected.keys()
    assert [found[key] for key in expected] == pytest.approx(list(expected.values()), abs=1e-6)


@pytest.mark.parametrize("block", BLOCKS)
def test_first_is_always_before_second(block):
    pairs = pairs_over(unit(41, 4), 0.2, block)
    assert len(pairs.first)
    assert (pairs.first < pairs.second).all()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 25), st.integers(1, 30), st.integers(0, 1000), st.integers(-100, 100))
def test_pairs_are_those_of_the_whole_matrix_at_any_size(rows, block, seed, hundredths):
    vectors = unit(rows, 6, seed)
    threshold = hundredths / 100
    exact = vectors.astype(np.float64)
    cosines = (exact @ exact.T)[np.triu_indices(rows, 1)]
    found = as_dict(pairs_over(vectors, threshold, block))
    # What lies at the threshold, give or take the rounding of float32, may fall on either side.
    assert (cosines >= threshold + 2e-6).sum() <= len(found) <= (cosines >= threshold - 3e-6).sum()
    assert found.keys() >= brute_pairs(vectors, threshold + 2e-6).keys()


@pytest.mark.parametrize("width", [1, 3, 64, 384])
@pytest.mark.parametrize("block", [1, 2, 2048])
def test_equal_rows_are_neighbours_at_a_threshold_of_one(width, block):
    one = unit(30, width, seed=width)
    pairs = as_dict(pairs_over(np.concatenate([one, one]), 1.0, block))
    assert {(i, i + 30) for i in range(30)} <= pairs.keys()
    assert max(pairs.values()) <= 1


@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("block", [1, 2048])
def test_fewer_than_two_rows_have_no_pairs(rows, block):
    pairs = pairs_over(unit(rows, 5), -1, block)
    assert (pairs.first.shape, pairs.second.shape, pairs.similarity.shape) == ((0,), (0,), (0,))
    assert pairs.first.dtype == pairs.second.dtype == np.int64
    assert pairs.similarity.dtype == np.float32


@pytest.mark.parametrize("block", [1, 2, 3, 29, 30, 2048])
@pytest.mark.parametrize("others", [1, 2, 50])
def test_nearest_is_the_nearest_of_all(block, others):
    vectors, over = unit(30, 8), unit(others, 8, seed=1)
    exact = vectors.astype(np.float64) @ over.astype(np.float64).T
    index, similarity = nearest(vectors, over, block)
    assert index.tolist() == exact.argmax(axis=1).tolist()
    assert similarity == pytest.approx(exact.max(axis=1), abs=1e-6)
    assert similarity.dtype == np.float32
    assert (similarity <= 1).all()


def test_nearest_of_none_is_none():
    index, similarity = nearest(unit(0, 8), unit(3, 8))
    assert (len(index), len(similarity)) == (0, 0)


def test_nearest_takes_the_first_of_equals():
    over = unit(1, 8)
    index, _ = nearest(over, np.concatenate([-over, over, over]))
    assert index.tolist() == [1]


def test_dots_are_the_cosines_of_the_named_rows():
    one, other = unit(12, 8), unit(9, 8, seed=2)
    rng = np.random.default_rng(3)
    rows, columns = rng.integers(12, size=50), rng.integers(9, size=50)
    expected = [float(one[i].astype(float) @ other[j]) for i, j in zip(rows, columns, strict=True)]
    assert dots(one, other, rows, columns) == pytest.approx(expected, abs=1e-6)
    assert dots(one, one, np.arange(12), np.arange(12)).max() <= 1
