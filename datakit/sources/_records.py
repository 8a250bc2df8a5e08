"""One row of a file, read by its layout, to a record. Raises Rejected or pydantic's errors."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from datakit.errors import Rejected
from datakit.records import (
    Candidates,
    Conversation,
    Edit,
    Generation,
    Label,
    Pair,
    Prompt,
    Record,
    Response,
)
from datakit.sources._carried import carried, license_of, optional, person
from datakit.sources._cells import (
    compact_json,
    nested_response,
    number,
    optional_text,
)
from datakit.sources._layouts import Layout, Row
from datakit.sources._turns import (
    Turn,
    answer_turns,
    check_prompt,
    is_whole,
    prompt_turns,
    split_shared,
    text_of,
    turns,
    whole_turns,
    with_system,
    wrong_type,
)


@dataclass(frozen=True)
class Member:
    """One row of a group of Candidates, with the file that it stands in."""

    layout: Layout
    row: Row
    prompt: list[Turn]
    response: Response


def prompt_record(layout: Layout, row: Row) -> Prompt:
    """A Prompt."""
    return Prompt.model_validate({"messages": _prompt(layout, row), **carried(layout, row)})


def conversation_record(layout: Layout, row: Row) -> Conversation:
    """A Conversation."""
    column = _name(layout, "messages")
    value = row.get(column)
    found = whole_turns(value, column) if isinstance(value, str) else turns(value, column)
    if not found:
        raise Rejected("empty_text", f"column {column!r} holds no messages")
    fields = {"messages": _system(layout, row, found), **person(layout, row)}
    return Conversation.model_validate(fields | carried(layout, row))


def edit_record(layout: Layout, row: Row) -> Edit:
    """An Edit."""
    context = layout.column("context")
    given = None if context is None else row.get(context)
    fields = {
        "draft": _text(layout, row, "draft"),
        "edited": _text(layout, row, "edited"),
        "context": [] if given is None or given == "" else prompt_turns(given, context or ""),
        **person(layout, row),
    }
    return Edit.model_validate(fields | carried(layout, row))


def pair_record(layout: Layout, row: Row) -> Pair:
    """A Pair, whichever of the layouts its sides come in."""
    chosen_name, rejected_name = _name(layout, "chosen"), _name(layout, "rejected")
    if _opening(layout) is None:
        prompt, chosen, rejected = split_shared(
            whole_turns(row.get(chosen_name), chosen_name),
            whole_turns(row.get(rejected_name), rejected_name),
        )
    else:
        prompt = _own_prompt(layout, row)
        chosen = answer_turns(row.get(chosen_name), chosen_name, prompt)
        rejected = answer_turns(row.get(rejected_name), rejected_name, prompt)
        if is_whole(chosen) != is_whole(rejected):
            raise Rejected(
                "prefix_mismatch",
                f"one of columns {chosen_name!r} and {rejected_name!r} is a whole conversation, "
                "the other an answer",
            )
        if is_whole(chosen):
            shared, chosen, rejected = split_shared(chosen, rejected)
            check_prompt(prompt, shared, _opening(layout) or "")
            prompt = shared
    fields: dict[str, Any] = {
        "prompt": _system(layout, row, prompt),
        "chosen": chosen,
        "rejected": rejected,
        "rationale": optional(layout, row, "rationale"),
        "context": optional(layout, row, "context"),
    }
    for side in ("chosen", "rejected"):
        model = optional(layout, row, f"{side}_model")
        if model:
            fields[f"{side}_from"] = Generation(model=model)
    return Pair.model_validate(fields | carried(layout, row))


def label_record(layout: Layout, row: Row) -> Label:
    """A Label."""
    column = _name(layout, "completion")
    prompt = _own_prompt(layout, row)
    completion = answer_turns(row.get(column), column, prompt)
    if is_whole(completion):
        shared, completion, _ = split_shared(completion, completion)
        check_prompt(prompt, shared, _opening(layout) or "")
        prompt = shared
    name = _name(layout, "label")
    desirable = row.get(name)
    if desirable is None:
        raise Rejected("null_value", f"column {name!r} is null")
    if desirable not in (0, 1):
        raise wrong_type(desirable, name, "true or false")
    score = layout.column("score")
    fields = {
        "prompt": _system(layout, row, prompt),
        "completion": completion,
        "desirable": bool(desirable),
        "score": None if score is None else number(row.get(score), score),
        **person(layout, row),
    }
    return Label.model_validate(fields | carried(layout, row))


def candidates_record(layout: Layout, row: Row) -> Candidates:
    """Candidates of one row: of a list of responses, or of the one response that it has."""
    if "responses" in layout.columns:
        return _nested(layout, row)
    one = member(layout, row)
    fields = {"prompt": one.prompt, "responses": [one.response]}
    return Candidates.model_validate(fields | carried(layout, row))


def _nested(layout: Layout, row: Row) -> Candidates:
    """What is no field of a response goes to `extra`."""
    column = _name(layout, "responses")
    value = row.get(column)
    if value is None:
        raise Rejected("null_value", f"column {column!r} is null")
    if not isinstance(value, list):
        raise wrong_type(value, column, "a list of responses")
    responses: list[Response] = []
    rest: list[object] = []
    for position, one in enumerate(cast("list[object]", value)):
        response, unread = nested_response(one, f"{column}[{position}]")
        responses.append(response)
        rest.append(unread)
    if not responses:
        raise Rejected("empty_text", f"column {column!r} holds no responses")
    fields = {"prompt": _prompt(layout, row), "responses": responses}
    unread = {column: rest} if any(rest) else {}
    return Candidates.model_validate(fields | carried(layout, row, unread))


def member(layout: Layout, row: Row) -> Member:
    """One row that is one response."""
    scores = {
        name: found
        for name in layout.columns.get("score", ())
        if (found := number(row.get(name), name)) is not None
    }
    sampling = {name: row.get(name) for name in layout.columns.get("sampling", ())}
    given = {name: value for name, value in sampling.items() if value is not None}
    response = Response(
        text=_text(layout, row, "response"),
        model=optional(layout, row, "model"),
        sampling=compact_json(given) if given else "",
        finish_reason=optional(layout, row, "finish_reason"),
        measures=scores,
    )
    return Member(layout, row, _prompt(layout, row), response)


def group_record(members: Sequence[Member], group_by: Sequence[str]) -> Candidates:
    """The Candidates of a group. What stands once for the group comes from its first row.

    Unmapped columns stay with their response, in `extra` under `responses`; a group whose rows
    have several licenses is under all of them.
    """
    first = members[0]
    of_response = {"response", "model", "sampling", "finish_reason", "score"}
    unread: list[Row] = []
    for one in members:
        own = {name for role in of_response for name in one.layout.columns.get(role, ())}
        once = (one.layout.used - own) | set(group_by)
        unread.append(
            {
                name: value
                for name, value in one.row.items()
                if name not in own
                and not (name in once and (one is first or value == first.row.get(name)))
            }
        )
    extra: Row = {name: first.row[name] for name in group_by if name not in first.layout.used}
    if any(unread):
        extra["responses"] = unread
    shared = carried(first.layout, first.row) | {"extra": compact_json(extra) if extra else ""}
    licenses = {license_of(one.layout, one.row) for one in members}
    shared["license"] = " AND ".join(sorted(licenses - {""}))
    return Candidates.model_validate(
        {"prompt": first.prompt, "responses": [one.response for one in members], **shared}
    )


RECORDS: dict[str, Callable[[Layout, Row], Record]] = {
    "Prompt": prompt_record,
    "Conversation": conversation_record,
    "Edit": edit_record,
    "Candidates": candidates_record,
    "Pair": pair_record,
    "Label": label_record,
}
"""Row to record, by kind."""


def _opening(layout: Layout) -> str | None:
    """The column that the prompt stands in."""
    for role in ("prompt", "instruction", "messages"):
        if role in layout.columns:
            return layout.columns[role][0]
    return None


def _own_prompt(layout: Layout, row: Row) -> list[Turn]:
    """The prompt in its own column, without the system turn that has a column of its own."""
    column = _opening(layout)
    assert column is not None, "find_columns asks for a prompt"
    found = prompt_turns(row.get(column), column)
    name = layout.column("input")
    more = "" if name is None else optional_text(row.get(name), name)
    if not more:
        return found
    last = found[-1]
    return [*found[:-1], {"role": last["role"], "content": f"{last['content']}\n\n{more}"}]


def _system(layout: Layout, row: Row, found: list[Turn]) -> list[Turn]:
    name = layout.column("system")
    return found if name is None else with_system(found, row.get(name), name)


def _prompt(layout: Layout, row: Row) -> list[Turn]:
    return _system(layout, row, _own_prompt(layout, row))


def _name(layout: Layout, role: str) -> str:
    """The column of a role that `find_columns` made sure of."""
    return layout.columns[role][0]


def _text(layout: Layout, row: Row, role: str) -> str:
    name = _name(layout, role)
    return text_of(row.get(name), name)
