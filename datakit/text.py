"""Small pure functions over text and names: hashing, filling, normalising, near misses."""

import difflib
import hashlib
import json
import math
import re
import unicodedata
from collections.abc import Iterable

import orjson

# For what orjson does not take (whole numbers beyond 64 bits), and to find a NaN, which it takes.
_STRICT = json.JSONEncoder(
    sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False
)
_ONLY_JSON = (
    orjson.OPT_PASSTHROUGH_DATACLASS
    | orjson.OPT_PASSTHROUGH_DATETIME
    | orjson.OPT_PASSTHROUGH_SUBCLASS
)
_SLOT = re.compile(r"\{([a-z_][a-z0-9_]*)\}")
# Marks of a sentence fold away; where they carry meaning they stay: 3.5, .5, 5!, x != y, don't.
# The mark comes first in the pattern, and what stands around it after: so `re` skips to marks.
_SENTENCE = re.compile(
    r"""[;?¿¡…"“”„«»、。.,:!'‘’`´]"""
    r"""(?:(?<=[;?¿¡…"“”„«»、。])|(?<=[.,:])(?!\d)|(?<=!)(?<!\d!)(?![=\w(])"""
    r"""|(?<=['‘’`´])(?:(?<!\w['‘’`´])|(?!\w)))"""
)
_DASH = re.compile("[‐‑‒–—−]")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def canonical_json(value: object) -> str:
    """The one JSON text of a value: sorted keys, no spaces.

    Raises ValueError for NaN and infinity, TypeError for what is no JSON.
    """
    return _canonical(value).decode()


def digest(value: object, size: int = 16) -> str:
    """Hex blake2b of `size` bytes over the canonical JSON of `value`."""
    return hashlib.blake2b(_canonical(value), digest_size=size).hexdigest()


def _canonical(value: object) -> bytes:
    try:
        text = orjson.dumps(value, option=orjson.OPT_SORT_KEYS | _ONLY_JSON)
    except TypeError:
        return _STRICT.encode(value).encode()
    if b"null" in text:
        _STRICT.encode(value)
    return text


def fill(template: str, **values: str) -> str:
    """Fill `{name}` slots in one pass, so that a value holding `{other}` cannot inject.

    Raises KeyError for a slot without a value.
    """
    return _SLOT.sub(lambda slot: values[slot.group(1)], template)


def normalise(text: str) -> str:
    """Fold case, width, sentence marks and white space: the key of an exact duplicate.

    Operators, symbols and the marks of a script stay, so that `3 + 4` and `3 - 4`, C++ and C#, and
    two words that differ in a vowel sign are different.
    """
    folded = _DASH.sub("-", unicodedata.normalize("NFKC", text).casefold())
    words = " ".join(_SENTENCE.sub(" ", folded).split())
    return words or " ".join(folded.split())


def plain(text: str) -> str:
    """`text` with control and direction marks made visible: safe for a terminal or a log."""
    return _CONTROL.sub(lambda mark: f"\\x{ord(mark.group()):02x}", text)


def shorten(text: str, width: int = 200) -> str:
    """One safe line of at most `width` characters."""
    line = " ".join(plain(text).split())
    return line if len(line) <= width else line[: width - 1] + "…"


def dollars(usd: float) -> str:
    """`$1,234.50`; of less than a dollar two digits that count, as in `$0.0042`."""
    places = 2 if usd >= 1 or usd <= 0 else 1 - math.floor(math.log10(usd))
    return f"${usd:,.{max(2, places)}f}"


def near_miss(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the nearest known name, else the list of what exists."""
    names = sorted(known)
    close = difflib.get_close_matches(str(word), names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(names)}" if names else ""
