"""The kinds of rows, their identity, and their one way into and out of a table.

A record is a frozen pydantic value. `Kind.table_schema()` is its polars schema, derived from the
annotations; `tables.py` converts between the two.

Identity. `content` is a hash of what the row says (never of measures, provenance or time);
`origin` says where it came from: the declared key of the source, else content and occurrence
number, and for a derived row its parents, the step's alias and the slot. `id` is the hash of
kind, origin and content, so two equal rows are two rows and a row keeps its id from run to run.
"""

from collections.abc import Sequence
from datetime import datetime
from itertools import chain
from typing import Any, ClassVar, Literal, Self, cast

import polars as pl
from pydantic import model_validator

from datakit.ids import ID_BYTES
from datakit.text import digest
from datakit.values import (
    Labels,
    Measures,
    Number,
    Value,
    no_names,
    polars_type,
)

SCHEMA_VERSION = 1
"""Raised when a kind's columns change their meaning; enters every part key."""


class Message(Value):
    """One turn. Role and content only: other keys break a trainer's shared-prefix search."""

    role: Literal["system", "user", "assistant"]
    content: str


Messages = tuple[Message, ...]


class Failure(Value):
    """A part of a row that failed while the row itself was kept (`need` was met)."""

    slot: str
    kind: str
    reason: str
    raw: str = ""


class Generation(Value):
    """How a text was made. `reasoning` stands apart from the text that a trainer sees."""

    model: str = ""
    sampling: str = ""
    finish_reason: str = ""
    reasoning: str = ""


class Response(Generation):
    """One answer of one model, with its own measures."""

    text: str
    measures: Measures = no_names()


class Feedback(Value):
    """What a user did with turn number `turn` of a conversation (0-based)."""

    turn: int
    kind: Literal["thumb_up", "thumb_down", "regenerated", "copied"]
    text: str = ""


class Verdict(Value):
    """One raw judgement, as given. `scores` stand in the order of `shown`.

    A pairwise verdict shows two responses and scores (1, 0), (0.5, 0.5) or (0, 1); a rating shows
    one or more and scores on `scale`. Estimators are recomputed from these, never stored instead.
    """

    judge: str
    template: str
    form: Literal["pairwise", "rating", "ranking"]
    aspect: str = "overall"
    shown: tuple[int, ...]
    scores: tuple[Number, ...]
    scale: str = ""
    reason: str = ""
    raw: str = ""
    input_tokens: int = 0
    output_tokens: int = 0

    @model_validator(mode="after")
    def _one_score_each(self) -> Self:
        if len(self.shown) != len(self.scores):
            raise ValueError(f"{len(self.shown)} responses shown but {len(self.scores)} scores")
        return self


