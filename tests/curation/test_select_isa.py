"""ISA: the leave-one-out identity, the mixture against its own definition, and the budget rule."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from selection_twins import clumped, unit

from datakit.curation._isa import (
    delta_entropy,
    fit_mixture,
    log_likelihoods,
    plateau,
    principal_components,
)
from datakit.errors import InputError


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=30))
def test_what_leaves_with_a_row_is_the_entropy_without_it(likely):
    values = np.array(likely)
    spread = values.max() - values.min()
    scaled = (values - values.min()) / spread if spread > 0 else np.zeros(len(values))
    chance = np.exp(scaled)

    def information(some):
        return -(some * np.log(some)).sum()

    gone = [information(chance) - information(np.delete(chance, i)) for i in range(len(values))]
    delta = delta_entropy(values)
    assert delta.tolist() == pytest.approx(gone, abs=1e-9)
    assert ((delta <= 0) & (delta >= -np.e - 1e-12)).all()


def test_a_mixture_finds_two_clouds_and_likes_its_middles():
    rng = np.random.default_rng(0)
    points = np.concatenate([rng.normal(0, 1, (800, 3)), rng.normal(8, 0.5, (200, 3))])
    far = np.array([[30.0, -30, 30]])
    likely = fit_mixture(np.concatenate([points, far]), np.random.default_rng(1))
    assert likely.argmin() == 1000
    middle = np.abs(points[:800]).sum(axis=1)
    assert np.corrcoef(middle, likely[:800])[0, 1] < -0.8

    def density(x, mean, deviation):
        scaled = (((x - mean) / deviation) ** 2).sum(axis=1)
        return np.exp(-scaled / 2) / (deviation * np.sqrt(2 * np.pi)) ** 3

    true = np.log(0.8 * density(points, 0, 1) + 0.2 * density(points, 8, 0.5))
    without = fit_mixture(points, np.random.default_rng(1))
    assert without.mean() == pytest.approx(true.mean(), abs=0.05)
    assert np.corrcoef(without, true)[0, 1] > 0.99


@pytest.mark.parametrize("rows", [1, 2, 3, 50])
@pytest.mark.parametrize("make", [unit, clumped])
def test_likelihoods_are_numbers_and_repeat(make, rows):
    vectors = make(rows, 8)
    first = log_likelihoods(vectors, np.random.default_rng(0))
    assert first.shape == (rows,)
    assert np.isfinite(first).all()
    assert (first == log_likelihoods(vectors, np.random.default_rng(0))).all()
    same = np.tile(vectors[:1], (rows, 1))
    assert np.isfinite(log_likelihoods(same, np.random.default_rng(0))).all()


def test_principal_components_keep_distances_of_data_that_has_few():
    vectors = np.concatenate([unit(50, 4), np.zeros((50, 6), np.float32)], axis=1)
    points = principal_components(vectors, 4)
    for one, other in ((0, 1), (5, 9)):
        true = np.linalg.norm(vectors[one] - vectors[other])
        assert np.linalg.norm(points[one] - points[other]) == pytest.approx(true, abs=1e-5)
    assert principal_components(vectors, 9).shape == (50, 4)


@pytest.mark.parametrize(
    ("r", "a", "b"),
    # The paper's fits, whose shares are in per cent.
    [(83.17, 18.27, 30.0), (24.66, 8.45, 2.0), (27.48, 7.60, 5.5)],
)
def test_the_budget_rule_finds_the_curve_that_made_its_points(r, a, b):
    shares = [0.01, 0.035, 0.1, 0.3, 1.0]
    points = [(share, r - (r - a) * np.exp(-b * share)) for share in shares]
    found = plateau(points)
    assert (found.r, found.a, found.b) == pytest.approx((r, a, b), rel=1e-4)
    assert found.share == pytest.approx(np.log(20) / b, rel=1e-4)
    assert found.at(found.share) == pytest.approx(r - 0.05 * (r - a), rel=1e-4)


@pytest.mark.parametrize(
    ("points", "said"),
    [
        ([(0.1, 1), (0.5, 2)], "three shares or more"),
        ([(0.1, 1), (0.1, 2), (0.5, 2)], "three shares or more"),
        ([(0.1, 1), (0.2, float("nan")), (0.5, 2)], "numbers"),
        ([(0.1, 3), (0.2, 2), (0.4, 1.5)], "do not level off"),
        ([(0.1, 0.01), (0.5, 0.25), (1.0, 1.0)], "do not level off"),
    ],
)
def test_points_without_a_plateau_are_refused(points, said):
    with pytest.raises(InputError, match=said):
        plateau(points)
