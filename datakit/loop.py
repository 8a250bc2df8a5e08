"""Running coroutines to their end: the first error counts, and a signal stops them cleanly."""

import asyncio
import contextlib
import gc
import signal
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Generator, Sequence
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")
_ALLOCATIONS = 50_000
"""New objects between two searches, of some hundred bytes each."""

Handler = Callable[[int, FrameType | None], Any]


def run_in_loop(task: Coroutine[Any, Any, T]) -> T:
    """Run `task` in an event loop of its own.

    A signal for which this process has a Python handler cancels the task first, and its handler is
    called after: one that raises in the middle of a loop would be lost in a callback.
    """
    handlers = _handlers()
    came: list[int] = []

    async def stoppable() -> T:
        loop = asyncio.get_running_loop()
        current = asyncio.current_task()
        assert current is not None

        def stop(number: int) -> None:
            came.append(number)
            current.cancel()

        for number in handlers:
            loop.add_signal_handler(number, stop, number)
        try:
            return await task
        finally:
            for number, handler in handlers.items():
                loop.remove_signal_handler(number)
                signal.signal(number, handler)

    try:
        return asyncio.run(stoppable())
    except asyncio.CancelledError:
        for number in came:
            handlers[number](number, None)
        raise


def _handlers() -> dict[int, Handler]:
    """The Python handlers of the signals that stop a program; only the main thread has any."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    found = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    return {number: handler for number, handler in found.items() if callable(handler)}


class Room:
    """How much may be under way: who comes waits, in order, while there is nothing left."""

    def __init__(self, size: int) -> None:
        self._left = size
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def enter(self, count: int) -> None:
        """Take `count`; waits while nothing is left, and may take more than is left."""
        if self._left > 0 and not self._waiting:
            self.add(count)
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((count, future))
        await future

    def add(self, count: int) -> None:
        """Take `count` without waiting."""
        self._left -= count

    def leave(self, count: int) -> None:
        """Give `count` back, and let in who waits."""
        self._left += count
        while self._left > 0 and self._waiting:
            wanted, future = self._waiting.popleft()
            if not future.done():
                self.add(wanted)
                future.set_result(None)


@contextlib.contextmanager
def rare_collections() -> Generator[None]:
    """Look for garbage seldom while this lasts.

    Rows and requests hold no cycles, and the search takes a third of the time where there are many
    of them. Counting references frees them as ever.
    """
    before = gc.get_threshold()
    gc.set_threshold(_ALLOCATIONS, 20, 20)
    try:
        yield
    finally:
        gc.set_threshold(*before)


async def gather(tasks: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Results in order; the first error cancels the rest and is raised itself."""
    try:
        async with asyncio.TaskGroup() as group:
            running = [group.create_task(task) for task in tasks]
    except BaseExceptionGroup as errors:
        first: BaseException = errors
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise first from None
    return [task.result() for task in running]
