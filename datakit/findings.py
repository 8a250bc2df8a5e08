"""What rules find in texts: pure functions over polars, for filters and for lint alike.

A finding about one text is an expression over a String column: it is null where the text is, takes
time linear in the text (the Rust regex engine never backtracks), and says nothing of what it found
but its kind. `sided_texts` lays the texts of any record table out for them.
"""

import re
from collections.abc import Sequence
from typing import Literal, get_args

import polars as pl

Side = Literal[
    "prompt",
    "prompt.chosen",
    "prompt.rejected",
    "chosen",
    "rejected",
    "draft",
    "edited",
    "response",
]
"""Where a text stands in its row. A pair of prompts has its two prompts in `prompt.chosen` and
`prompt.rejected`, so that a measure named after its side follows `Pair.swap`."""

SIDES: tuple[Side, ...] = get_args(Side)
PROMPTS: tuple[Side, ...] = SIDES[:3]
ANSWERS: tuple[Side, ...] = SIDES[3:]


# -- the texts of a record table -----------------------------------------------------------------


def sided_texts(frame: pl.DataFrame) -> pl.DataFrame:
    """Every text of a record table of any kind: `row` (its number), `side` and `text`.

    The turns of a side are joined by line feeds. Of a conversation, the assistant's turns are its
    `response`. Candidates have as many `response` texts as responses; of the others a row has each
    side at most once, and not at all where it has no turn there.
    """
    numbered = frame.with_row_index("row")
    found: list[pl.DataFrame] = []
    for side, text in _sides(frame).items():
        texts = numbered.select("row", side=pl.lit(side), text=text)
        if isinstance(texts.schema["text"], pl.List):
            texts = texts.explode("text")
        found.append(texts.drop_nulls("text"))
    empty = pl.DataFrame(schema={"row": pl.UInt32(), "side": pl.String(), "text": pl.String()})
    return pl.concat([empty, *found])


def _sides(frame: pl.DataFrame) -> dict[Side, pl.Expr]:
    names = frame.columns
    if "rejected" in names:
        two = pl.col("prompt_rejected").list.len() > 0
        return {
            "prompt": pl.when(~two).then(_turns("prompt")),
            "prompt.chosen": pl.when(two).then(_turns("prompt")),
            "prompt.rejected": pl.when(two).then(_turns("prompt_rejected")),
            "chosen": _turns("chosen"),
            "rejected": _turns("rejected"),
        }
    if "responses" in names:
        texts = pl.col("responses").list.eval(pl.element().struct.field("text"))
        return {"prompt": _turns("prompt"), "response": texts}
    if "completion" in names:
        return {"prompt": _turns("prompt"), "response": _turns("completion")}
    if "draft" in names:
        sides: dict[Side, pl.Expr] = {"draft": pl.col("draft"), "edited": pl.col("edited")}
        return {"prompt": _turns("context"), **sides}
    if "feedback" in names:
        role = pl.element().struct.field("role")
        return {
            "prompt": _turns("messages", role != "assistant"),
            "response": _turns("messages", role == "assistant"),
        }
    return {"prompt": _turns("messages")}


def _turns(name: str, of: pl.Expr | None = None) -> pl.Expr:
    """The turns of a column as one text, null where there is none."""
    turns = pl.element() if of is None else pl.element().filter(of)
    texts = pl.col(name).list.eval(turns.struct.field("content"))
    return pl.when(texts.list.len() > 0).then(texts.list.join("\n"))


# -- words and white space -----------------------------------------------------------------------

_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
"""Scripts written without spaces: each character counts as a word."""
WORD = rf"[{_UNSPACED}]|[^\s{_UNSPACED}]+"
_SPACED_ONLY = r"^[\x00-\x{2E7F}]*$"


def count_words(text: pl.Expr) -> pl.Expr:
    """Number of words: runs without white space, and each character of an unspaced script."""
    # The plain pattern is several times faster, and most texts hold no such script.
    plain = text.str.contains(_SPACED_ONLY) & ~text.str.contains(f"[{_UNSPACED}]")
    return (
        pl.when(plain).then(text.str.count_matches(r"\S+")).otherwise(text.str.count_matches(WORD))
    )


def is_blank(text: pl.Expr) -> pl.Expr:
    """Nothing but white space and characters that show nothing."""
    return ~text.str.contains(r"[^\s\p{Cf}\p{Cc}]")


def whitespace_edges(text: pl.Expr) -> pl.Expr:
    """White space before the first or after the last character."""
    return text.str.contains(r"^\s|\s$")


