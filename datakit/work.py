"""Doing a Work: its steps over its parts, in one event loop with one window of requests."""

import asyncio
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import polars as pl

from datakit.engine import Markers, Work
from datakit.errors import BugError, Pending, Rejected, RowError, blamed
from datakit.kit import Kit
from datakit.loop import Room, gather, rare_collections, run_in_loop
from datakit.models.chat import ChatModel
from datakit.models.specs import ChatSpec
from datakit.recipe import PlacedStep
from datakit.records import KINDS, Record
from datakit.rows import (
    Dropped,
    batches,
    conserve,
    decided,
    derived,
    drop_of,
    dropped_frame,
    identified,
    part_key,
)
from datakit.session import Session, Watch
from datakit.step import (
    Drop,
    FrameStep,
    GroupStep,
    Reject,
    RowStep,
    SourceStep,
    TableStep,
    roles,
)
from datakit.store import Chunk, Done, Store, cut, frame_digest
from datakit.tables import frames, from_frame, to_frame
from datakit.text import digest
from datakit.work_table import applied, whole_table

_USUAL_WINDOW = 1024
"""Requests in flight where a model states no number: how many parts are open follows from it."""


def perform(
    work: Work, watch: Watch | None = None, models: Mapping[str, ChatModel] | None = None
) -> Markers:
    """Do a work and return the markers of each of its steps.

    `models` stands in for the recipe's chat models, by role. Raises the first error that is not a
    row's own.
    """
    listener = watch or Watch()
    aliases = [placed.alias for placed in work.steps]
    if work.lane == 0:
        listener.pass_begins(aliases)

    def whole() -> Markers:
        steps = [one.step for one in work.steps]
        with (
            rare_collections(),
            Session(work.settings, steps, listener, models, work.lanes) as session,
        ):
            if isinstance(work.steps[0].step, TableStep):
                # Needs no loop, and is long: without one, a signal strikes at once.
                return [[whole_table(work, session)]]
            return run_in_loop(_perform(work, session))

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        markers = whole()
    else:
        # A notebook or an async flow has a loop of its own: ours then needs another thread.
        with ThreadPoolExecutor(1) as pool:
            markers = pool.submit(whole).result()
    listener.work_done(aliases)
    return markers


async def _perform(work: Work, session: Session) -> Markers:
    worker = _Worker(work, session)
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))
    try:
        match work.steps[0].step:
            case SourceStep():
                return [await worker.source()]
            case GroupStep():
                return [await worker.groups()]
            case _:
                return await worker.rows()
    finally:
        await session.close_models()