class Record(Value):
    """What every row carries besides its own fields.

    parents: ids of the rows it was made from; roots: ids of the source rows at the start of that
    line; measures: numbers named `<alias>.<measure>`, sided ones ending in `.chosen`/`.rejected`;
    signed: the measures that change sign when a pair is flipped; extra: unmapped source columns
    as a JSON object; split: the split that the source itself declares.
    """

    own: ClassVar[tuple[str, ...]] = ()

    id: str = ""
    origin: str = ""
    parents: tuple[str, ...] = ()
    roots: tuple[str, ...] = ()
    source: str = ""
    license: str = ""
    split: str = ""
    generator: str = ""
    references: tuple[str, ...] = ()
    labels: Labels = no_names()
    measures: Measures = no_names()
    signed: tuple[str, ...] = ()
    extra: str = ""
    failures: tuple[Failure, ...] = ()

    def __hash__(self) -> int:
        return hash((type(self), self.id))

    def body(self) -> dict[str, Any]:
        """The kind's own fields as JSON data: what the row says."""
        return {name: _plain(getattr(self, name)) for name in self.own}

    @property
    def content(self) -> str:
        """Hex hash of `body()`."""
        return digest(self.body(), ID_BYTES)

    def identified(self, origin: str) -> Self:
        """This row with `origin` and the id that follows from it."""
        return self.model_copy(update={"origin": origin, "id": self.id_at(origin, self.content)})

    def id_at(self, origin: str, content: str) -> str:
        """The id that this row has at `origin`; `content` is its own."""
        return digest([type(self).__name__, origin, content], ID_BYTES)

    def derived(self, parents: Sequence["Record"], alias: str, slot: int) -> Self:
        """This row as output number `slot` of step `alias` over `parents`.

        Carried fields that the step left empty come from the first parent; measures, labels and
        references are merged, the step's own winning.
        """
        first = parents[0]
        ids = tuple([parent.id for parent in parents])
        origin = digest([ids, alias, slot], ID_BYTES)
        labels: dict[str, str] = {}
        measures: dict[str, float] = {}
        for row in (*parents, self):
            labels |= row.labels
            measures |= row.measures
        update: dict[str, Any] = {
            "origin": origin,
            # Nothing that is carried is part of what the row says: its content stands.
            "id": self.id_at(origin, self.content),
            "parents": ids,
            "roots": _joined([parent.roots for parent in parents]),
            "references": self.references or first.references,
            "labels": labels,
            "measures": measures,
            "signed": _joined([row.signed for row in (*parents, self)]),
            "failures": first.failures + self.failures[_shared(first.failures, self.failures) :],
        }
        for name in ("source", "license", "split", "generator", "extra"):
            if not getattr(self, name):
                update[name] = getattr(first, name)
        return self.model_copy(update=update)

    @classmethod
    def table_schema(cls) -> pl.Schema:
        """The kind's table schema, in field order."""
        return pl.Schema(
            {name: polars_type(field.annotation) for name, field in cls.model_fields.items()}
        )


def _plain(value: Any) -> Any:
    """A field as JSON data. Turns are most of what rows say, and are quicker told by hand."""
    if isinstance(value, tuple):
        return [_plain(one) for one in cast("tuple[Any, ...]", value)]
    if isinstance(value, Message):
        return {"role": value.role, "content": value.content}
    return value.model_dump(mode="json") if isinstance(value, Value) else value


def _shared(before: Sequence["Failure"], after: Sequence["Failure"]) -> int:
    """How many failures `after` begins with that are those of `before`: all or none."""
    return len(before) if tuple(after[: len(before)]) == tuple(before) else 0


