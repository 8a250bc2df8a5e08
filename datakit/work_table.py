"""Doing a Work of one table step: all parts at once, in no event loop."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import polars as pl

from datakit.engine import WIDE_PART, Work
from datakit.errors import BugError, blamed
from datakit.kit import Kit
from datakit.recipe import PlacedStep
from datakit.records import KINDS, Record
from datakit.rows import conserve, decided, part_key
from datakit.session import Session
from datakit.step import Split, TableStep, prepares
from datakit.store import Chunk, Done, Store, cut


def whole_table(work: Work, session: Session) -> Done:
    """All parts at once; `prepare` by part, stored on its own."""
    store = Store(work.settings.outputs)
    placed = work.steps[0]
    step = placed.step
    assert isinstance(step, TableStep)
    kind = KINDS[work.kind]
    kit = session.kit(placed.alias)
    inputs = work.inputs
    rows_in = sum(chunk.rows for chunk in inputs)
    session.watch.step_begins(placed.alias, rows_in)
    digests = [chunk.digest for chunk in inputs]
    key = part_key(placed, kind.__name__, [str(work.cut), *digests], work.settings, kit)
    done = store.find(key)
    if done is None:
        drops: list[pl.DataFrame] = []
        frames = _decided(store, work, placed, step, kind, kit, drops) if inputs else []
        kept = cut(frames, work.cut)
        done = store.save(key, placed.alias, placed.name, kind.__name__, rows_in, kept, drops)
    session.watch.part_done(done)
    return done


def _prepared(store: Store, work: Work, placed: PlacedStep, step: Any, kit: Kit) -> list[Chunk]:
    """What the step prepares of each part; that of many small parts is made together.

    A GPU that is handed two hundred texts at a time has little to do.
    """
    inert = frozenset(type(step).model_fields) - step.prepared_by
    outside = step.prepared_fingerprint(kit)
    keys = [
        part_key(placed, "prepared", [chunk.digest], work.settings, kit, inert, outside)
        for chunk in work.inputs
    ]
    found = [store.find(key) for key in keys]
    new = [place for place, done in enumerate(found) if done is None]
    for run in _runs(new, [work.inputs[place].rows for place in new]):
        frames = [store.read(work.inputs[place]) for place in run]
        frame = pl.concat(frames)
        with blamed(placed.alias, "preparing its table"):
            made: pl.DataFrame = step.prepare(frame, kit)
        if made["id"].to_list() != frame["id"].to_list():
            raise BugError(f"step {placed.alias!r}: prepare must keep the rows and their order")
        start = 0
        for place, part in zip(run, frames, strict=True):
            piece = made.slice(start, part.height)
            start += part.height
            found[place] = store.save(
                keys[place], placed.alias, placed.name, "", part.height, [piece], [], hashed=False
            )
    return [done.chunks[0] for done in found if done is not None]


def _runs(places: Sequence[int], rows: Sequence[int]) -> Iterator[list[int]]:
    """Places of neighbours that hold some `WIDE_PART` rows together."""
    run: list[int] = []
    size = 0
    for place, count in zip(places, rows, strict=True):
        run.append(place)
        size += count
        if size >= WIDE_PART:
            yield run
            run, size = [], 0
    if run:
        yield run


def _decided(
    store: Store,
    work: Work,
    placed: PlacedStep,
    step: TableStep[Record, Record],
    kind: type[Record],
    kit: Kit,
    drops: list[pl.DataFrame],
) -> Iterator[pl.DataFrame]:
    """The kept rows, part by part; the dropped ones are added to `drops` as it goes."""
    inputs = work.inputs
    table = store.scan(inputs, kind.table_schema())
    if prepares(step):
        prepared = _prepared(store, work, placed, step, kit)
        extra = store.scan(prepared, pl.Schema()).drop("id")
        table = pl.concat([table, extra], how="horizontal")
    split = applied(placed, table, kit)
    for chunk, some in zip(inputs, _by_part(split, store, inputs), strict=True):
        frame = store.read(chunk)
        kept, dropped = decided(frame, some, placed.alias, kind)
        conserve(placed.alias, frame, kept, dropped)
        drops.append(dropped)
        if kept.height:
            yield kept


def _by_part(split: Split, store: Store, inputs: Sequence[Chunk]) -> list[Split]:
    """A decision on all rows as one on each part's: joined once, not once for each part."""
    sizes = [chunk.rows for chunk in inputs]
    ids = pl.concat([pl.DataFrame(schema={"id": pl.String()}), *store.runs(inputs, ["id"])])
    place = np.repeat(np.arange(len(sizes), dtype=np.uint32), sizes)
    places = ids.with_columns(pl.Series("_part", place))

    def parts(side: pl.DataFrame) -> list[pl.DataFrame]:
        found = side.join(places, on="id", maintain_order="left").partition_by(
            "_part", as_dict=True, include_key=False
        )
        return [found.get((part,), side.clear()) for part in range(len(sizes))]

    return [Split(*sides) for sides in zip(parts(split.kept), parts(split.dropped), strict=True)]


def applied(placed: PlacedStep, table: Any, kit: Kit) -> Split:
    """What a frame or table step decides; a mistake of the step names it."""
    with blamed(placed.alias, "on its table"):
        return placed.step.apply(table, kit)  # type: ignore[attr-defined]
