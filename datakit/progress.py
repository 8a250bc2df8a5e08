"""Progress for people: a live table on a terminal, plain lines elsewhere."""

import time
from collections import defaultdict
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from datakit.session import Watch
from datakit.store import Done

_LINE_EVERY_S = 10.0


class _Heedless(Console):
    """A console whose reader may go away: progress then falls silent, and the run goes on."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


class _Count:
    """One step so far."""

    def __init__(self) -> None:
        self.rows = 0
        self.through = 0
        self.kept = 0
        self.dropped = 0
        self.unanswered = 0
        self.working = 0


class Progress(Watch):
    """Counts rows by step and shows them; use as `with Progress() as watch`.

    On a terminal a table is drawn anew four times a second; in a log a line is written for every
    step that ends and every ten seconds between.
    """

    def __init__(self, console: Console | None = None) -> None:
        super().__init__()
        self._console = console or _Heedless(stderr=True)
        self._counts: dict[str, _Count] = defaultdict(_Count)
        self._began = time.monotonic()
        self._last_line = self._began
        self._vectors = self._vectors_before = 0
        self._embedding_since: float | None = None
        self._live: Live | None = None
        if self._console.is_terminal:
            self._live = Live(
                console=self._console, get_renderable=self._table, refresh_per_second=4
            )

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()
        elif kind is None:
            self._line()

    def pass_begins(self, aliases: Sequence[str]) -> None:
        for alias in aliases:
            self._counts[alias] = _Count()

    def step_begins(self, alias: str, rows: int) -> None:
        self._counts[alias].rows += rows

    def row_done(self, alias: str) -> None:
        self._counts[alias].working += 1
        if self._live is None and time.monotonic() - self._last_line > _LINE_EVERY_S:
            self._line()

    def part_done(self, done: Done) -> None:
        count = self._counts[done.alias]
        count.through += done.rows_in
        count.working = 0
        count.kept += done.rows
        count.dropped += done.dropped_rows
        count.unanswered += done.unanswered

    def embedded(self, role: str, done: int, of: int) -> None:
        if self._embedding_since is None:
            self._embedding_since = time.monotonic()
        if done == 0:
            self._vectors_before = self._vectors
        self._vectors = self._vectors_before + done
        if self._live is None and time.monotonic() - self._last_line > _LINE_EVERY_S:
            self._line()

    def work_done(self, aliases: Sequence[str]) -> None:
        for alias in aliases if self._live is None else ():
            count = self._counts[alias]
            if count.through < count.rows or not count.rows:
                continue  # the rows that are left wait for another pass
            self._console.print(
                f"{alias}: {count.through:,} rows in, {count.kept:,} kept, "
                f"{count.dropped:,} dropped",
                highlight=False,
            )

    def _line(self) -> None:
        self._last_line = time.monotonic()
        self._console.print(self._calls(), highlight=False, soft_wrap=True)

    def _calls(self) -> str:
        meter = self.meter
        seconds = max(time.monotonic() - self._began, 1e-3)
        calls = f"calls: {meter.sent:,} sent ({meter.sent / seconds:,.1f}/s)"
        calls += f", {meter.replayed:,} replayed, {meter.failed:,} failed tries"
        if self._embedding_since is not None:
            rate = self._vectors / max(time.monotonic() - self._embedding_since, 1e-3)
            calls += f"; {self._vectors:,} texts embedded ({rate:,.0f}/s)"
        tokens = f"tokens: {meter.input_tokens:,} in, {meter.output_tokens:,} out"
        return f"{calls}; {tokens}; {seconds:,.0f} s{self._left(seconds)}"

    def _left(self, seconds: float) -> str:
        """The estimate for the step that runs now."""
        for alias, count in reversed(self._counts.items()):
            through = count.through + count.working
            if 0 < through < count.rows and self.meter.sent:
                left = seconds / through * (count.rows - through)
                return f"; {alias} done in about {left:,.0f} s"
        return ""

    def _table(self) -> Group:
        table = Table(box=None, pad_edge=False)
        table.add_column("step")
        for name in ("rows", "through", "kept", "dropped", "unanswered"):
            table.add_column(name, justify="right")
        for alias, count in self._counts.items():
            through = min(count.through + count.working, count.rows)
            numbers = (count.rows, through, count.kept, count.dropped, count.unanswered)
            table.add_row(alias, *(f"{value:,}" for value in numbers))
        return Group(table, Text(self._calls()))