def has_invisible(text: pl.Expr) -> pl.Expr:
    """Characters that show nothing and join no letters.

    Zero-width spaces, direction overrides, tags, and control characters other than tab, line feed
    and carriage return. The joiners U+200C and U+200D, which emoji and several scripts need, are
    not meant.
    """
    return text.str.contains(
        r"[\x{200B}\x{2060}\x{FEFF}\x{202A}-\x{202E}\x{2066}-\x{2069}\x{E0000}-\x{E007F}"
        r"\x00-\x08\x0B\x0C\x0E-\x1F\x7F-\x9F]"
    )


def listed_pattern(words: Sequence[str]) -> str:
    """A pattern of any of some words or phrases, as whole words.

    A word that begins or ends in an unspaced script has no edge there: such scripts show none.
    """
    longest_first = sorted(words, key=lambda word: (-len(word), word))
    return "|".join(map(_whole_word, longest_first))


def _whole_word(word: str) -> str:
    escaped = r"\s+".join(re.escape(part) for part in word.split())
    edges = [
        r"\b" if (char.isalnum() or char == "_") and not _unspaced(char) else ""
        for char in (word[0], word[-1])
    ]
    return f"{edges[0]}{escaped}{edges[1]}"


def _unspaced(char: str) -> bool:
    return bool(pl.Series([char]).str.contains(f"[{_UNSPACED}]").item())


# -- roles ---------------------------------------------------------------------------------------


def in_role_order(roles: pl.Expr) -> pl.Expr:
    """Whether a list of roles is at most one system turn, then user and assistant in turn."""
    return roles.list.eval(pl.element().str.head(1)).list.join("").str.contains("^s?(?:ua)*u?$")


# -- refusals ------------------------------------------------------------------------------------

_HEAD = 400
"""Characters at the start of an answer in which a refusal stands, if it is one."""

_UNABLE = (
    r"(?:can ?not|can't|won't|will not|"
    r"(?:am|'m) (?:\w+ )?(?:unable to|not able to|not going to|not allowed to|not permitted to|"
    r"not willing to|not comfortable)|am programmed not to|do not feel comfortable|"
    r"don't feel comfortable|(?:must|have to|will have to|need to) (?:\w+ )?(?:decline|refuse)|"
    r"refuse|(?:can ?not|can't|will not|won't) and (?:will not|won't|should not|shouldn't))"
)
_DO = (
    r"(?:help|helping|assist|assisting|aid|support|encourage|condone|promote|endorse|advocate|"
    r"provide|providing|give|giving|offer|supply|fulfil+|fulfil+ing|comply|complying|"
    r"answer|answering|respond|responding|engage|engaging|participate|discuss|discussing|"
    r"create|creating|generate|generating|produce|write|writing|compose|do that|do this|do so|"
    r"doing|tell you|teach|instruct|share|facilitate|guide|"
    r"describe|explain how|show you|in good conscience)\b"
)
_OPENING = r"(?:^|[.!?:,;\n—-]\s*|\b(?:but|and|so|that|however|therefore|because|as such),?\s+)"
_REFUSALS = (
    # I'm sorry, but I can't help with that. As an AI, I am not able to provide ...
    (
        rf"{_OPENING}(?:i|we)(?:'m afraid (?:that )?i)?"
        rf"(?: (?:simply|really|also|just|definitely|certainly))? ?{_UNABLE}"
        rf"(?: (?:ethically|legally|directly|morally|in good conscience|knowingly|personally"
        rf"|be able|to|with|in|and|or|{_UNABLE})){{0,3}},? {_DO}"
    ),
    (
        rf"^\W{{0,5}}(?:(?:i'm |i am )?(?:so |very |really )?sorry|i apologi[sz]e|my apologies"
        rf"|apologies|unfortunately)[,.!]? (?:but )?(?:i|we) ?{_UNABLE}"
        r" (?:that|this|your request|such|with (?:that|this))"
    ),
    (
        r"^\W{0,5}(?:sorry|i'm sorry|i am sorry|no|unfortunately)?[,.!]? ?(?:but )?"
        r"(?:that|this|it)(?:'s| is| would be)(?: \w+)? not (?:\w+ ){0,2}(?:for me )?to"
        r" (?:help|assist|provide|fulfil|comply|answer|create|generate)\b"
    ),
    (
        rf"{_OPENING}(?:it (?:is|would be)|it's)(?: \w+)? not (?:\w+ ){{0,2}}"
        r"(?:appropriate|ethical|right|okay|ok|safe|responsible)[^.!?\n]{0,20} for me to\b"
    ),
    (
        rf"{_OPENING}(?:it (?:is|goes)|it's|that (?:is|goes)) against my (?:programming|guidelines"
        r"|principles|ethical|policy|policies|ethics)"
    ),
    rf"{_OPENING}(?:i|we) (?:will not|won't) be (?:able to|helping|assisting|providing)\b",
    rf"{_OPENING}i (?:must|have to|will have to|respectfully) (?:\w+ )?(?:decline|refuse)\b",
    (
        r"^\W{0,5}(?:i'm sorry|i am sorry|sorry|i apologi[sz]e)?[,.!]? ?(?:but )?"
        r"(?:that's|that is|this is) not something (?:that )?(?:i|we)"
        r"(?: can|'m able to| am able to) (?:help|assist|do|provide)\b"
    ),
)
_NO_REFUSAL = (
    r"(?:can't|can ?not|couldn't|could not) (?:help (?:but|it|feeling|wondering|thinking)"
    r"|(?:recommend|suggest|support|endorse|advise)[^.!?\n]{0,40}(?:enough|highly))"
    # A disclaimer, which an answer follows.
    r"|(?:provide|give|offer|share|have)(?: you(?: with)?)? (?:my |any |a |an )?personal"
    r" (?:opinion|experience|preference|view|advice)s?"
    r"|(?:provide|give|offer)(?: you(?: with)?)? (?:any |an? )?(?:definitive|exact|precise|accurate"
    r"|complete|legal|medical|financial|professional|investment)"
)


