"""What a step may use while it runs: seeded draws, models, vectors, files."""

import asyncio
import random
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar, cast

from datakit.errors import InputError, Pending, Refused, RowError, Truncated, Unparsable
from datakit.models.answers import A, read_answer, repair, schema_of
from datakit.models.chat import Ask, Reply
from datakit.models.embed import Embedder, Vectors
from datakit.models.ledgered import Ledgered
from datakit.models.likelihood import Likelihood, ask_likelihood, read_likelihood
from datakit.models.specs import ChatSpec, Spec
from datakit.records import Messages
from datakit.templates import BUILT_IN, render_split, template_of
from datakit.text import digest

T = TypeVar("T")


class Kit:
    """Opened for one step of one run; never stored, never pickled."""

    def __init__(
        self,
        alias: str,
        seed: int,
        base: Path,
        outputs: Path,
        specs: Mapping[str, Spec],
        chats: Mapping[str, Ledgered],
        embedders: Mapping[str, Embedder],
        depth: int = 0,
    ) -> None:
        self.alias = alias
        self.seed = seed
        self.outputs = outputs
        self._base = base
        self._specs = specs
        self._chats = chats
        self._embedders = embedders
        self._depth = depth

    def rng(self, row_id: str, purpose: str) -> random.Random:
        """A generator of its own for each row and purpose: the only source of randomness."""
        return random.Random(digest([self.seed, self.alias, row_id, purpose]))

    def measure(self, name: str) -> str:
        """The full name of this step's measure `name`."""
        return f"{self.alias}.{name}"

    def identity(self, role: str) -> str:
        """The identity of the model behind `role`."""
        return self._chats[role].identity

    def sampling(self, role: str, ask: Ask) -> str:
        """The sampling settings that `ask` will have, as JSON."""
        spec = self._specs[role]
        assert isinstance(spec, ChatSpec)
        return ask.sampling.text_over(spec.sampling)

    async def ask(self, role: str, ask: Ask) -> Reply:
        """The model's reply, whatever its finish reason."""
        return await self._chats[role].answer(ask, self.alias, self._depth)

    async def ask_whole(self, role: str, ask: Ask) -> Reply:
        """A reply that is whole: raises Refused, Truncated, or Unparsable where it is empty."""
        reply = await self.ask(role, ask)
        name = self.identity(role)
        if reply.finish_reason == "content_filter":
            raise Refused("content_filter", f"{name} declined", reply.text)
        if reply.finish_reason == "length":
            raise Truncated("length", f"the reply of {name} was cut", reply.text)
        if not reply.text.strip():
            raise Unparsable("empty", f"the reply of {name} is empty", reply.text)
        return reply

    async def ask_for(self, role: str, ask: Ask, answer: type[A]) -> tuple[A, Reply]:
        """A reply that fits the type `answer`, and the reply it was read from.

        A reply that does not fit is shown to the model once with its error. Raises Unparsable
        where the second does not fit either, and as `ask_whole`.
        """
        asked = replace(ask, answer_schema=schema_of(answer))
        reply = await self.ask_whole(role, asked)
        try:
            return read_answer(reply.text, answer), reply
        except Unparsable as error:
            again = repair(asked, reply.text, error)
        reply = await self.ask_whole(role, again)
        return read_answer(reply.text, answer), reply

    async def score(
        self, role: str, prompt: Messages, completion: Messages, template: str | None = None
    ) -> Likelihood:
        """How likely the model finds the turns of `completion` after those of `prompt`.

        template: a built-in chat template, a `.jinja` file or a model folder that makes text of
        them; by default the model's own. A server that cannot generate 0 tokens is asked for the
        max_tokens of the role's extra_body. Raises InputError, and RowErrors, as `template_of`,
        `render_split`, `ask_likelihood` and `read_likelihood` do.
        """
        spec = self._specs[role]
        assert isinstance(spec, ChatSpec)
        named = template if template is None or template in BUILT_IN else self.path(template)
        found = template_of(spec, named)
        before, after = render_split(prompt, completion, found)
        given = spec.extra_body.get("max_tokens")
        ask = ask_likelihood(
            before,
            after,
            max_tokens=given if isinstance(given, int) else 0,
            add_special_tokens=False if found.is_whole else None,
        )
        return read_likelihood(await self.ask(role, ask), before, after)

    async def settle(self, jobs: Iterable[Awaitable[T]]) -> list[T | RowError]:
        """The result of every job, or the row's own error in its place; waits for all of them.

        Any other error is raised, once all have ended: what was asked is in the ledger by then.
        """
        waiting = list(jobs)
        if len(waiting) == 1:
            # No task of its own: it would cost as much as the rest of a cheap call.
            try:
                return [await waiting[0]]
            except RowError as error:
                return [error]
        found = await asyncio.gather(*waiting, return_exceptions=True)
        errors = [one for one in found if isinstance(one, BaseException)]
        fatal = [one for one in errors if not isinstance(one, RowError)]
        if fatal:
            raise next((one for one in fatal if not isinstance(one, Pending)), _joined(fatal))
        return cast("list[T | RowError]", found)

    def embed(self, role: str, texts: Sequence[str]) -> Vectors:
        """float32 [n, d] of unit length, each distinct text embedded once ever."""
        return self._embedders[role].encode(texts)

    def path(self, name: str) -> Path:
        """The file that a recipe names: seen from the recipe's folder, else from here.

        Raises InputError that names every place that was tried.
        """
        tried = list(dict.fromkeys([(self._base / name).resolve(), Path(name).resolve()]))
        for path in tried:
            if path.exists():
                return path
        places = " or ".join(repr(str(path)) for path in tried)
        raise InputError(f"no file {places}")


def _joined(waiting: Sequence[BaseException]) -> Pending:
    """All that a row waits for, as one: its reasons, with spaces between."""
    found = [one for one in waiting if isinstance(one, Pending)]
    reasons = dict.fromkeys(one.reason for one in found)
    return Pending(" ".join(reasons), found[0].detail if found else "")
