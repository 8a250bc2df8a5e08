"""What may still be kept: a budget of rows or of tokens, and quotas of the values of a column."""

from collections.abc import Mapping
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from datakit.errors import InputError

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Short = Literal["refuse", "fill"]


class Room:
    """The rows that may still be taken, in `open` [n].

    group: the quota that each row counts against [n]; caps: the rows that each quota has left;
    cost: the tokens of each row [n] where there is a budget of tokens, purse: the tokens that each
    quota has left, total: those of all. A row that is closed never opens again.
    """

    def __init__(
        self,
        group: Ints,
        caps: Ints,
        cost: Floats | None = None,
        purse: Floats | None = None,
        total: float = np.inf,
    ) -> None:
        self.open = np.ones(len(group), bool)
        self._group = group
        self._caps = caps.copy()
        self._cost = cost
        self._purse = np.full(len(caps), np.inf) if purse is None else purse.copy()
        self._total = total
        self._close()

    @classmethod
    def of_rows(cls, rows: int, budget: int) -> "Room":
        """Room for `budget` of `rows` rows, whichever they are."""
        return cls(np.zeros(rows, np.int64), np.array([budget], np.int64))

    @property
    def most(self) -> int:
        """No more rows than so many can be taken."""
        free = np.bincount(self._group[self.open], minlength=len(self._caps))
        return int(np.minimum(free, self._caps).sum())

    def close(self, rows: NDArray[np.bool_]) -> None:
        """Close the rows marked in `rows` [n]."""
        self.open &= ~rows

    def take(self, row: int) -> bool:
        """Count a row as taken; says whether other rows were closed by it."""
        group = self._group[row]
        self.open[row] = False
        self._caps[group] -= 1
        if self._cost is None:
            if self._caps[group] > 0:
                return False
            self.open[self._group == group] = False
            return True
        self._purse[group] -= self._cost[row]
        self._total -= self._cost[row]
        self._close()
        return True

    def _close(self) -> None:
        self.open &= self._caps[self._group] > 0
        if self._cost is not None:
            # Sums of thirds of words are not exact.
            left = np.minimum(self._purse[self._group], self._total) + 1e-6
            self.open &= self._cost <= left


def even_shares(shares: Mapping[str, float], total: int) -> dict[str, int]:
    """Whole rows for each share of `total`; the largest remainders are rounded up.

    Shares that sum to 1 give rows that sum to `total`; ties go to the first name.
    """
    exact = {name: share * total for name, share in shares.items()}
    rows = {name: int(np.floor(value + 1e-9)) for name, value in exact.items()}
    spare = round(sum(exact.values())) - sum(rows.values())
    by_rest = sorted(exact, key=lambda name: (rows[name] - exact[name], name))
    for name in by_rest[: max(spare, 0)]:
        rows[name] += 1
    return rows


def even_rows(present: Mapping[str, int], budget: int) -> dict[str, int]:
    """The same rows for each value, and more for others where a value has fewer than that."""
    given: dict[str, int] = {}
    left = budget
    for place, value in enumerate(sorted(present, key=lambda one: (present[one], one))):
        given[value] = min(present[value], left // (len(present) - place))
        left -= given[value]
    return given


def quota_rows(
    column: str,
    quotas: Mapping[str, int | float],
    present: Mapping[str | None, int],
    budget: int,
    short: Short,
) -> tuple[dict[str, int], int]:
    """Rows for each named value of `column`, and for all other values together.

    quotas: a share of the budget (a fraction) or a number of rows (an integer) for each value.
    present: how many rows have each value. Raises InputError where the quotas cannot be met;
    `fill` gives a value with too few rows all of them, and the others what is left.
    """
    shares = {value: one for value, one in quotas.items() if isinstance(one, float)}
    wanted = {value: one for value, one in quotas.items() if isinstance(one, int)}
    wanted |= even_shares(shares, budget)
    asked = sum(wanted.values())
    if asked > budget:
        raise InputError(
            f"`quotas` of {column!r} ask for {asked:,} rows, and the budget is {budget:,}; "
            "lower the quotas or raise `keep`"
        )
    given = dict(wanted)
    for value, rows in wanted.items():
        there = present.get(value, 0)
        if rows > there:
            if short == "refuse":
                raise InputError(
                    f"`quotas` ask for {rows:,} rows with {column} {value!r}, and there are "
                    f"{there:,}; lower the quota or set `short: fill`"
                )
            given[value] = there
    others = sum(rows for value, rows in present.items() if value not in wanted)
    left = budget - sum(given.values())
    if left > others and short == "refuse":
        raise InputError(
            f"`quotas` leave {left:,} rows for other values of {column!r}, and there are "
            f"{others:,}; raise a quota, lower `keep` or set `short: fill`"
        )
    return given, min(left, others)
