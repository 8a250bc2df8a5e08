"""The columns by which a subset is bounded and weighed: values, weights, tokens, quotas."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray

from datakit.curation._room import Floats, Ints, Room, Short, even_rows, quota_rows
from datakit.errors import InputError
from datakit.tables import measure

TOKENS_PER_WORD = 4 / 3
"""The usual rule of thumb for English text and a byte-pair vocabulary."""


def value_of(column: str, schema: pl.Schema) -> pl.Expr:
    """A text column of the record (`source`, `id`) or else a label of that name; null where absent.

    Raises InputError where the record has neither such a column nor labels.
    """
    if schema.get(column) == pl.String:
        return pl.col(column)
    if "labels" not in schema:
        raise InputError(f"rows have neither a column nor labels that could hold {column!r}")
    element = pl.element()
    return (
        pl.col("labels")
        .list.eval(element.filter(element.struct.field("name") == column))
        .list.first()
        .struct.field("value")
    )


def listed(rows: pl.DataFrame, wanted: Mapping[str, str | Sequence[str]]) -> NDArray[np.bool_]:
    """Which rows have one of the values that `wanted` lists for each of its columns [n]."""
    found = np.ones(rows.height, bool)
    for column, values in wanted.items():
        found &= (
            rows[f"of.{column}"]
            .is_in([values] if isinstance(values, str) else list(values))
            .fill_null(value=False)
            .to_numpy()
        )
    return found


def weights(rows: pl.DataFrame, names: Sequence[str]) -> Floats:
    """The product of the named measures, NaN where a row lacks one [n].

    Raises InputError where no row has one of them.
    """
    product = np.ones(rows.height)
    for name in names:
        values = rows[f"measure.{name}"]
        if values.null_count() == rows.height:
            raise InputError(f"`weight`: no row has the measure {name!r}")
        product *= values.to_numpy()
    return product


def weight_columns(names: Sequence[str]) -> list[pl.Expr]:
    """What `weights` reads."""
    return [measure(name).cast(pl.Float64).alias(f"measure.{name}") for name in names]


def token_costs(rows: pl.DataFrame, by: str | None) -> Floats:
    """The tokens of each row [n]: 4/3 of its words, or the measure `by`.

    Raises InputError where a row lacks the measure, or has less than no tokens.
    """
    if by is None:
        return rows["words"].cast(pl.Float64).to_numpy() * TOKENS_PER_WORD
    values = rows[f"measure.{by}"]
    bad = rows.filter(values.is_null() | ~(values >= 0))
    if bad.height:
        raise InputError(
            f"`tokens_by`: {bad.height:,} of {rows.height:,} rows have no measure {by!r} of 0 or "
            f"more, the first being row {bad['id'][0]!r}"
        )
    return values.to_numpy()


def room_for(
    rows: pl.DataFrame,
    eligible: NDArray[np.bool_],
    first: Ints,
    budget: int | None,
    tokens: tuple[int, Floats] | None,
    quotas: Mapping[str, Mapping[str, int | float] | str],
    short: Short,
) -> Room:
    """Room for a budget of rows, or of (tokens, cost of each row), under the quotas of one column.

    Under a budget of tokens a quota is a bound: a share of the tokens, or a number of rows. Raises
    InputError where rows that must be kept, or quotas, do not fit.
    """
    count = rows.height
    group = np.zeros(count, np.int64)
    caps = [count if budget is None else budget]
    purses = [np.inf]
    names: list[str] = []
    for column, given_quotas in quotas.items():
        known = rows[f"of.{column}"].to_list()
        wanted = _named(given_quotas, known, eligible, budget)
        names = list(wanted)
        number = {name: place + 1 for place, name in enumerate(names)}
        group = np.array([number.get(value, 0) for value in known], np.int64)
        if tokens is not None:
            caps += [one if isinstance(one, int) else count for one in wanted.values()]
            purses += [
                one * tokens[0] if isinstance(one, float) else np.inf for one in wanted.values()
            ]
            continue
        sizes = np.bincount(group[eligible], minlength=len(names) + 1).tolist()
        present: dict[str | None, int] = dict(zip([None, *names], sizes, strict=True))
        given, others = quota_rows(column, wanted, present, budget or 0, short)
        caps = [others, *(given[name] for name in names)]
        purses += [np.inf] * len(names)
    cost = None if tokens is None else tokens[1]
    total = np.inf if tokens is None else float(tokens[0])
    _fits(first, group, names, caps, purses, cost, total)
    purse = np.array(purses)
    room = Room(group, np.array(caps, np.int64), cost, None if tokens is None else purse, total)
    room.close(~eligible)
    return room


def _named(
    quotas: Mapping[str, int | float] | str,
    known: Sequence[str | None],
    eligible: NDArray[np.bool_],
    budget: int | None,
) -> Mapping[str, int | float]:
    """Quotas by value; `even` spelled out over the values that there are."""
    if not isinstance(quotas, str):
        return quotas
    counts = Counter(one for one, may in zip(known, eligible, strict=True) if may and one)
    if budget is None:
        return {value: 1 / len(counts) for value in sorted(counts)}
    return dict(even_rows(counts, budget))


def _fits(
    first: Ints,
    group: Ints,
    names: Sequence[str],
    caps: Sequence[int],
    purses: Sequence[float],
    cost: Floats | None,
    total: float,
) -> None:
    """Raises InputError where the rows that must be kept are more than there is room for."""
    if len(first) > sum(caps):
        raise InputError(
            f"`must_keep` names {len(first):,} rows, and the budget is {sum(caps):,}; "
            "raise `keep` or name fewer"
        )
    spent = 0.0 if cost is None else float(cost[first].sum())
    if spent > total + 1e-6:
        raise InputError(
            f"the rows of `must_keep` have {spent:,.0f} tokens, and the budget is {total:,.0f}"
        )
    for place, (cap, purse) in enumerate(zip(caps, purses, strict=True)):
        here = first[group[first] == place]
        what = f"value {names[place - 1]!r}" if place else "other values"
        if len(here) > cap:
            raise InputError(
                f"`must_keep` names {len(here):,} rows of {what}, and the quota is {cap:,}"
            )
        if cost is not None and float(cost[here].sum()) > purse + 1e-6:
            raise InputError(
                f"the rows of `must_keep` of {what} have {float(cost[here].sum()):,.0f} tokens, "
                f"and the quota is {purse:,.0f}"
            )
