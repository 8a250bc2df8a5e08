"""The handles of a run: models, embedders and ledger, opened from plain settings."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from pydantic import SerializeAsAny

from datakit.kit import Kit
from datakit.models.batch import Queued
from datakit.models.book import Book, Meter
from datakit.models.budget import Allowance, Budget
from datakit.models.chat import ChatModel
from datakit.models.embed import CachedEmbedder, open_embedder
from datakit.models.ledger import Ledger
from datakit.models.ledgered import Closed, Counted, Ledgered, Recorded, Silent
from datakit.models.openai import OpenAIChat
from datakit.models.prices import price_of
from datakit.models.scripted import Scripted
from datakit.models.specs import ChatSpec, EmbedSpec, OpenAISpec, ScriptedSpec, Spec, VLLMSpec
from datakit.models.turns import InTurns
from datakit.step import Step, roles
from datakit.store import Done
from datakit.values import Value
from datakit.versions import Version

PHASE = "phase:"
"""Before the role, the reason why a row waits for a local model to be up."""


class Settings(Value):
    """What a run holds besides its steps; plain data, so that another process can use it.

    outputs: where parts and versions go; state: ledger and vectors; base: the recipe's folder;
    limit: at most so many source rows; private: they reach only trusted models; offline: nothing
    may be sent; finish_partial: nothing is sent, and rows that would need it are left out. recipe
    and run name what is spent. served: where local models are up, by role; a local model that is
    in none of it is not up in this pass. instead: what is done with a request that would be sent:
    it is only counted, or written to the queue of requests.
    """

    outputs: Path
    state: Path
    base: Path
    seed: int = 0
    rows_per_part: int = 200
    limit: int | None = None
    private: bool = False
    offline: bool = False
    finish_partial: bool = False
    recipe: str = ""
    run: str = ""
    budget: Budget | None = None
    models: dict[str, SerializeAsAny[Spec]] = {}
    served: dict[str, tuple[str, ...]] = {}
    instead: Literal["", "count", "queue"] = ""


class Watch:
    """Hears of progress; this one keeps the counts and says nothing."""

    def __init__(self) -> None:
        self.meter = Meter()
        self.is_new = False

    def pass_begins(self, aliases: Sequence[str]) -> None:
        """A pass over these steps begins: their rows are counted anew."""

    def step_begins(self, alias: str, rows: int) -> None:
        """`rows` more rows will go through step `alias`."""

    def row_done(self, alias: str) -> None:
        """One row of step `alias` is through."""

    def part_done(self, done: Done) -> None:
        """A part is finished, or was found finished."""

    def embedded(self, role: str, done: int, of: int) -> None:
        """`done` of the `of` texts that one call must embed are done; 0 begins a call."""

    def work_done(self, aliases: Sequence[str]) -> None:
        """A work over these steps is finished."""

    def released(self, version: Version, is_new: bool) -> None:
        """The run's version stands; `is_new` unless it stood before."""
        del version
        self.is_new = is_new


class Session:
    """Open handles for a run's steps; use as `with`, and await `close_models` in the loop.

    share: among how many sessions that work at the same time a model's window is divided.
    """

    def __init__(
        self,
        settings: Settings,
        steps: Iterable[Step],
        watch: Watch,
        models: Mapping[str, ChatModel] | None = None,
        share: int = 1,
    ) -> None:
        self.settings = settings
        self.watch = watch
        self._share = share
        self._book: Book | None = None
        self._chats: dict[str, Ledgered] = {}
        self._inners: dict[str, ChatModel] = {}
        self._embedders: dict[str, CachedEmbedder] = {}
        for step in steps:
            for _, role, _ in roles(step):
                self._open(role, settings.models[role], (models or {}).get(role))

    def _open(self, role: str, spec: Spec, given: ChatModel | None) -> None:
        if isinstance(spec, ChatSpec) and role not in self._chats:
            if self._book is None:
                self._book = self._opened_book()
            price = price_of(spec, self.settings.state)
            if price is None and given is None:
                self.watch.meter.is_priced = False
            inner = self._shared(role, spec, given, self._book)
            self._chats[role] = Ledgered(inner, spec, self._book, price, role)
        elif isinstance(spec, EmbedSpec) and role not in self._embedders:
            heard = partial(self.watch.embedded, role)
            self._embedders[role] = CachedEmbedder(open_embedder(spec), self.settings.state, heard)

    def _opened_book(self) -> Book:
        settings = self.settings
        ledger = Ledger(settings.state)
        allowance = None
        if settings.budget is not None:
            allowance = Allowance(settings.budget, ledger, settings.recipe, settings.run)
        return Book(ledger, self.watch.meter, settings.recipe, settings.run, allowance)

    def _shared(self, role: str, spec: ChatSpec, given: ChatModel | None, book: Book) -> ChatModel:
        """What answers a role; roles of one and the same spec share it, and its window."""
        if given is not None or self.settings.instead or isinstance(spec, VLLMSpec):
            return self._inner(role, spec, given, book)
        key = spec.model_dump_json()
        if key not in self._inners:
            self._inners[key] = self._inner(role, spec, given, book)
        return self._inners[key]

    def _inner(self, role: str, spec: ChatSpec, given: ChatModel | None, book: Book) -> ChatModel:
        """What answers the requests that the ledger does not know."""
        settings = self.settings
        name = given.identity if given else spec.resolved_identity()
        if settings.instead == "count":
            return Counted(name, role, book)
        if settings.instead == "queue":
            return Queued(name, spec, book, settings.run)
        if settings.finish_partial:
            return Closed(name, "unfinished", f"{name} has not answered, and nothing is sent")
        if settings.offline:
            return Silent(name)
        if given is not None:
            return Recorded(given, spec, book)
        if isinstance(spec, ScriptedSpec):
            return Recorded(Scripted(spec), spec, book)
        if isinstance(spec, OpenAISpec) and not spec.urls:
            return Silent(name)
        if isinstance(spec, VLLMSpec):
            urls = settings.served.get(role)
            price = price_of(spec, settings.state)
            up = None if urls is None else OpenAIChat(spec, urls, book, price, self._share)
            return InTurns(spec, up, book, settings.run, f"{PHASE}{role}")
        assert isinstance(spec, OpenAISpec)
        if spec.mode == "batch":
            return Queued(name, spec, book, settings.run)
        return OpenAIChat(spec, spec.urls, book, price_of(spec, settings.state), self._share)

    @property
    def is_spent(self) -> bool:
        """Whether the budget allows no further request."""
        book = self._book
        return book is not None and book.allowance is not None and book.allowance.is_spent

    def kit(self, alias: str, depth: int = 0) -> Kit:
        """The kit of one step, `depth` steps into its stage."""
        settings = self.settings
        return Kit(
            alias,
            settings.seed,
            settings.base,
            settings.outputs,
            settings.models,
            self._chats,
            self._embedders,
            depth,
        )

    async def close_models(self) -> None:
        """Close connections; in the event loop that used them."""
        for chat in self._chats.values():
            await chat.close()

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        for embedder in self._embedders.values():
            embedder.close()
        if self._book is not None:
            try:
                self._book.close()
            finally:
                self._book.ledger.close()
