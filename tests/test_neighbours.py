"""Neighbours by blocks, sketches, half precision and cells against the whole matrix at once."""

import importlib.util

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datakit import neighbours, neighbours_gpu, neighbours_sketch
from datakit.errors import InputError, MissingExtra
from datakit.neighbours import dots, k_nearest, nearest, pairs_between, pairs_over
from datakit.neighbours_ivf import IVF

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


# ------------------------------------------------------------------------------------- adversaries


def scaled(vectors):
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > 0).astype("f4")


def family(name, rows=150, width=64, seed=0):
    """Unit vectors that are hard for one bound or another."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(rows, width))
    centres = rng.normal(size=(6, width))
    match name:
        case "noise":
            return scaled(noise)
        case "clusters":
            return scaled(centres[rng.integers(6, size=rows)] + 0.25 * noise)
        case "tight":
            return scaled(centres[rng.integers(6, size=rows)] + 0.01 * noise)
        case "copies":
            return scaled(noise)[rng.integers(rows // 5, size=rows)]
        case "zeros":
            return scaled(noise * (rng.random((rows, 1)) < 0.5))
        case "all zeros":
            return np.zeros((rows, width), np.float32)
        case "all equal":
            return np.repeat(scaled(noise[:1]), rows, axis=0)
        case "opposite":
            return scaled(noise[:4][rng.integers(4, size=rows)] * rng.choice([-1, 1], (rows, 1)))
        case "axes":
            return np.eye(width, dtype=np.float32)[rng.integers(width, size=rows)]
        case "one plane":
            return scaled(rng.normal(size=(rows, 2)) @ rng.normal(size=(2, width)))
        case "one cone":
            return scaled(centres[:1] * 3 + noise)
        case _:
            raise AssertionError(name)


FAMILIES = (
    "noise", "clusters", "tight", "copies", "zeros", "all zeros", "all equal", "opposite", "axes",
    "one plane", "one cone",
)  # fmt: skip


@pytest.fixture(params=[0, None], ids=["sketch", "no sketch"])
def sketches(request, monkeypatch):
    """Sketches also for few rows, or never."""
    monkeypatch.setattr(neighbours_sketch, "_SMALL", 10**18 if request.param is None else 0)


@pytest.fixture
def always_sketch(monkeypatch):
    """Sketches even where they do not pay."""
    monkeypatch.setattr(neighbours_sketch, "_SMALL", 0)
    monkeypatch.setattr(neighbours_sketch, "_tile_ns", lambda numbers: 1e-3 * numbers)
    monkeypatch.setattr(neighbours_sketch, "_CHECK_NS", 1e-9)


def agrees(pairs, left, right, threshold, within):
    """The pairs are those of the whole float64 matrix, but for rounding at the threshold."""
    cosines = left.astype(np.float64) @ right.astype(np.float64).T
    if within:
        cosines[np.tril_indices(len(left))] = -np.inf
    found = np.zeros(cosines.shape, bool)
    found[pairs.first, pairs.second] = True
    assert len(pairs.first) == found.sum(), "no pair comes twice"
    assert found[cosines >= threshold].all()
    assert (cosines[found] >= threshold - 3e-6).all()
    assert pairs.similarity == pytest.approx(cosines[pairs.first, pairs.second], abs=1e-6)
    assert (np.diff(pairs.first * len(right) + pairs.second) > 0).all()


@pytest.mark.parametrize("threshold", [1.0, 0.999999, 0.9, 0.5, 0.01, 0.0, -0.5, -1.0])
@pytest.mark.parametrize("name", FAMILIES)
def test_sketches_lose_no_pair(name, threshold, sketches):
    vectors = family(name)
    agrees(pairs_over(vectors, threshold, 16), vectors, vectors, threshold, within=True)


@pytest.mark.parametrize("threshold", [1.0, 0.9, 0.5, 0.0])
@pytest.mark.parametrize("name", FAMILIES)
def test_sketches_lose_no_pair_even_where_they_do_not_pay(name, threshold, always_sketch):
    vectors = family(name)
    assert neighbours_sketch._directions(vectors, None, threshold) is not None
    agrees(pairs_over(vectors, threshold, 16), vectors, vectors, threshold, within=True)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.sampled_from(FAMILIES),
    st.sampled_from(FAMILIES),
    st.integers(1, 40),
    st.integers(5, 300),
    st.integers(-100, 100),
)
def test_pairs_between_are_those_of_the_whole_matrix(one, two, block, rows, hundredths):
    left, right = family(one, rows=90), family(two, rows=rows, seed=1 if rows % 2 else 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbours_sketch, "_SMALL", 0)
        pairs = pairs_between(left, right, hundredths / 100, block)
    agrees(pairs, left, right, hundredths / 100, within=False)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sampled_from(FAMILIES), st.integers(0, 10_000), st.integers(1, 63))
def test_the_bound_holds_for_any_directions(name, seed, count):
    vectors = family(name, seed=seed)
    draw = np.random.default_rng(seed).normal(size=(64, count))
    sketch = neighbours_sketch._sketch(vectors, np.linalg.qr(draw)[0])
    exact = vectors.astype(np.float64) @ vectors.astype(np.float64).T
    assert (sketch @ sketch.T >= exact - neighbours_sketch.slack(count + 1)).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_directions_are_orthonormal_even_of_vectors_without_enough(name):
    directions = neighbours_sketch._principal(family(name).astype(np.float64), 31)
    assert directions.T @ directions == pytest.approx(np.eye(31), abs=1e-12)


def test_few_directions_hold_most_of_vectors_that_have_few():
    vectors = family("clusters").astype(np.float64)
    inside = vectors @ neighbours_sketch._principal(vectors, 15)
    best = np.linalg.svd(vectors, compute_uv=False)[:15]
    assert (inside**2).sum() == pytest.approx((best**2).sum(), rel=0.02)


@pytest.mark.parametrize("name", ["clusters", "tight", "copies", "one cone"])
def test_pairs_are_the_same_bits_in_any_order_and_block(name, always_sketch):
    vectors = family(name, width=100)
    order = np.random.default_rng(5).permutation(len(vectors))
    straight, turned = pairs_over(vectors, 0.6), pairs_over(vectors[order], 0.6, 7)
    low = np.minimum(order[turned.first], order[turned.second])
    high = np.maximum(order[turned.first], order[turned.second])
    back = np.lexsort((high, low))
    assert len(straight.first)
    assert (low[back] == straight.first).all()
    assert (high[back] == straight.second).all()
    assert turned.similarity[back].tobytes() == straight.similarity.tobytes()


def test_pairs_between_one_set_and_itself_are_both_ways_and_the_diagonal():
    vectors = family("clusters")
    within, between = pairs_over(vectors, 0.5), pairs_between(vectors, vectors, 0.5)
    assert len(between.first) == 2 * len(within.first) + len(vectors)


@pytest.mark.parametrize("approximate", [None, IVF(lists=1, probes=1)])
def test_more_pairs_than_the_limit_stop_with_a_word(approximate):
    vectors = family("all equal", rows=100)
    assert len(pairs_over(vectors, 0.9, limit=4950, approximate=approximate).first) == 4950
    with pytest.raises(
        InputError, match=r"more than 4949 pairs .* 0.9 among 100 x 100 rows; raise"
    ):
        pairs_over(vectors, 0.9, limit=4949, approximate=approximate)


def test_no_rows_have_no_pairs_between():
    assert len(pairs_between(unit(0, 8), unit(3, 8), -1).first) == 0
    assert len(pairs_between(unit(3, 8), unit(0, 1), -1).first) == 0


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (np.full((3, 4), np.nan, np.float32), "row 0 of the vectors has the length nan"),
        (np.array([[1, 0], [np.inf, 0]], np.float32), "row 1 of the vectors has the length inf"),
        (np.array([[1, 0], [3, 4]], np.float32), "row 1 of the vectors has the length 5"),
        (np.ones(4, np.float32), "shape \\(4,\\)"),
        (np.ones((4, 0), np.float32), "shape \\(4, 0\\)"),
    ],
)
def test_vectors_that_have_no_cosine_are_refused(wrong, says):
    with pytest.raises(InputError, match=says):
        pairs_over(wrong, 0.5)
    with pytest.raises(InputError, match=says):
        nearest(wrong, wrong)


def test_two_widths_are_refused():
    with pytest.raises(InputError, match="have 3 numbers and the others 5"):
        pairs_between(unit(2, 3), unit(2, 5), 0.5)


def test_any_layout_and_float_type_will_do():
    vectors = family("clusters")
    expected = pairs_over(vectors, 0.5).similarity.tobytes()
    assert pairs_over(np.asfortranarray(vectors), 0.5).similarity.tobytes() == expected
    assert pairs_over(vectors.astype(np.float64), 0.5).similarity.tobytes() == expected
    vectors.setflags(write=False)
    assert pairs_over(vectors, 0.5).similarity.tobytes() == expected


# ---------------------------------------------------------------------------------------- nearest


def brute_nearest(left, right, k, exclude_self):
    """By the very sums that decide, all at once: row numbers and cosines."""
    rows, columns = np.divmod(np.arange(len(left) * len(right)), len(right))
    cosines = dots(left, right, rows, columns).reshape(len(left), len(right))
    if exclude_self:
        np.fill_diagonal(cosines, -np.inf)
    index = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
    return index, np.take_along_axis(cosines, index, axis=1)


@pytest.mark.parametrize("block", [1, 9, 512])
@pytest.mark.parametrize("k", [1, 2, 10, 149])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_k_nearest_of_one_set(name, k, block):
    vectors = family(name)
    index, similarity = k_nearest(vectors, vectors, k, exclude_self=True, block=block)
    expected, cosines = brute_nearest(vectors, vectors, k, exclude_self=True)
    assert index.tolist() == expected.tolist()
    assert similarity.tobytes() == cosines.tobytes()
    assert (index.dtype, similarity.dtype) == (np.int64, np.float32)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.sampled_from(FAMILIES),
    st.sampled_from(FAMILIES),
    st.integers(1, 200),
    st.integers(1, 60),
    st.integers(1, 30),
)
def test_the_k_nearest_of_another_set(one, two, rows, k, block):
    left, right = family(one, rows=40), family(two, rows=rows + 5, seed=rows % 2)
    k = min(k, len(right))
    index, similarity = k_nearest(left, right, k, block=block)
    expected, cosines = brute_nearest(left, right, k, exclude_self=False)
    assert index.tolist() == expected.tolist()
    assert similarity.tobytes() == cosines.tobytes()


@pytest.mark.parametrize("k", [1, 3, 20])
def test_the_nearest_of_a_crowd_that_differs_in_the_last_bits(k):
    one = family("all equal", rows=3000, width=32)
    one += np.random.default_rng(1).normal(size=one.shape).astype("f4") * 3e-8
    index, similarity = k_nearest(one[:20], one, k, block=8)
    expected, cosines = brute_nearest(one[:20], one, k, exclude_self=False)
    assert index.tolist() == expected.tolist()
    assert similarity.tobytes() == cosines.tobytes()


def test_k_is_what_there_is_to_choose_from():
    vectors = unit(5, 8)
    assert k_nearest(vectors, vectors, 5)[0].shape == (5, 5)
    assert k_nearest(unit(0, 8), vectors, 3)[0].shape == (0, 3)
    for k, alone in ((6, False), (5, True), (0, False), (-1, True)):
        with pytest.raises(InputError, match=f"k is {k}, but each row has {5 - alone} others"):
            k_nearest(vectors, vectors, k, exclude_self=alone)
    with pytest.raises(InputError, match="each row has 0 others"):
        nearest(vectors, unit(0, 8))
    with pytest.raises(InputError, match="5 vectors and 4 others"):
        k_nearest(vectors, vectors[:4], 1, exclude_self=True)


# ------------------------------------------------------------------------- half precision in torch

needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="torch is not installed"
)


@needs_torch
@pytest.mark.parametrize("block", [16, 4096])
@pytest.mark.parametrize("threshold", [1.0, 0.9, 0.5, 0.0])
@pytest.mark.parametrize("name", FAMILIES)
def test_half_precision_gives_the_same_bits(name, threshold, block, monkeypatch):
    vectors = family(name)
    expected = pairs_over(vectors, threshold)
    between = pairs_between(vectors[:40], vectors, threshold)
    monkeypatch.setattr(neighbours, "accelerator", lambda device: "cpu")
    monkeypatch.setattr(neighbours_gpu.candidates, "__defaults__", (block,))
    for found, known in (
        (pairs_over(vectors, threshold, device="auto"), expected),
        (pairs_between(vectors[:40], vectors, threshold, device="auto"), between),
    ):
        assert found.first.tolist() == known.first.tolist()
        assert found.second.tolist() == known.second.tolist()
        assert found.similarity.tobytes() == known.similarity.tobytes()


@needs_torch
@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.sampled_from(FAMILIES), st.integers(0, 10_000), st.sampled_from([1, 8, 64, 384]))
def test_half_precision_is_off_by_no_more_than_its_margin(name, seed, width):
    import torch

    rows = scaled(family(name, rows=40, width=max(width, 2), seed=seed)[:, :width])
    halves = torch.from_numpy(rows).half()
    exact = rows.astype(np.float64) @ rows.astype(np.float64).T
    off = np.abs((halves @ halves.T).double().numpy() - exact).max()
    assert off <= neighbours_gpu.margin(width)


@needs_torch
def test_a_gpu_that_is_not_there_is_only_missed_when_asked_for(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    vectors = family("clusters")
    assert len(pairs_over(vectors, 0.5, device="auto").first)
    with pytest.raises(InputError, match="torch sees no GPU here; take auto or cpu"):
        pairs_over(vectors, 0.5, device="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert neighbours_gpu.accelerator("auto") == neighbours_gpu.accelerator("cuda") == "cuda"
    assert neighbours_gpu.accelerator("cpu") == ""


def test_without_torch_there_is_no_gpu(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    assert neighbours_gpu.accelerator("auto") == ""
    with pytest.raises(MissingExtra, match="pip install 'datakit\\[embed\\]'"):
        neighbours_gpu.accelerator("cuda")


# ------------------------------------------------------------------------------------ approximate


@pytest.mark.parametrize("threshold", [0.9, 0.5, 0.0])
@pytest.mark.parametrize("name", FAMILIES)
def test_all_cells_searched_is_exact(name, threshold):
    vectors = family(name)
    exact = pairs_over(vectors, threshold)
    found = pairs_over(vectors, threshold, approximate=IVF(lists=5, probes=5))
    assert found.recall == 1
    assert found.first.tolist() == exact.first.tolist()
    assert found.second.tolist() == exact.second.tolist()
    assert found.similarity.tobytes() == exact.similarity.tobytes()


@pytest.mark.parametrize("name", ["noise", "clusters", "one plane"])
def test_few_cells_miss_pairs_and_say_how_many(name):
    vectors = family(name)
    exact = as_dict(pairs_over(vectors, 0.1))
    pairs = pairs_over(vectors, 0.1, approximate=IVF(lists=20, probes=1, sample=1000))
    found = as_dict(pairs)
    assert found.items() <= exact.items()
    # Every row is in the sample, so the measured recall is the true one.
    assert pairs.recall == pytest.approx(len(found) / len(exact))
    assert pairs.recall < 1
    again = pairs_over(vectors, 0.1, approximate=IVF(lists=20, probes=1, sample=30))
    assert as_dict(again) == found
    assert abs(again.recall - pairs.recall) < 0.2


def test_recall_without_any_pair_is_one():
    assert pairs_over(family("axes", rows=2), 0.9, approximate=IVF()).recall == 1


@pytest.mark.parametrize("wrong", [IVF(lists=0), IVF(lists=151), IVF(probes=0), IVF(sample=0)])
def test_cells_that_cannot_be_are_refused(wrong):
    with pytest.raises(InputError, match="take between 1 and 150 lists, and at least one probe"):
        pairs_over(family("noise"), 0.5, approximate=wrong)