def _joined(lists: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """The names of all, each once, in order."""
    return tuple(dict.fromkeys(chain.from_iterable(lists)))


def _check_messages(messages: Messages, what: str, last: str) -> None:
    if not messages:
        raise ValueError(f"{what} has no messages")
    if messages[-1].role != last:
        raise ValueError(f"{what} ends in a {messages[-1].role!r} turn, not in a {last!r} turn")
    if not messages[-1].content.strip():
        raise ValueError(f"{what} ends in an empty turn")


class Prompt(Record):
    """Messages that end in a user turn."""

    own = ("messages",)
    messages: Messages

    @model_validator(mode="after")
    def _ends_in_user(self) -> Self:
        _check_messages(self.messages, "prompt", "user")
        return self


class Conversation(Record):
    """A logged chat with what its user did; `time` is when it began (UTC)."""

    own = ("messages", "user", "feedback")
    messages: Messages
    user: str = ""
    time: datetime | None = None
    feedback: tuple[Feedback, ...] = ()

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        if not self.messages:
            raise ValueError("conversation has no messages")
        return self


class Edit(Record):
    """A user changed a draft into `edited`."""

    own = ("context", "draft", "edited", "user")
    context: Messages = ()
    draft: str
    edited: str
    user: str = ""
    time: datetime | None = None


class Candidates(Record):
    """A prompt and its responses."""

    own = ("prompt", "responses")
    prompt: Messages
    responses: tuple[Response, ...]

    def body(self) -> dict[str, Any]:
        """Prompt and response texts; which model wrote them is provenance."""
        texts = [[response.text, response.reasoning] for response in self.responses]
        return {"prompt": _plain(self.prompt), "responses": texts}

    @model_validator(mode="after")
    def _ends_in_user(self) -> Self:
        _check_messages(self.prompt, "prompt", "user")
        if not self.responses:
            raise ValueError("candidates have no responses")
        return self


class Judged(Candidates):
    """Candidates and every raw verdict on them.

    Verdicts are judgements on the row, as measures are, and no part of what it says: another judge
    does not make another row of it, nor other pairs.
    """

    own = ("prompt", "responses", "verdicts")
    verdicts: tuple[Verdict, ...] = ()

    @model_validator(mode="after")
    def _shown_exist(self) -> Self:
        for verdict in self.verdicts:
            for index in verdict.shown:
                if not 0 <= index < len(self.responses):
                    raise ValueError(f"verdict on response {index} of {len(self.responses)}")
        return self


class Pair(Record):
    """A preference: `chosen` over `rejected`, as the turns that follow `prompt`.

    pair_kind `prompt`: one answer (chosen equals rejected) and two prompts, of which `prompt` is
    preferred over `prompt_rejected`. strength: how sure the label is, 0..1, where known.
    """

    own = ("prompt", "prompt_rejected", "chosen", "rejected", "pair_kind", "rationale", "context")
    prompt: Messages
    chosen: Messages
    rejected: Messages
    pair_kind: Literal["response", "prompt"] = "response"
    prompt_rejected: Messages = ()
    rationale: str = ""
    context: str = ""
    strength: Number | None = None
    chosen_from: Generation = Generation()
    rejected_from: Generation = Generation()

    @model_validator(mode="after")
    def _is_a_pair(self) -> Self:
        _check_messages(self.prompt, "prompt", "user")
        _check_messages(self.chosen, "chosen", "assistant")
        _check_messages(self.rejected, "rejected", "assistant")
        if (self.pair_kind == "prompt") != bool(self.prompt_rejected):
            raise ValueError("prompt_rejected belongs to pair_kind 'prompt', and only to it")
        if self.pair_kind == "response" and self.chosen == self.rejected:
            raise ValueError("chosen equals rejected, which prefers nothing")
        return self

    @property
    def pair_key(self) -> str:
        """Hash of prompt(s) and unordered answers: a flipped or re-judged label keeps it."""
        prompts = sorted(_texts(turns) for turns in (self.prompt, self.prompt_rejected))
        answers = sorted(_texts(turns) for turns in (self.chosen, self.rejected))
        return digest([self.pair_kind, prompts, answers], ID_BYTES)

    def swap(self) -> "Pair":
        """The opposite label: sides, sided measures and the sign of signed ones change."""
        measures = {
            _other_side(name): -value if name in self.signed else value
            for name, value in self.measures.items()
        }
        sides = {"chosen": self.rejected, "rejected": self.chosen}
        if self.pair_kind == "prompt":
            sides = {"prompt": self.prompt_rejected, "prompt_rejected": self.prompt}
        update = sides | {
            "chosen_from": self.rejected_from,
            "rejected_from": self.chosen_from,
            "measures": measures,
            "signed": tuple(_other_side(name) for name in self.signed),
            "labels": {_other_side(name): value for name, value in self.labels.items()},
        }
        return self.model_copy(update=update).identified(self.origin)


class Label(Record):
    """One completion and whether it is desirable (KTO, BCO, thumbs)."""

    own = ("prompt", "completion", "desirable", "user")
    prompt: Messages
    completion: Messages
    desirable: bool
    weight: Number = 1.0
    score: Number | None = None
    user: str = ""
    time: datetime | None = None

    @model_validator(mode="after")
    def _ends_in_assistant(self) -> Self:
        _check_messages(self.prompt, "prompt", "user")
        _check_messages(self.completion, "completion", "assistant")
        return self


KINDS: dict[str, type[Record]] = {
    kind.__name__: kind for kind in (Prompt, Conversation, Edit, Candidates, Judged, Pair, Label)
}


def _texts(turns: Messages) -> list[list[str]]:
    return [[turn.role, turn.content] for turn in turns]


def _other_side(name: str) -> str:
    for side, other in ((".chosen", ".rejected"), (".rejected", ".chosen")):
        if name.endswith(side):
            return name.removesuffix(side) + other
    return name
