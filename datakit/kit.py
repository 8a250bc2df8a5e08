"""What a step may use while it runs: seeded draws, models, vectors, files."""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from datakit.errors import InputError, Refused, Truncated, Unparsable
from datakit.models.chat import Ask, ChatModel, ChatSpec, Reply, Spec
from datakit.models.embed import Embedder, Vectors
from datakit.text import canonical_json, digest


class Kit:
    """Opened for one step of one run; never stored, never pickled."""

    def __init__(
        self,
        alias: str,
        seed: int,
        base: Path,
        outputs: Path,
        specs: Mapping[str, Spec],
        chats: Mapping[str, ChatModel],
        embedders: Mapping[str, Embedder],
    ) -> None:
        self.alias = alias
        self.seed = seed
        self.outputs = outputs
        self._base = base
        self._specs = specs
        self._chats = chats
        self._embedders = embedders

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
        return canonical_json(ask.sampling.over(spec.sampling))

    async def ask(self, role: str, ask: Ask) -> Reply:
        """The model's reply, whatever its finish reason."""
        return await self._chats[role].answer(ask)

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
