"""The provider's offline batch API."""

from datakit.errors import Pending
from datakit.models.book import Book
from datakit.models.chat import Reply, Request
from datakit.models.ledger import Ledger
from datakit.models.specs import OpenAISpec


class Queued:
    """Requests wait in the ledger's database for the next batch; their rows are pending."""

    def __init__(self, identity: str, spec: OpenAISpec, book: Book) -> None:
        self.identity = identity

    async def answer(self, request: Request) -> Reply:
        raise Pending("batch", "waits for its batch")

    async def close(self) -> None:
        """Nothing to close."""


class Queue:
    """What waits for a batch, and the batches that are under way."""

    def __init__(self, spec: OpenAISpec, ledger: Ledger) -> None:
        self._spec = spec
        self._ledger = ledger

    def settle(self) -> None:
        """Send what is queued and wait for it."""
        raise NotImplementedError
