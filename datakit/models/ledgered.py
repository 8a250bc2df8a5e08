"""Asking through the ledger: what is known is replayed, what is not is asked once.

`Ledgered` stands before every model. What stands behind it says what happens to a request that the
ledger does not know: an endpoint answers it, `Recorded` lets a model that runs here answer it,
`Silent` may not, and `Closed` cannot now.
"""

import asyncio
from typing import Any

from datakit.errors import NotRecorded, Pending
from datakit.models.book import Book
from datakit.models.chat import Ask, ChatModel, Reply, Request, request_of
from datakit.models.specs import FREE, ChatSpec, Price
from datakit.text import shorten


class Ledgered:
    """A chat model whose answers are looked up first.

    Equal requests that are under way at the same time are sent once.
    """

    def __init__(
        self, inner: ChatModel, spec: ChatSpec, book: Book, price: Price | None, role: str = ""
    ) -> None:
        self.identity = inner.identity
        self._inner = inner
        self._spec = spec
        self._book = book
        self._price = price or FREE
        self._role = role
        self._under_way = book.under_way

    async def answer(self, ask: Ask, step: str = "", depth: int = 0) -> Reply:
        """The recorded reply, or a new one; raises as ChatModel does, and Pending."""
        request = request_of(self._spec, self.identity, ask, step, depth)
        key = request.key
        while True:
            known = self._book.ledger.get(key)
            if known is not None:
                usd = self._price.usd(known.input_tokens, known.output_tokens)
                self._book.replayed(self.identity, self._role, step, known, usd)
                return known
            other = self._under_way.get(key)
            if other is None:
                break
            await asyncio.wait([other])
            # Who asked first may have been cancelled: then it is for one of those who wait to ask.
            if not other.cancelled():
                return other.result()
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._under_way[key] = future
        try:
            reply = await self._inner.answer(request)
            future.set_result(reply)
            return reply
        except asyncio.CancelledError:
            future.cancel()
            raise
        except BaseException as error:
            future.set_exception(error)
            future.exception()  # seen: whoever waits gets it, nobody waiting is no warning
            raise
        finally:
            del self._under_way[key]

    async def close(self) -> None:
        await self._inner.close()


class Recorded:
    """A model that runs here, or that the caller brought: its answers are written down."""

    def __init__(self, inner: ChatModel, spec: ChatSpec, book: Book) -> None:
        self.identity = inner.identity
        self._inner = inner
        self._book = book
        self._window = asyncio.Semaphore(spec.max_in_flight or 256)

    async def answer(self, request: Request) -> Reply:
        async with self._window:
            reply = await self._inner.answer(request)
            used = (reply.input_tokens, reply.output_tokens)
            return await self._book.write(self.identity, request, reply, used, 0.0)

    async def close(self) -> None:
        await self._inner.close()


class Silent:
    """Nothing may be sent (offline, no base_url): a request that is not recorded stops the run."""

    def __init__(self, identity: str) -> None:
        self.identity = identity

    async def answer(self, request: Request) -> Reply:
        raise NotRecorded(
            f"no recorded answer of {self.identity!r} to {_last_words(request.body)!r}, and "
            "nothing may be sent (offline, or a model without base_url); run without "
            "--offline, give the model a base_url, or import the answers with "
            "`datakit ledger import`"
        )

    async def close(self) -> None:
        """Nothing to close."""


class Closed:
    """Nothing is sent in this pass: a request that is not recorded leaves its row pending."""

    def __init__(self, identity: str, reason: str, detail: str) -> None:
        self.identity = identity
        self._said = reason, detail

    async def answer(self, request: Request) -> Reply:
        del request
        raise Pending(*self._said)

    async def close(self) -> None:
        """Nothing to close."""


class Counted:
    """What would be sent is counted, and its row is pending."""

    def __init__(self, identity: str, role: str, book: Book) -> None:
        self.identity = identity
        self._role = role
        self._counts = book.meter.outstanding

    async def answer(self, request: Request) -> Reply:
        place = request.step, self._role
        calls, characters = self._counts.get(place, (0, 0))
        self._counts[place] = calls + 1, characters + len(request.text)
        raise Pending("plan", "nothing is sent")

    async def close(self) -> None:
        """Nothing to close."""


def _last_words(request: dict[str, Any]) -> str:
    if "prompt" in request:
        return shorten(str(request["prompt"])[-80:], 80)
    return shorten(request["messages"][-1]["content"], 80)
