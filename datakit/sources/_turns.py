"""Texts and message lists, as they occur in files, to turns.

A turn is a dict of `role` and `content` only: further keys of a message are left out, because they
break a trainer's search for the shared prefix. Every function raises Rejected with a reason code
and a detail that names the column. Texts are passed on as they are.
"""

import re
from collections.abc import Sequence
from typing import Any, cast

from datakit.errors import Rejected
from datakit.text import shorten

Turn = dict[str, str]

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
"""The names of roles that are read, and what they mean."""

# "\n\nHuman: ...\n\nAssistant: ...": the one space after the colon belongs to the mark.
_MARK = re.compile(r"(?:\A|\n\n)(Human|Assistant):(?: |(?=\n)|\Z)")
_MARKED = {"Human": "user", "Assistant": "assistant"}


def transcript(text: str) -> list[Turn] | None:
    """The turns of a text that begins with `Human:`, or None where it is no transcript."""
    if not text.startswith(("Human:", "\n\nHuman:")):
        return None
    before, *marked = _MARK.split(text)
    if before:
        return None
    return [
        {"role": _MARKED[mark], "content": content}
        for mark, content in zip(marked[::2], marked[1::2], strict=True)
    ]


def text_of(value: object, column: str) -> str:
    """A text that says something."""
    if value is None:
        raise Rejected("null_value", f"column {column!r} is null")
    if not isinstance(value, str):
        raise wrong_type(value, column, "text")
    if not value.strip():
        raise Rejected("empty_text", f"column {column!r} is empty")
    return sound(value, column)


def sound(text: str, column: str) -> str:
    """`text`, unless it holds what no file of text can hold."""
    if "\0" in text:
        raise Rejected("invalid_row", f"column {column!r} holds a NUL")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            fault = f"column {column!r} holds half of a surrogate pair"
            raise Rejected("invalid_row", fault) from error
    return text


def prompt_turns(value: object, column: str) -> list[Turn]:
    """A prompt given as a text, a transcript or messages."""
    if not isinstance(value, str):
        return said(turns(value, column), column)
    text = text_of(value, column)
    found = transcript(text) or [{"role": "user", "content": text}]
    # A transcript often ends in "\n\nAssistant:", the cue for the answer: no turn of the prompt.
    if len(found) > 1 and found[-1] == {"role": "assistant", "content": ""}:
        found.pop()
    return said(found, column)


def answer_turns(value: object, column: str, prompt: Sequence[Turn]) -> list[Turn]:
    """An answer to `prompt` (a text or assistant turns), or the whole conversation with it."""
    if not isinstance(value, str):
        return said(turns(value, column), column)
    text = text_of(value, column)
    whole = transcript(text)
    # An answer may begin with "Human:" by itself, or only echo the prompt: a transcript goes on.
    if whole is not None and _goes_on(whole, prompt):
        return said(whole, column)
    return [{"role": "assistant", "content": text}]


def whole_turns(value: object, column: str) -> list[Turn]:
    """A conversation given as a transcript or messages."""
    if not isinstance(value, str):
        return said(turns(value, column), column)
    found = transcript(text_of(value, column))
    if found is None:
        raise Rejected(
            "wrong_type",
            f"column {column!r} is a text without `Human:` and `Assistant:` marks, and no column "
            "holds its prompt",
        )
    return said(found, column)


def turns(value: object, column: str) -> list[Turn]:
    """Messages (`role`/`content` or `from`/`value`), one message standing for a list of one."""
    if value is None:
        raise Rejected("null_value", f"column {column!r} is null")
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise wrong_type(value, column, "messages")
    return [
        _turn(message, f"{column}[{number}]")
        for number, message in enumerate(cast("list[object]", value))
    ]


def said(found: list[Turn], column: str) -> list[Turn]:
    """`found`, whose last turn must say something."""
    if not found:
        raise Rejected("empty_text", f"column {column!r} holds no messages")
    if not found[-1]["content"].strip():
        raise Rejected("empty_text", f"column {column!r} ends in an empty turn")
    return found


def is_whole(found: Sequence[Turn]) -> bool:
    """Whether these are a whole conversation, rather than an answer's turns."""
    return found[0]["role"] != "assistant"


def split_shared(
    first: Sequence[Turn], second: Sequence[Turn]
) -> tuple[list[Turn], list[Turn], list[Turn]]:
    """The prompt that two whole conversations share, and what follows it in each.

    The prompt must end in a user turn. Assistant turns that both have in common are given back to
    the answers (equal answers are no fault of the source), unless user turns differ after them.
    """
    shared = 0
    while shared < min(len(first), len(second)) and first[shared] == second[shared]:
        shared += 1
    end = shared
    while end and first[end - 1]["role"] == "assistant":
        end -= 1
    tails = list(first[end:]), list(second[end:])
    later = any(turn["role"] != "assistant" for tail in tails for turn in tail)
    if not end or first[end - 1]["role"] != "user" or (end < shared and later):
        raise Rejected(
            "prefix_mismatch",
            f"the conversations have {shared} turns in common, which must end in a user turn",
        )
    return list(first[:end]), *tails


def check_prompt(prompt: Sequence[Turn], shared: Sequence[Turn], column: str) -> None:
    """The prompt's own column must agree with the prompt inside the conversations.

    It may be all of it, its beginning or its end (sets of longer chats name one turn), with or
    without the system turn.
    """
    known = [turn["content"].strip() for turn in prompt if turn["role"] != "system"]
    found = [turn["content"].strip() for turn in shared if turn["role"] != "system"]
    if known not in (found[: len(known)], found[-len(known) :]):
        raise Rejected(
            "prefix_mismatch",
            f"the conversations do not hold the prompt in column {column!r}",
        )


def with_system(found: list[Turn], value: object, column: str) -> list[Turn]:
    """`found` behind a system turn, where the row has one of its own."""
    if value is None or value == "":
        return found
    turn = {"role": "system", "content": text_of(value, column)}
    return found if found[:1] == [turn] else [turn, *found]


def wrong_type(value: object, where: str, wanted: str) -> Rejected:
    """The reject of a value of another type than `wanted`."""
    shown = shorten(repr(value)[:200], 60)
    return Rejected(
        "wrong_type", f"column {where!r} holds {type(value).__name__} {shown}, not {wanted}"
    )


def _goes_on(whole: Sequence[Turn], prompt: Sequence[Turn]) -> bool:
    return len(whole) > len(prompt) and list(whole[: len(prompt)]) == list(prompt)


def _turn(value: object, where: str) -> Turn:
    if value is None:
        raise Rejected("null_value", f"column {where!r} is null")
    if not isinstance(value, dict):
        raise wrong_type(value, where, "a message")
    message = cast("dict[str, Any]", value)
    name = message.get("role") or message.get("from")
    content = message.get("content")
    if content is None:
        content = message.get("value")
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise Rejected("unknown_role", f"column {where!r} has the role {name!r}; known: {_KNOWN}")
    if isinstance(content, list):
        content = "".join(_part(part, where) for part in cast("list[object]", content))
    if content is None:
        raise Rejected("null_value", f"column {where!r} has no content")
    if not isinstance(content, str):
        raise wrong_type(content, where, "text")
    return {"role": role, "content": sound(content, where)}


def _part(value: object, where: str) -> str:
    """The text of one content part."""
    if isinstance(value, dict):
        part = cast("dict[str, Any]", value)
        if part.get("type") == "text" and isinstance(part.get("text"), str):
            return part["text"]
    raise wrong_type(value, where, "a content part of type 'text'")


_KNOWN = ", ".join(ROLES)
