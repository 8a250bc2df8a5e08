"""One answer to each prompt; prompts that hold `skip` do not belong."""

from datakit.errors import Rejected
from datakit.models.chat import Ask
from datakit.records import Candidates, Prompt, Response
from datakit.step import ChatRole, RowStep


class Answer(RowStep[Prompt, Candidates]):
    """Ask `model`; `copies` outputs for each row."""

    model: ChatRole = "m"
    skip: str = "\0"
    copies: int = 1

    async def each(self, row, kit):
        if self.skip in row.messages[0].content:
            raise Rejected("skipped", "told to")
        reply = await kit.ask_whole(self.model, Ask(messages=row.messages))
        response = Response(text=reply.text, model=kit.identity(self.model))
        made = Candidates(
            prompt=row.messages,
            responses=(response,),
            measures={kit.measure("length"): len(reply.text)},
        )
        return [made] * self.copies
