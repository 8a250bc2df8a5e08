"""A step with a bug: it returns nothing and says nothing."""

from datakit.records import Prompt
from datakit.step import RowStep


class Silent(RowStep[Prompt, Prompt]):
    """Returns an empty list."""

    async def each(self, row, kit):
        return []
