"""Plain loops that the ways of choosing must agree with, and vectors to try both on."""

import itertools

import numpy as np
from hypothesis import strategies as st

from datakit.curation._room import Room

NONE = np.zeros(0, np.int64)


def unit(rows, width, seed=0):
    """Unit vectors of falling spectrum."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(rows, width)) * np.linspace(0.2, 2, width)
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def clumped(rows, width, seed=0):
    """Unit vectors in clumps, with exact duplicates and a zero row among them."""
    rng = np.random.default_rng(seed)
    centres = unit(max(2, rows // 8), width, seed)
    vectors = centres[rng.integers(0, len(centres), rows)]
    vectors = vectors + rng.normal(size=vectors.shape) * rng.choice([0, 0.05, 0.3], (rows, 1))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors[rng.integers(0, rows)] = 0
    return vectors.astype(np.float32)


@st.composite
def tables(draw, most=40):
    """(vectors, budget): small tables, plain or clumped, of any width."""
    rows = draw(st.integers(1, most))
    width = draw(st.sampled_from([1, 2, 5, 16]))
    made = draw(st.sampled_from([unit, clumped]))
    return made(rows, width, draw(st.integers(0, 1000))), draw(st.integers(1, rows))


def room(rows, budget):
    return Room.of_rows(rows, budget)


def information(vectors, taken, noise):
    """Half the log-determinant of I + K/noise over the rows taken, in nats."""
    rows = vectors[list(taken)].astype(np.float64)
    sign, value = np.linalg.slogdet(np.eye(len(rows)) + rows @ rows.T / noise)
    assert sign == 1
    return value / 2


def plain_entropy(vectors, budget, noise):
    """Every row brought up to date at every step: O(budget n d)."""
    rows = vectors.astype(np.float64)
    left = np.einsum("nd,nd->n", rows, rows)
    inverse = np.eye(rows.shape[1])
    taken, gains = [], []
    free = np.ones(len(rows), bool)
    for _ in range(budget):
        best = int(np.where(free, np.round(left, 11), -np.inf).argmax())
        variance = max(float(left[best]), 0.0)
        taken.append(best)
        gains.append(0.5 * np.log1p(variance / noise))
        free[best] = False
        direction = inverse @ rows[best]
        inverse -= np.outer(direction, direction) / (variance + noise)
        left -= (rows @ direction) ** 2 / (variance + noise)
    return taken, gains


def served(similarity, taken):
    """Facility location: the sum over all rows of the best similarity to a row taken, or 0."""
    if not len(taken):
        return 0.0
    return float(np.maximum(similarity[:, list(taken)].max(axis=1), 0).sum())


def plain_facility(similarity, budget):
    """Every gain worked out at every step."""
    taken, gains = [], []
    best_of = np.zeros(len(similarity))
    for _ in range(budget):
        worth = np.maximum(similarity - best_of[:, None], 0).sum(axis=0)
        worth[taken] = -np.inf
        best = int(np.round(worth, 6).argmax())
        taken.append(best)
        gains.append(worth[best])
        best_of = np.maximum(best_of, similarity[:, best])
    return taken, gains


def plain_k_center(vectors, budget, start):
    """The published loop, in float64; exact ties go to the first row."""
    rows = vectors.astype(np.float64)
    taken, gains = [start], [2.0]
    far = 1 - rows @ rows[start]
    free = np.ones(len(rows), bool)
    free[start] = False
    while len(taken) < budget:
        best = int(np.where(free, np.round(far, 12), -np.inf).argmax())
        taken.append(best)
        gains.append(max(far[best], 0))
        free[best] = False
        far = np.minimum(far, 1 - rows @ rows[best])
    return taken, gains


def plain_deita(vectors, score, budget, threshold):
    """The published loop: one row at a time against all that are kept."""
    rows = vectors.astype(np.float64)
    kept = []
    for row in np.argsort(-score, kind="stable").tolist():
        if len(kept) == budget:
            break
        if not kept or not (rows[kept] @ rows[row] > threshold).any():
            kept.append(row)
    return kept


def optimum(rows, budget, value):
    """The best value of any subset of `budget` of `rows` rows."""
    return max(value(subset) for subset in itertools.combinations(range(rows), budget))
