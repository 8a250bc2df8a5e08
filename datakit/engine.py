"""The engine: a recipe's steps over parts, each part once ever, no row lost.

`execute` walks the line of steps. Consecutive row-local steps form one stage that runs depth
first, part by part, so that money buys finished rows; a source, a table step or a group step is a
stage of its own. Every stage is cut into `Work` values (steps and a lane of parts), and `spread`
hands them to whoever does them: `datakit.work.perform`, here or elsewhere.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from datakit.errors import BugError, InputError
from datakit.ids import joined, packed, spelled
from datakit.passes import Between
from datakit.recipe import PlacedStep, Recipe
from datakit.session import Settings
from datakit.step import FrameStep, RowStep
from datakit.store import Chunk, Done, Store
from datakit.values import Value

WIDE_PART = 20_000
"""Rows of a part that only vectorised steps look at: each part costs files, not calls."""


class Work(Value):
    """Steps over a lane of parts: the unit that is distributed.

    Several steps are row-local and run depth first; a source has no inputs. `kind` is the kind of
    the input rows, `cut` about how many rows a part has where the output is cut anew.
    """

    steps: tuple[PlacedStep, ...]
    kind: str
    inputs: tuple[Chunk, ...]
    lane: int
    lanes: int
    cut: int
    settings: Settings

    @property
    def name(self) -> str:
        """For people: `respond+judge lane 1/2`."""
        aliases = "+".join(placed.alias for placed in self.steps)
        return aliases if self.lanes == 1 else f"{aliases} lane {self.lane + 1}/{self.lanes}"


Markers = list[list[Done]]
"""For each step, the markers of its parts in input order."""

Spread = Callable[[Sequence[Work]], Sequence[Markers]]


def execute(
    recipe: Recipe, settings: Settings, spread: Spread, lanes: int = 1, through: bool = False
) -> Markers:
    """Run every step; returns the markers of each. Raises whatever stopped the run.

    through: do one pass, and return what there is where rows are unfinished after it.
    """
    markers: Markers = []
    kinds = recipe.kinds()
    store = Store(settings.outputs)
    line = list(stages(recipe.steps))
    for number, (first, stage) in enumerate(line):
        following = line[number + 1][1] if number + 1 < len(line) else ()
        inputs = [chunk for done in markers[-1] for chunk in done.chunks] if markers else []
        runs = _lanes(inputs, lanes if _is_row_local(stage[0]) else 1)
        works = [
            Work(
                steps=stage,
                kind=kinds[first - 1].__name__ if first else "",
                inputs=tuple(run),
                lane=lane,
                lanes=len(runs),
                cut=_cut(following, settings.rows_per_part),
                settings=settings,
            )
            for lane, run in enumerate(runs)
        ]
        results = spread(works) if through else _finished(works, spread)
        if _pending(results) or (through and _unanswered(results)):
            return markers + [
                [done for result in results for done in result[position]]
                for position in range(len(stage))
            ]
        for position, placed in enumerate(stage):
            dones = [done for result in results for done in result[position]]
            _conserved(store, placed, markers[-1] if markers else None, dones)
            markers.append(dones)
        if first == 0:
            _not_empty(store, stage[0], markers[0])
    return markers


def _finished(works: Sequence[Work], spread: Spread) -> Sequence[Markers]:
    """Do works in as many passes as it takes until no part is pending.

    The first pass replays what is known and asks what can be asked at once. Then the local models
    that are needed are up in turns, and batches are sent and collected, and the works are done
    again, whose answers so far are in the ledger. Raises Stopped where the budget is spent.
    """
    settings = works[0].settings
    between = Between(settings, [placed.step for placed in works[0].steps])
    reasons: set[str] = set()
    while True:
        with between.passes(reasons) as served:
            changed = {"settings": settings.model_copy(update={"served": served})}
            results = spread([work.model_copy(update=changed) for work in works])
        reasons = _pending(results)
        if not reasons:
            return results


def _pending(results: Sequence[Markers]) -> set[str]:
    """Why parts are pending, where any are."""
    dones = (done for markers in results for step in markers for done in step)
    waiting = (reason for done in dones if done.status == "pending" for reason in done.reasons)
    return {reason for joined in waiting for reason in joined.split()}


def _unanswered(results: Sequence[Markers]) -> bool:
    return any(done.unanswered for markers in results for step in markers for done in step)


def stages(steps: Sequence[PlacedStep]) -> Iterator[tuple[int, tuple[PlacedStep, ...]]]:
    """(number of the first step, steps) of each stage."""
    start = 0
    while start < len(steps):
        stop = start + 1
        while stop < len(steps) and _is_row_local(steps[start]) and _is_row_local(steps[stop]):
            stop += 1
        yield start, tuple(steps[start:stop])
        start = stop


def _cut(following: Sequence[PlacedStep], rows_per_part: int) -> int:
    """Small parts where models are asked next, so that little waits for a part to end."""
    asks = any(isinstance(placed.step, RowStep) for placed in following)
    return rows_per_part if asks else max(rows_per_part, WIDE_PART)


def _is_row_local(placed: PlacedStep) -> bool:
    return isinstance(placed.step, RowStep | FrameStep)


def _lanes(chunks: Sequence[Chunk], lanes: int) -> list[Sequence[Chunk]]:
    """Runs of neighbouring chunks, about equal in number; one empty run where there are none."""
    size = max(1, -(-len(chunks) // lanes))
    return [chunks[i : i + size] for i in range(0, len(chunks), size)] or [()]


def _conserved(
    store: Store, placed: PlacedStep, before: Sequence[Done] | None, dones: Sequence[Done]
) -> None:
    """Each row went in once and came out under an id of its own, over all parts of the step."""
    rows_in = sum(done.rows_in for done in dones)
    given = rows_in if before is None else sum(done.rows for done in before)
    if rows_in != given:
        raise BugError(f"step {placed.alias!r} took {rows_in} of {given} rows")
    chunks = (chunk for done in dones for chunk in done.chunks)
    ids = np.sort(joined(packed(run["id"].to_list()) for run in store.runs(chunks, ["id"])))
    twice = ids[1:][ids[1:] == ids[:-1]]
    if len(twice):
        raise BugError(f"step {placed.alias!r} gave two rows the id {spelled(twice)[0]!r}")


def _not_empty(store: Store, placed: PlacedStep, dones: Sequence[Done]) -> None:
    if any(done.rows for done in dones):
        return
    for done in dones:
        if done.dropped_rows:
            first = store.dropped(done).row(0, named=True)
            rows = sum(one.dropped_rows for one in dones)
            raise InputError(
                f"step {placed.alias!r}: none of the {rows} rows of the source can be read; "
                f"first: {first['detail']}"
            )
    raise InputError(f"step {placed.alias!r}: the source has no rows")
