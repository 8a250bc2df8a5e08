"""One prompt for each group of prompts with one source, in order; the first row is dropped."""

from datakit.records import Message, Prompt
from datakit.step import Drop, GroupStep


class Runs(GroupStep[Prompt, Prompt]):
    """Joins the texts of a group."""

    group_by = "generator"
    order_by = ("license",)

    async def each(self, rows, kit):
        first, *rest = rows
        text = ",".join(row.messages[0].content for row in rest) or "none"
        made = Prompt(
            messages=(Message(role="user", content=text),), parents=tuple(row.id for row in rest)
        )
        return [Drop(id=first.id, reason="first_of_group"), *([made] if rest else [])]
