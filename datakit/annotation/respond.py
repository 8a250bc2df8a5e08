"""Answers of one or more models to each prompt.

Source: the many-models design of UltraFeedback (2310.01377), without its system-prompt sampling.
Takes: Prompt.
Gives: Candidates, one response for each model and sample, in the order of `models`.
Measures: none.
Drops: `too_few_answers` where fewer than `need` answers arrived (refused, empty, unanswered); what
    did arrive is in the rejects.
"""

from collections.abc import Sequence

from pydantic import Field

from datakit.errors import Refused, RowError, Truncated, Unanswered, Unparsable
from datakit.kit import Kit
from datakit.models.chat import Ask, Reply
from datakit.models.sampling import Sampling
from datakit.records import Candidates, Failure, Message, Prompt, Response
from datakit.step import ChatRole, RowStep
from datakit.text import canonical_json


class Respond(RowStep[Prompt, Candidates]):
    """Ask every model for `samples` answers.

    need: least number of answers for a row to be kept, default all; a kept row keeps its failures.
    system: a system prompt for rows that have none. sampling: over the models' own.
    """

    models: tuple[ChatRole, ...] = Field(min_length=1)
    samples: int = Field(default=1, ge=1)
    need: int | None = Field(default=None, ge=1)
    system: str | None = None
    sampling: Sampling = Sampling()

    async def each(self, row: Prompt, kit: Kit) -> Sequence[Candidates]:
        slots = [(role, draw) for role in self.models for draw in range(self.samples)]
        asks = [self.ask(row, draw) for _, draw in slots]
        replies = await kit.settle(
            kit.ask(role, ask) for (role, _), ask in zip(slots, asks, strict=True)
        )
        responses: list[Response] = []
        failures: list[Failure] = []
        errors: list[RowError] = []
        for (role, draw), ask, reply in zip(slots, asks, replies, strict=True):
            try:
                if isinstance(reply, RowError):
                    raise reply
                responses.append(read(reply, kit.identity(role), kit.sampling(role, ask)))
            except RowError as error:
                errors.append(error)
                slot = f"{role}/{draw}"
                failures.append(
                    Failure(slot=slot, kind=error.kind, reason=str(error), raw=error.raw)
                )
        need = len(slots) if self.need is None else min(self.need, len(slots))
        if len(responses) < need:
            raise _too_few(row, responses, errors, need, len(slots))
        made = Candidates(
            prompt=asks[0].messages, responses=tuple(responses), failures=tuple(failures)
        )
        return [made]

    def ask(self, row: Prompt, draw: int) -> Ask:
        """The request for one draw."""
        messages = row.messages
        if self.system is not None and messages[0].role != "system":
            messages = (Message(role="system", content=self.system), *messages)
        return Ask(messages=messages, sampling=self.sampling, draw=draw)


def read(reply: Reply, model: str, sampling: str) -> Response:
    """The response in a reply; an answer cut by its length is kept as what it is.

    Raises Refused where a filter blocked it and Unparsable where it is empty or no text.
    """
    if reply.finish_reason == "content_filter":
        raise Refused("content_filter", f"{model} declined", reply.text)
    if not reply.text.strip() and reply.finish_reason == "length":
        raise Truncated("length", f"{model} had no tokens left to answer", reply.reasoning)
    if not reply.text.strip():
        raise Unparsable("empty", f"the reply of {model} is empty", reply.text)
    if "\x00" in reply.text:
        raise Unparsable("not_text", f"the reply of {model} holds a NUL byte", reply.text)
    return Response(
        model=model,
        sampling=sampling,
        finish_reason=reply.finish_reason,
        reasoning=reply.reasoning,
        text=reply.text,
    )


def _too_few(
    row: Prompt, responses: Sequence[Response], errors: Sequence[RowError], need: int, asked: int
) -> RowError:
    """Transient if any failure was, so that the next run asks again for those alone."""
    worst = next((error for error in errors if error.transient), errors[0])
    paid = canonical_json(
        row.model_dump(mode="json") | {"responses": [one.model_dump() for one in responses]}
    )
    detail = f"{len(responses)} of {asked} answers, {need} needed; {worst}"
    kind = Unanswered if worst.transient else type(worst)
    return kind("too_few_answers", detail, worst.raw, paid)
