"""A step with a bug: it divides by zero."""

from datakit.records import Prompt
from datakit.step import RowStep


class Crash(RowStep[Prompt, Prompt]):
    """Raises what is no RowError."""

    async def each(self, row, kit):
        return [1 // 0]
