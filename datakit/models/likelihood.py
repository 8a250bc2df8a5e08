"""How likely a model finds a given text: log-probability of a completion after a prompt.

The text goes to text completions as the prompt of a request that echoes it with its
log-probabilities and generates nothing, so a score costs one reading of the text. `ask_likelihood`
makes the request and `read_likelihood` reads the reply; both are pure. Two forms of reply are read:

    echo             `logprobs` of the echoed text: tokens, token_logprobs, text_offset
    prompt_logprobs  vLLM's own: for each token of the text a map of one token id to {logprob,
                     rank, decoded_token}, null for the first

A token counts for the completion where any of its characters do: the one that straddles the
border, and a part of a character, which is shown empty before the part that completes it. Tokens
behind the text were generated and never count.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from pydantic import Field, JsonValue

from datakit.errors import Refused, Rejected, Unparsable
from datakit.models.chat import Ask, Reply
from datakit.models.sampling import Sampling
from datakit.text import shorten
from datakit.values import Number, Value

_AS_IT_IS = Sampling(temperature=1, top_p=1)
"""The model's own distribution, whatever a role says for answers."""

_NO_PROBABILITY = -9999.0
"""What servers write for minus infinity, which JSON cannot hold."""

_LONGEST_FIRST_TOKEN = 64


class Likelihood(Value):
    """Log-probability of a completion in nats (natural logarithm).

    sum: of all its tokens, at most 0. per_token: their mean. tokens: how many there are.
    """

    sum: Number = Field(le=0)
    per_token: Number = Field(le=0)
    tokens: int = Field(ge=1)


@dataclass(frozen=True, slots=True)
class _Token:
    """One token of a reply; text is None where the reply does not show it."""

    text: str | None
    logprob: JsonValue
    offset: JsonValue = None


def ask_likelihood(
    prompt: str, completion: str, *, max_tokens: int = 0, add_special_tokens: bool | None = None
) -> Ask:
    """The request whose reply says how likely `completion` is after `prompt`.

    max_tokens: what is generated besides; 1 for servers that refuse 0. add_special_tokens: whether
    the server puts its own start token before the text; None leaves it to the server, and sends
    nothing that a strict one might not know.

    Raises Rejected (`empty`, `not_text`) where there is nothing to score, or half a surrogate pair.
    """
    if not completion:
        raise Rejected("empty", "an empty completion has no likelihood")
    try:
        (prompt + completion).encode()
    except UnicodeEncodeError as error:
        raise Rejected("not_text", f"half a surrogate pair at character {error.start}") from error
    extra: dict[str, JsonValue] = {"echo": True, "max_tokens": max_tokens}
    if add_special_tokens is not None:
        extra["add_special_tokens"] = add_special_tokens
    # 0 alternatives: the token of the text itself, and so no doubt about which one it is.
    return Ask(prefix=prompt + completion, sampling=_AS_IT_IS, logprobs=0, extra_body=extra)


def read_likelihood(reply: Reply, prompt: str, completion: str) -> Likelihood:
    """The likelihood of `completion` after `prompt` that a reply to `ask_likelihood` states.

    Raises Refused where a filter blocked it, and Unparsable: `no_prompt_logprobs` where the reply
    has none for the text, `another_text` where its tokens do not spell the text, `no_logprob`
    where a token of the completion has none (the first of a text never has), `invalid_logprob`
    where one is no logarithm of a probability.
    """
    if reply.finish_reason == "content_filter":
        raise Refused("content_filter", "the endpoint declined to score a text", reply.text)
    tokens = _tokens(reply)
    ends = _ends(tokens, reply, prompt + completion)
    border = len(prompt)
    starts = [0, *(max(end, 0) for end in ends)]
    found = [
        _logprob(token, reply)
        for token, start, end in zip(tokens, starts, ends, strict=False)
        if end > border or start == end == border
    ]
    if not found:
        raise _another_text(reply, "no token stands in the completion")
    total = math.fsum(found)
    return Likelihood(sum=total, per_token=total / len(found), tokens=len(found))


def _tokens(reply: Reply) -> list[_Token]:
    """The tokens of either form of reply; Unparsable where it is of neither."""
    said = reply.logprobs
    if isinstance(said, dict):
        tokens, logprobs = said.get("tokens"), said.get("token_logprobs")
        offsets = said.get("text_offset")
        if isinstance(tokens, list) and isinstance(logprobs, list) and tokens:
            if not isinstance(offsets, list):
                offsets = [None] * len(tokens)
            if len(tokens) == len(logprobs) == len(offsets) and all(
                isinstance(token, str) for token in tokens
            ):
                columns = zip(cast("list[str]", tokens), logprobs, offsets, strict=True)
                return [_Token(*row) for row in columns]
    if isinstance(said, list) and said:
        return [_prompt_token(one, number, reply) for number, one in enumerate(said)]
    raise Unparsable(
        "no_prompt_logprobs",
        "the reply holds no log-probabilities of the text; the endpoint must offer text "
        "completions that take `echo` with `logprobs`, as vLLM does",
        reply.text,
    )


