"""The handles of a run: models, embedders and ledger, opened from plain settings."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from pydantic import SerializeAsAny

from datakit.kit import Kit
from datakit.models.chat import ChatModel, ChatSpec, EmbedSpec, OpenAISpec, ScriptedSpec, Spec
from datakit.models.embed import CachedEmbedder, open_embedder
from datakit.models.ledger import Ledger, Ledgered, Meter
from datakit.models.openai import OpenAIChat
from datakit.models.scripted import Scripted
from datakit.step import Step, roles
from datakit.store import Done
from datakit.values import Value
from datakit.versions import Version


class Settings(Value):
    """What a run holds besides its steps; plain data, so that another process can use it.

    outputs: where parts and versions go; state: ledger and vectors; base: the recipe's folder;
    limit: at most so many source rows; private: they reach only trusted models; offline: nothing
    may be sent.
    """

    outputs: Path
    state: Path
    base: Path
    seed: int = 0
    rows_per_part: int = 200
    limit: int | None = None
    private: bool = False
    offline: bool = False
    models: dict[str, SerializeAsAny[Spec]] = {}


class Watch:
    """Hears of progress; this one keeps the counts and says nothing."""

    def __init__(self) -> None:
        self.meter = Meter()
        self.is_new = False

    def step_begins(self, alias: str, rows: int) -> None:
        """`rows` more rows will go through step `alias`."""

    def row_done(self, alias: str) -> None:
        """One row of step `alias` is through."""

    def part_done(self, done: Done) -> None:
        """A part is finished, or was found finished."""

    def work_done(self, aliases: Sequence[str]) -> None:
        """A work over these steps is finished."""

    def released(self, version: Version, is_new: bool) -> None:
        """The run's version stands; `is_new` unless it stood before."""
        del version
        self.is_new = is_new


class Session:
    """Open handles for a run's steps; use as `with`, and await `close_models` in the loop."""

    def __init__(
        self,
        settings: Settings,
        steps: Iterable[Step],
        watch: Watch,
        models: Mapping[str, ChatModel] | None = None,
    ) -> None:
        self.settings = settings
        self.watch = watch
        self._ledger: Ledger | None = None
        self._chats: dict[str, Ledgered] = {}
        self._embedders: dict[str, CachedEmbedder] = {}
        for step in steps:
            for _, role, _ in roles(step):
                self._open(role, settings.models[role], (models or {}).get(role))

    def _open(self, role: str, spec: Spec, given: ChatModel | None) -> None:
        if isinstance(spec, ChatSpec) and role not in self._chats:
            if self._ledger is None:
                self._ledger = Ledger(self.settings.state)
            meter = self.watch.meter
            model = given or open_chat(spec, meter)
            silent = given is None and isinstance(spec, OpenAISpec) and spec.base_url is None
            offline = self.settings.offline or silent
            self._chats[role] = Ledgered(model, spec, self._ledger, meter, offline)
        elif isinstance(spec, EmbedSpec) and role not in self._embedders:
            self._embedders[role] = CachedEmbedder(open_embedder(spec), self.settings.state)

    def kit(self, alias: str) -> Kit:
        """The kit of one step."""
        settings = self.settings
        return Kit(
            alias,
            settings.seed,
            settings.base,
            settings.outputs,
            settings.models,
            self._chats,
            self._embedders,
        )

    async def close_models(self) -> None:
        """Close connections; in the event loop that used them."""
        for chat in self._chats.values():
            await chat.close()

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        if self._ledger is not None:
            self._ledger.close()
        for embedder in self._embedders.values():
            embedder.close()


def open_chat(spec: ChatSpec, meter: Meter) -> ChatModel:
    """The chat model of a spec; no connection is made yet."""
    match spec:
        case ScriptedSpec():
            return Scripted(spec)
        case OpenAISpec():
            return OpenAIChat(spec, meter)
        case _:
            raise TypeError(f"no chat model for {type(spec).__name__}")