def refuses(text: pl.Expr) -> pl.Expr:
    """Whether an answer declines what it was asked (English only).

    A sentence in the first 400 characters says that the speaker cannot, will not or may not do it.
    Conservative: an answer that gives no reason, warns or changes the subject is not found, nor
    is one that does not know. One that declines a part, or declines first and then answers, is.
    """
    head = (
        text.str.strip_chars()
        .str.head(_HEAD)
        .str.to_lowercase()
        .str.replace_all(r"[‘’ʼ`´]", "'")
        .str.replace_all(_NO_REFUSAL, " ")
        .str.replace_all(r"[ \t\x{A0}]+", " ")
    )
    return head.str.contains("|".join(f"(?:{one})" for one in _REFUSALS))


# -- special tokens and rendered templates -------------------------------------------------------

TEMPLATES: dict[str, str] = {
    # <|im_start|>, <|endoftext|>, <|eot_id|>, <|START_OF_TURN_TOKEN|>, <|user|>
    "pipe_token": r"<\|[A-Za-z][A-Za-z0-9_]{1,40}\|>",
    "wide_pipe_token": r"<｜[^｜\n]{1,40}｜>",
    "inst": r"\[/?INST\]|<</?SYS>>|\[/?(?:SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS)\]",
    "turn": r"</?(?:start_of_turn|end_of_turn|bos|eos|pad|unk)>",
    # Not the strike-through of HTML: at the end of the text, or beside another token.
    "sentence": r"</s>\s*(?:$|<s>|\[INST\]|<\|)|^\s*<s>\s*(?:\[INST\]|<\||<<SYS)",
    "heading": r"(?m)^\s*###\s*(?:Response|Instruction|Input|Human|Assistant|User|System)\s*:",
}
"""Traces of a chat template that was applied to the text, by family."""

_SPEAKERS = (("Human", "Assistant"), ("User", "Assistant"), ("USER", "ASSISTANT"), ("User", "AI"))


def templates(text: pl.Expr) -> pl.Expr:
    """The families of TEMPLATES in a text, and `transcript`, as a list of names in fixed order.

    `transcript`: two speakers of a chat, each at the start of a line ("Human:" and "Assistant:").
    """
    names = [
        pl.when(text.str.contains(pattern)).then(pl.lit(name))
        for name, pattern in TEMPLATES.items()
    ]
    names.append(pl.when(_is_transcript(text)).then(pl.lit("transcript")))
    found = pl.concat_list(names).list.drop_nulls()
    return pl.when(text.is_not_null()).then(found)


def has_template(text: pl.Expr) -> pl.Expr:
    """Whether a text holds special tokens, a rendered template or a transcript."""
    tokens = text.str.contains("|".join(f"(?:{one})" for one in TEMPLATES.values()))
    return tokens | _is_transcript(text)


def _is_transcript(text: pl.Expr) -> pl.Expr:
    both = [
        text.str.contains(rf"(?m)^[ \t]*{one}:") & text.str.contains(rf"(?m)^[ \t]*{other}:")
        for one, other in _SPEAKERS
    ]
    return pl.any_horizontal(both)