def _prompt_token(entry: JsonValue, number: int, reply: Reply) -> _Token:
    if entry is None and number == 0:
        return _Token(None, None)
    if isinstance(entry, dict) and len(entry) == 1:
        (one,) = entry.values()
        if isinstance(one, dict) and isinstance(text := one.get("decoded_token"), str):
            return _Token(text, one.get("logprob"))
    raise Unparsable(
        "no_prompt_logprobs",
        f"entry {number} of prompt_logprobs is not a map of the one token to its logprob and "
        f"decoded_token: {shorten(str(entry), 80)}",
        reply.text,
    )


def _ends(tokens: Sequence[_Token], reply: Reply, text: str) -> list[int]:
    """Where in `text` each of its tokens ends.

    Tokens behind the text have no place in the list; a start token before it ends at -1.
    """
    shown = [token.text or "" for token in tokens]
    ends: list[int] | None = None
    if isinstance(reply.logprobs, dict):
        if not reply.text.startswith(text):
            raise _another_text(reply, f"it echoes {shorten(reply.text, 60)!r}")
        ends = _spelled(shown, text, 0, generated=True)
        # A start token of the server's own stands before the text. Where the text begins with it,
        # the model would read it twice.
        if ends is None and tokens[0].logprob is None and not text.startswith(shown[0]):
            ends = _spelled(shown[1:], text, 0, generated=True)
            ends = ends and [-1, *ends]
        ends = ends or _by_offset(tokens, text)
    else:
        # How long the first token is follows from the others, give or take the spaces.
        whole = len(text) - sum(map(len, shown[1:]))
        for length in (whole, *range(min(len(text), _LONGEST_FIRST_TOKEN))):
            ends = _spelled(shown[1:], text, length) if length >= 0 else None
            if ends is not None:
                # A first token of no length stands before the text, unless it may be a part of a
                # character.
                ends = [length if length or not text[0].isascii() else -1, *ends]
                break
    if ends is None:
        raise _another_text(reply, "its tokens do not spell the text that was sent")
    return ends


def _spelled(
    pieces: Sequence[str], text: str, at: int, generated: bool = False
) -> list[int] | None:
    """The ends of the pieces that spell `text` from `at` to its end; None where they do not.

    generated: pieces may follow behind the text. A space before a piece may be missing or be one
    too many: some tokenizers hold it in the token, and drop or add it when they show one alone.
    """
    ends: list[int] = []
    for piece in pieces:
        if generated and at == len(text):
            break
        if text.startswith(piece, at):
            at += len(piece)
        elif text.startswith(f" {piece}", at):
            at += 1 + len(piece)
        elif piece.startswith(" ") and text.startswith(piece[1:], at):
            at += len(piece) - 1
        else:
            return None
        ends.append(at)
    return ends if at == len(text) else None


def _by_offset(tokens: Sequence[_Token], text: str) -> list[int] | None:
    """The ends that `text_offset` states; None where it contradicts a token that is readable.

    For servers that write a part of a character as `bytes:` and its code, or with a replacement
    mark.
    """
    offsets = [token.offset for token in tokens]
    if not all(isinstance(offset, int) for offset in offsets):
        return None
    starts = cast("list[int]", offsets)
    if starts[0] != 0 or any(a > b for a, b in itertools.pairwise(starts)):
        return None
    starts = [start for start in starts if start < len(text)]
    ends = [*starts[1:], len(text)]
    for token, start, end in zip(tokens, starts, ends, strict=False):
        shown = token.text or ""
        broken = "�" in shown or shown.startswith("bytes:")
        if shown != text[start:end] and not broken:
            return None
    return ends


def _logprob(token: _Token, reply: Reply) -> float:
    value: Any = token.logprob
    shown = shorten(repr(token.text or ""), 40)
    if value is None:
        raise Unparsable(
            "no_logprob",
            f"token {shown} of the completion has no log-probability; the first of a text never "
            "has one, so the prompt must not be empty",
            reply.text,
        )
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not _NO_PROBABILITY < value <= 0
    ):
        raise Unparsable(
            "invalid_logprob",
            f"{shorten(str(value), 40)} of token {shown} is not the logarithm of a probability",
            reply.text,
        )
    return float(value)


def _another_text(reply: Reply, detail: str) -> Unparsable:
    return Unparsable("another_text", f"the reply scores another text: {detail}", reply.text)
