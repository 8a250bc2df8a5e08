"""Information-based sampling: rows by how much entropy leaves with them.

Source: efficient alignment via data sampling (ISA, 2411.10545). A mixture of two Gaussians over the
    embeddings gives each row a log-likelihood; min-max normalised to l in 0..1, the entropy changes
    by -l exp(l) when the row leaves. That is a ranking by likelihood. The paper sorts by falling
    change, which read with its sign (`signed`) keeps the least likely rows, and read by its size
    (`absolute`) the most likely. Ours differs in that the Gaussians are diagonal, over the first
    principal components: full covariances of thousands of dimensions have no stable fit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.random import Generator

from datakit.curation._room import Floats, Ints
from datakit.errors import InputError
from datakit.models.embed import Vectors

Order = Literal["signed", "absolute"]

_BLOCK = 16_384
_FLOOR = 1e-6
"""Least variance of a component, as a share of the variance of the data."""


def delta_entropy(log_likelihood: Floats) -> Floats:
    """H(all) - H(all but the row) of each row, in nats, in -e..0; both [n].

    With l the log-likelihood scaled to 0..1 and p = exp(l), which does not sum to one, H is
    -sum p log p, and what leaves with a row is -p log p = -l exp(l).
    """
    if not len(log_likelihood):
        return np.zeros(0)
    low, high = float(log_likelihood.min()), float(log_likelihood.max())
    scaled = (log_likelihood - low) / (high - low) if high > low else np.zeros(len(log_likelihood))
    return -scaled * np.exp(scaled)


def isa_order(log_likelihood: Floats, order: Order) -> Ints:
    """Row numbers, the first to be kept first; ties go to the lower row number."""
    delta = delta_entropy(log_likelihood)
    worth = delta if order == "signed" else np.abs(delta)
    return np.argsort(-worth, kind="stable")


def log_likelihoods(
    vectors: Vectors, draw: Generator, dimensions: int = 32, inits: int = 4, steps: int = 200
) -> Floats:
    """Log-likelihood in nats of each row under two diagonal Gaussians, in float64 [n].

    vectors: [n, d]; the Gaussians live on the first `dimensions` principal components. The best
    of `inits` starts, each of at most `steps` rounds of expectation and maximisation.
    """
    points = principal_components(vectors, dimensions)
    best: tuple[float, Floats] | None = None
    for _ in range(inits):
        found = fit_mixture(points, draw, steps=steps)
        mean = float(found.mean()) if len(found) else 0.0
        if best is None or mean > best[0]:
            best = mean, found
    assert best is not None
    return best[1]


def principal_components(vectors: Vectors, dimensions: int) -> Floats:
    """The rows about their mean on the axes of most variance, in float64 [n, <= dimensions]."""
    rows, width = vectors.shape
    if rows < 2:
        return np.zeros((rows, 1))
    mean = vectors.mean(axis=0, dtype=np.float64)
    scatter = np.zeros((width, width))
    for start in range(0, rows, _BLOCK):
        some = vectors[start : start + _BLOCK].astype(np.float64) - mean
        scatter += some.T @ some
    values, axes = np.linalg.eigh(scatter / rows)
    # What has next to no variance is rounding, whose likelihood would mean nothing.
    count = int(np.count_nonzero(values > _FLOOR * max(float(values[-1]), 1e-12)))
    axes = axes[:, ::-1][:, : max(1, min(dimensions, count))]
    points = np.empty((rows, axes.shape[1]))
    for start in range(0, rows, _BLOCK):
        some = vectors[start : start + _BLOCK].astype(np.float64) - mean
        points[start : start + _BLOCK] = some @ axes
    return points


def fit_mixture(
    points: Floats, draw: Generator, steps: int = 200, tolerance: float = 1e-6
) -> Floats:
    """Log-likelihood of each of `points` [n, p] under two diagonal Gaussians fitted to them [n]."""
    count = len(points)
    if count < 2:
        return np.zeros(count)
    floor = _FLOOR * float(points.var(axis=0).mean()) + 1e-12
    means = points[draw.choice(count, 2, replace=False)]
    spread = np.tile(points.var(axis=0) + floor, (2, 1))
    log_share = np.log([0.5, 0.5])
    squares = points**2
    before = -np.inf
    joint = np.zeros((count, 2))
    for _ in range(steps):
        weights = 1 / spread
        joint = squares @ weights.T * -0.5 + points @ (means * weights).T
        joint -= 0.5 * (means**2 * weights + np.log(2 * np.pi * spread)).sum(axis=1)
        joint += log_share
        total = np.logaddexp(joint[:, 0], joint[:, 1])
        mean = float(total.mean())
        if mean - before < tolerance * max(1.0, abs(mean)):
            break
        before = mean
        member = np.exp(joint - total[:, None])
        mass = np.maximum(member.sum(axis=0), 1e-9)
        means = member.T @ points / mass[:, None]
        spread = np.maximum(member.T @ squares / mass[:, None] - means**2, 0) + floor
        log_share = np.log(mass / mass.sum())
    return np.logaddexp(joint[:, 0], joint[:, 1])


@dataclass(frozen=True)
class Plateau:
    """R(x) = r - (r - a) exp(-b x) over the share x (0..1), and where it is flat.

    share: where all but `gap` of the way from a to r is gone; over 1 where the data ends before.
    """

    r: float
    a: float
    b: float
    share: float

    def at(self, share: float) -> float:
        """The score that is expected of a share."""
        return self.r - (self.r - self.a) * float(np.exp(-self.b * share))


def plateau(points: Sequence[tuple[float, float]], gap: float = 0.05) -> Plateau:
    """The curve through observed (share kept, score) points by least squares.

    The budget rule of ISA, whose x is in per cent: its b is a hundredth of this one. gap: what is
    left of the way to r where the curve is called flat, 0..1; no figure of the paper's. Raises
    InputError for fewer than three different shares, and where the scores do not level off.
    """
    shares = np.array([share for share, _ in points], np.float64)
    scores = np.array([score for _, score in points], np.float64)
    if len(np.unique(shares)) < 3:
        raise InputError(
            f"a plateau needs scores at three shares or more, and there are {len(set(shares))}"
        )
    if not (np.isfinite(shares).all() and np.isfinite(scores).all() and (shares >= 0).all()):
        raise InputError("a plateau needs shares of 0 or more and scores that are numbers")

    def fitted(log_b: float) -> tuple[float, float, float]:
        falling = np.exp(-np.exp(log_b) * shares)
        basis = np.stack([np.ones(len(shares)), -falling], axis=1)
        (r, rise), *_ = np.linalg.lstsq(basis, scores, rcond=None)
        return float(((basis @ [r, rise] - scores) ** 2).sum()), float(r), float(rise)

    scale = float(shares.max())
    grid = np.linspace(np.log(1e-3 / scale), np.log(1e4 / scale), 400)
    errors = [fitted(one)[0] for one in grid]
    place = int(np.argmin(errors))
    low, high = float(grid[max(place - 1, 0)]), float(grid[min(place + 1, len(grid) - 1)])
    for _ in range(100):
        third = (high - low) / 3
        if fitted(low + third)[0] <= fitted(high - third)[0]:
            high -= third
        else:
            low += third
    log_b = (low + high) / 2
    _, r, rise = fitted(log_b)
    if place == 0 or rise <= 0:
        raise InputError("these scores do not level off as the share grows; there is no plateau")
    b = float(np.exp(log_b))
    return Plateau(r, r - rise, b, float(-np.log(gap)) / b)
