"""Prompts `question 0`, `question 1`, ...

Source: none, a toy.
Takes: nothing.
Gives: Prompt.
Measures: none.
Drops: none.
"""

from datakit.records import Message, Prompt
from datakit.step import Range, SourceStep


class Numbers(SourceStep[Prompt]):
    """`rows` prompts, in ranges of `per_range`, numbered modulo `modulo` so that some repeat."""

    rows: int = 10
    modulo: int = 1_000_000
    edited: int = -1
    per_range: int = 50

    def ranges(self, kit):
        for start in range(0, self.rows, self.per_range):
            stop = min(start + self.per_range, self.rows)
            mark = self.edited if start <= self.edited < stop else ""
            fingerprint = f"{start}-{stop}-{mark}"
            yield Range(name="numbers", start=start, stop=stop, fingerprint=fingerprint)

    async def read(self, part, kit):
        texts = [
            f"question {number % self.modulo}" + ("!" if number == self.edited else "")
            for number in range(part.start, part.stop)
        ]
        return [
            Prompt(
                messages=(Message(role="user", content=text),),
                labels={"parity": "odd" if number % 2 else "even"},
            )
            for number, text in enumerate(texts)
        ]
