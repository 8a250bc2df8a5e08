"""Prompts in three groups, their order given backwards by the licence column."""

from datakit.records import Message, Prompt
from datakit.step import Range, SourceStep


class Grouped(SourceStep[Prompt]):
    """Twelve rows."""

    def ranges(self, kit):
        yield Range(name="grouped", fingerprint="1")

    async def read(self, part, kit):
        return [
            Prompt(
                messages=(Message(role="user", content=f"{number}"),),
                generator=f"g{number % 3}",
                license=f"{99 - number}",
            )
            for number in range(12)
        ]