class _Worker:
    """One work being done: its store, its session, and the rules that every grain shares."""

    def __init__(self, work: Work, session: Session) -> None:
        self.work = work
        self.session = session
        self.settings = work.settings
        self.watch = session.watch
        self.store = Store(work.settings.outputs)
        window = sum(
            spec.max_in_flight or _USUAL_WINDOW
            for role in {role for one in work.steps for _, role, _ in roles(one.step)}
            if isinstance(spec := work.settings.models[role], ChatSpec)
        )
        # Enough unfinished rows to keep every window full, and no more: memory stays flat. Counted
        # in rows, because the slowest row of a part holds it open long after the others.
        self.room = Room(max(2 * window, work.settings.rows_per_part + 1))

    # -- sources ---------------------------------------------------------------------------------

    async def source(self) -> list[Done]:
        """Ranges in order. A row's origin is its key, else content and occurrence number."""
        placed = self.work.steps[0]
        step = placed.step
        assert isinstance(step, SourceStep)
        kind = step.gives(None)
        kit = self.session.kit(placed.alias)
        base = part_key(placed, "", [str(self.work.cut)], self.settings, kit)
        dones: list[Done] = []
        seen: Counter[str] | None = None
        left = self.settings.limit
        chain = ""
        for part in step.ranges(kit):
            if left is not None and left <= 0:
                break
            # Occurrence numbers depend on the ranges before, so their keys are chained.
            chain = digest([base, chain, part.fingerprint, part.start, part.stop])
            key = chain if left is None else digest([chain, "limit", left])
            done = self.store.find(key)
            if done is None or done.status == "partial":
                seen = self._origins(dones) if seen is None else seen
                with blamed(placed.alias, f"reading {part.name!r}"):
                    found = await step.read(part, kit)
                drops: list[pl.DataFrame] = []
                rows = _source_rows(placed, part.name, found, seen, left, drops)
                done = self.store.save(
                    key,
                    placed.alias,
                    placed.name,
                    kind.__name__,
                    None,
                    cut(rows, self.work.cut),
                    drops,
                )
            self.watch.step_begins(placed.alias, done.rows_in)
            self.watch.part_done(done)
            dones.append(done)
            left = None if left is None else left - done.rows
        return dones

    def _origins(self, dones: Sequence[Done]) -> Counter[str]:
        """How often each key or content was met in the ranges before."""
        seen: Counter[str] = Counter()
        for done in dones:
            for frame in self.store.runs(done.chunks, ["origin"]):
                seen.update(origin.rpartition("#")[0] for origin in frame["origin"])
        return seen

    # -- row-local steps -------------------------------------------------------------------------

    async def rows(self) -> Markers:
        """Depth first: each part goes through every step before many others begin."""
        for placed in self.work.steps[:1]:
            self.watch.step_begins(placed.alias, sum(chunk.rows for chunk in self.work.inputs))
        lines = await gather([self._line(chunk) for chunk in self.work.inputs])
        return [
            [line[position] for line in lines if position < len(line)]
            for position in range(len(self.work.steps))
        ]

    async def _line(self, chunk: Chunk) -> list[Done]:
        """One part through all steps; ends early where nothing is left of it."""
        dones: list[Done] = []
        kind = KINDS[self.work.kind]
        await self.room.enter(chunk.rows)
        for position, placed in enumerate(self.work.steps):
            if position:
                self.room.add(chunk.rows)
                self.watch.step_begins(placed.alias, chunk.rows)
            kit = self.session.kit(placed.alias, position)
            gives = placed.step.gives(kind)
            key = part_key(placed, kind.__name__, [chunk.digest], self.settings, kit)
            done = self.store.find(key)
            if done is None or done.status == "partial":
                done = await self._row_part(placed, kind, gives, chunk, key, kit)
            else:
                self.room.leave(chunk.rows)
            if done.status != "pending":
                self.watch.part_done(done)
            dones.append(done)
            kind = gives
            if not done.chunks:
                break
            chunk = done.chunks[0]
        return dones

    async def _row_part(
        self,
        placed: PlacedStep,
        kind: type[Record],
        gives: type[Record],
        chunk: Chunk,
        key: str,
        kit: Kit,
    ) -> Done:
        """One step over one part."""
        if self.session.is_spent and isinstance(placed.step, RowStep):
            self.room.leave(chunk.rows)
            return Done.pending(key, placed.alias, placed.name, chunk.rows, {"budget": chunk.rows})
        if isinstance(placed.step, FrameStep):
            frame = self.store.read(chunk)
            kept, drops = decided(frame, applied(placed, frame, kit), placed.alias, kind)
            self.room.leave(chunk.rows)
            return self._saved(placed, gives, key, frame, kept, drops)

        def rows() -> tuple[pl.DataFrame, list[Record]]:
            frame = self.store.read(chunk)
            return frame, from_frame(kind, frame)

        def saved() -> Done:
            kept, drops = _tables(gives, results)
            pending = self._pending(kept, drops)
            if pending:
                return Done.pending(key, placed.alias, placed.name, frame.height, pending)
            return self._saved(placed, gives, key, frame, kept, drops)

        # Tables are read and written beside the event loop: while it stands still, hundreds of
        # answers wait and no request goes out.
        frame, records = await asyncio.to_thread(rows)
        results = await gather([self._each(placed, row, kit) for row in records])
        return await asyncio.to_thread(saved)

    def _saved(
        self,
        placed: PlacedStep,
        gives: type[Record],
        key: str,
        frame: pl.DataFrame,
        kept: pl.DataFrame,
        drops: pl.DataFrame,
    ) -> Done:
        conserve(placed.alias, frame, kept, drops)
        return self.store.save(
            key, placed.alias, placed.name, gives.__name__, frame.height, [kept], [drops]
        )

    def _pending(self, kept: pl.DataFrame, drops: pl.DataFrame) -> dict[str, int]:
        """Why a part must wait, and for how many rows.

        With `finish_partial` none does, but where requests are only counted, and no row goes on.
        """
        if self.settings.finish_partial and (kept.height or not self.settings.instead):
            return {}
        waiting = drops.filter(pl.col("kind") == Pending.__name__)["reason"]
        return dict(waiting.value_counts().iter_rows())

    async def _each(self, placed: PlacedStep, row: Record, kit: Kit) -> list[Record] | Dropped:
        """One row through one step: what it becomes, or why it is dropped."""
        step = placed.step
        assert isinstance(step, RowStep)
        try:
            with blamed(placed.alias, f"on row {row.id}"):
                made = await step.each(row, kit)
                if not made:
                    raise BugError(
                        f"step {placed.alias!r} returned nothing for row {row.id}; a row that "
                        "does not belong raises Rejected"
                    )
                return [derived(one, [row], placed.alias, i) for i, one in enumerate(made)]
        except RowError as error:
            return drop_of(row, error)
        except Pending as error:
            return _unfinished(row, error)
        finally:
            self.room.leave(1)
            self.watch.row_done(placed.alias)

    # -- whole groups ----------------------------------------------------------------------------

    async def groups(self) -> list[Done]:
        """Whole groups in their order, some groups to a part."""
        placed = self.work.steps[0]
        step = placed.step
        assert isinstance(step, GroupStep)
        kind = KINDS[self.work.kind]
        table = self.store.scan(self.work.inputs, kind.table_schema()).collect()
        self.watch.step_begins(placed.alias, table.height)
        ordered = table.with_row_index("_row").sort(*step.order_by, "_row").drop("_row")
        runs = batches(
            ordered.partition_by(step.group_by, maintain_order=True), self.settings.rows_per_part
        )
        return await gather([self._group_part(placed, kind, batch) for batch in runs])

    async def _group_part(
        self, placed: PlacedStep, kind: type[Record], groups: Sequence[pl.DataFrame]
    ) -> Done:
        step = placed.step
        assert isinstance(step, GroupStep)
        kit = self.session.kit(placed.alias)
        gives = step.gives(kind)
        digests = [frame_digest(group) for group in groups]
        key = part_key(placed, kind.__name__, digests, self.settings, kit)
        done = self.store.find(key)
        if done is None or done.status == "partial":
            rows = sum(group.height for group in groups)
            await self.room.enter(rows)
            results = await gather([self._group(placed, kind, group, kit) for group in groups])
            self.room.leave(rows)
            kept = to_frame(gives, [row for rows, _ in results for row in rows])
            drops = dropped_frame([drop for _, dropped in results for drop in dropped])
            frame = pl.concat(groups)
            pending = self._pending(kept, drops)
            if pending:
                return Done.pending(key, placed.alias, placed.name, frame.height, pending)
            conserve(placed.alias, frame, kept, drops)
            done = self.store.save(
                key, placed.alias, placed.name, gives.__name__, frame.height, [kept], [drops]
            )
        self.watch.part_done(done)
        return done

    async def _group(
        self, placed: PlacedStep, kind: type[Record], group: pl.DataFrame, kit: Kit
    ) -> tuple[list[Record], list[Dropped]]:
        step = placed.step
        assert isinstance(step, GroupStep)
        rows = from_frame(kind, group)
        by_id = {row.id: row for row in rows}
        try:
            with blamed(placed.alias, f"on the group of row {rows[0].id}"):
                made = await step.each(rows, kit)
        except RowError as error:
            return [], [drop_of(row, error) for row in rows]
        except Pending as error:
            return [], [_unfinished(row, error) for row in rows]
        kept: list[Record] = []
        drops: list[Dropped] = []
        for slot, out in enumerate(made):
            if isinstance(out, Drop):
                drop = drop_of(by_id[out.id], Rejected(out.reason, out.detail))
                drops.append(drop | {"related": out.related})
            else:
                parents = [by_id[parent] for parent in out.parents if parent in by_id] or rows
                kept.append(derived(out, parents, placed.alias, slot))
        for _ in rows:
            self.watch.row_done(placed.alias)
        return kept, drops


def _source_rows(
    placed: PlacedStep,
    name: str,
    found: Iterable[Record | Reject],
    seen: Counter[str],
    left: int | None,
    drops: list[pl.DataFrame],
) -> Iterator[pl.DataFrame]:
    """The rows of a range, some at a time; those dropped are added to `drops` at the end."""
    kind = placed.step.gives(None)
    lost: list[Dropped] = []
    with blamed(placed.alias, f"reading {name!r}"):
        yield from frames(kind, identified(found, seen, lost, left))
    drops.append(dropped_frame(lost))


def _tables(
    gives: type[Record], results: Sequence[list[Record] | Dropped]
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """What rows became, and what was dropped."""
    kept = [row for result in results if isinstance(result, list) for row in result]
    drops = [result for result in results if isinstance(result, dict)]
    return to_frame(gives, kept), dropped_frame(drops)


def _unfinished(row: Record, error: Pending) -> Dropped:
    """A row that waits for another pass or run, as it stands in the rejects until then."""
    return {
        "id": row.id,
        "kind": Pending.__name__,
        "reason": error.reason,
        "detail": error.detail,
        "transient": True,
        "record": row.model_dump_json(),
    }
