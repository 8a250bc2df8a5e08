"""Personal data and secrets in texts: where they are, and texts without them.

Each kind is a pattern of known form, checked where a form has a check (Luhn for cards, ISO 7064
mod 97 for IBANs, octets for addresses). Every pattern takes time linear in the text: its start is
pinned to an edge, its repeats are bounded. What is found never leaves this module but inside an
`Entity`: measures and errors are made of kinds and counts.

Not found: names, postal addresses, dates of birth, secrets of no known form, e-mails in which words
stand for the sign (`bob at x.com`), digits of other scripts, and phone numbers without
separators, country code or a word before them that says what they are.
"""

import ipaddress
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import polars as pl

Kind = Literal["email", "phone", "iban", "card", "ssn", "ip", "secret", "url"]
KINDS: tuple[Kind, ...] = ("secret", "url", "email", "iban", "card", "ssn", "ip", "phone")
"""Of two finds that overlap the earlier one counts, then the earlier kind. `secret`: API keys,
tokens, private keys; `url`: an address with a user name and password in it."""


class Entity(NamedTuple):
    """A find at `start` to `stop` of a text. `key` is equal for all spellings of the same one."""

    start: int
    stop: int
    kind: Kind
    key: str


# -- checks: a match and its text to the key of the entity, or None for none ---------------------


def _as_it_is(match: re.Match[str]) -> str | None:
    return match[_part(match)]


def _part(match: re.Match[str]) -> str | int:
    """What of a match is the entity: the group `it`, where what stands before is context."""
    return match.lastgroup or 0


def _compact(match: re.Match[str]) -> str:
    return re.sub(r"[^0-9A-Za-z]", "", match[0])


_FILES = frozenset(("png", "jpg", "jpeg", "gif", "svg", "webp", "ico", "css", "html", "json"))
_NOBODY = frozenset(("git", "hg", "svn"))


def _email(match: re.Match[str]) -> str | None:
    local, _, domain = match[0].casefold().rpartition("@")
    # `icon@2x.png` is a file, `git@host.org:path` a repository.
    known = domain.rpartition(".")[2] not in _FILES and local not in _NOBODY
    return f"{local}@{domain}" if known else None


def luhn(digits: str) -> bool:
    """Whether a row of digits carries a valid Luhn check digit (ISO/IEC 7812-1)."""
    odd = sum(int(one) for one in digits[-1::-2])
    even = sum(sum(divmod(2 * int(one), 10)) for one in digits[-2::-2])
    return (odd + even) % 10 == 0


_CARDS = re.compile(
    r"4(?:[0-9]{12}|[0-9]{15}|[0-9]{18})|5[1-5][0-9]{14}"
    r"|2(?:22[1-9]|2[3-9][0-9]|[3-6][0-9]{2}|7[01][0-9]|720)[0-9]{12}|3[47][0-9]{13}"
    r"|3(?:0[0-5]|[68][0-9])[0-9]{11}|6(?:011|5[0-9]{2}|4[4-9][0-9])[0-9]{12}"
    r"|35(?:2[89]|[3-8][0-9])[0-9]{12}|62[0-9]{14,17}"
)


def _card(match: re.Match[str]) -> str | None:
    digits = _compact(match)
    return digits if _CARDS.fullmatch(digits) and luhn(digits) else None


_IBAN_LENGTHS = {
    int(length): frozenset(countries.split())
    for length, countries in {
        "15": "NO",
        "16": "BE",
        "18": "DK FI FO GL NL SD",
        "19": "MK SI",
        "20": "AT BA EE KZ LT LU XK",
        "21": "CH HR LI LV",
        "22": "BG BH CR DE GB GE IE ME RS VA",
        "23": "AE GI IL IQ TL OM SO",
        "24": "AD CZ ES MD PK RO SA SE SK TN VG",
        "25": "LY PT ST",
        "26": "IS TR",
        "27": "BI DJ FR GR IT MC MR SM",
        "28": "AL AZ BY CY DO GT HU LB NI PL SV",
        "29": "BR EG PS QA UA",
        "30": "JO KW MU",
        "31": "MT SC",
        "32": "LC",
        "33": "RU",
    }.items()
}
_IBAN_LENGTH = {name: length for length, names in _IBAN_LENGTHS.items() for name in names}


def iban(compact: str) -> bool:
    """Whether an IBAN without spaces has its country's length and a valid check (ISO 13616)."""
    if _IBAN_LENGTH.get(compact[:2]) != len(compact):
        return False
    return int("".join(str(int(one, 36)) for one in compact[4:] + compact[:4])) % 97 == 1


def _iban(match: re.Match[str]) -> str | None:
    compact = _compact(match)
    return compact if iban(compact) else None


_NUMBERED = re.compile(
    r"(?:version|ver\.?|\bv\.?|release|build|section|chapter|table|figure|§)\s{0,2}$", re.IGNORECASE
)


def _ipv4(match: re.Match[str]) -> str | None:
    # Versions and outlines (1.2.3.4) are no addresses; loopback and netmasks are nobody's.
    if _NUMBERED.search(match.string, max(0, match.start() - 12), match.start()):
        return None
    if all(len(octet) == 1 for octet in match[0].split(".")):
        return None
    found = ipaddress.IPv4Address(match[0])
    nobody = found.is_loopback or found.is_unspecified or found.is_multicast or found.is_reserved
    return None if nobody or match[0].startswith("255.") else match[0]


def _ipv6(match: re.Match[str]) -> str | None:
    groups = [group for group in match[0].split(":") if group]
    if len(groups) < 3 or not any(one.isdigit() for one in match[0]):
        return None  # `a::b` is code
    try:
        return ipaddress.IPv6Address(match[0]).compressed
    except ValueError:
        return None


_TOLL_FREE = re.compile(r"1?8(?:00|33|44|55|66|77|88)[0-9]{7}")


def _phone(match: re.Match[str]) -> str | None:
    said = match[_part(match)]
    digits = re.sub("[^0-9]", "", said)
    number = 7 <= len(digits) <= 15 and len(set(digits)) > 2
    decimal = re.fullmatch(r"\+?[0-9]+\.[0-9]+", said)
    # Lines that are free to call belong to nobody: help lines stay in the answers that name them.
    if not number or decimal or _TOLL_FREE.fullmatch(digits):
        return None
    # With and without the country code of North America it is one line.
    return digits[1:] if len(digits) == 11 and digits[0] == "1" else digits


def _mixed(match: re.Match[str]) -> str | None:
    """Keys of random letters; not `sk-learn-some-long-name`."""
    shapes = ("[0-9]", "[A-Z]", "[a-z]")
    return match[0] if all(re.search(shape, match[0][3:]) for shape in shapes) else None


@dataclass(frozen=True)
class _Form:
    kind: Kind
    pattern: re.Pattern[str]
    key: Callable[[re.Match[str]], str | None]


_OCTET = r"(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_EDGE, _END = r"(?<![A-Za-z0-9_])", r"(?![A-Za-z0-9_])"
_LABEL = r"[^\W_][\w-]{0,62}"


def _form(
    kind: Kind, pattern: str, key: Callable[[re.Match[str]], str | None] = _as_it_is
) -> _Form:
    return _Form(kind, re.compile(pattern), key)


_FORMS: tuple[_Form, ...] = (
    _form(
        "secret",
        r"-----BEGIN (?:[A-Z0-9]{1,12} ){0,3}PRIVATE KEY(?: BLOCK)?-----"
        r"(?:(?:[^-]|-(?!----)){0,20000}+-----END [A-Z0-9 ]{0,40}-----"
        r"|(?:\s{0,4}[A-Za-z0-9+/=]{16,100}){0,400}+)",
    ),
    _form(
        "secret",
        r"(?<![\w-])eyJ[\w-]{8,4000}+\.[\w-]{8,8000}+\.[\w-]{8,4000}+",
    ),
    _form("secret", rf"{_EDGE}(?:AKIA|ASIA)[A-Z0-9]{{16}}{_END}"),
    _form(
        "secret",
        r"(?i:(?<=secret_access_key)|(?<=secretaccesskey))[\"' ]{0,3}[=:][\"' ]{0,3}"
        r"(?P<it>[A-Za-z0-9/+]{40})(?![A-Za-z0-9/+=])",
    ),
    _form(
        "secret",
        rf"{_EDGE}(?:gh[pousr]_[A-Za-z0-9]{{36,255}}+|github_pat_[A-Za-z0-9_]{{22,255}}+"
        rf"|glpat-[\w-]{{20,64}}+|hf_[A-Za-z0-9]{{30,64}}+|npm_[A-Za-z0-9]{{36,64}}+"
        rf"|xox[abeoprs]-[A-Za-z0-9-]{{10,250}}+|xapp-[A-Za-z0-9-]{{10,250}}+"
        rf"|AIza[\w-]{{35}}(?![\w-])|ya29\.[\w-]{{20,1000}}+|GOCSPX-[\w-]{{28}}"
        rf"|[srp]k_(?:live|test)_[A-Za-z0-9]{{16,250}}+)",
    ),
    _form(
        "secret",
        r"(?<!\w)hooks\.slack\.com/services/[A-Z0-9]{8,12}/[A-Z0-9]{8,12}/[A-Za-z0-9]{20,32}",
    ),
    _form("secret", r"(?<![\w-])sk-[\w-]{20,250}+", _mixed),
    _form(
        "url",
        r"(?<![A-Za-z0-9+.-])[A-Za-z][A-Za-z0-9+.-]{1,15}+://[^\s/:@<>\"'?#]{1,64}+"
        r":[^\s/@<>\"'?#]{1,128}+@\[?\w(?:[\w.:-]{0,253}[\w\]])?",
    ),
    _form(
        "email",
        rf"(?<![\w.+%-])\w[\w.+%'-]{{0,63}}+@(?:{_LABEL}\.){{1,8}}[^\W\d_]{{2,24}}+(?![\w@])",
        _email,
    ),
    _form(
        "iban",
        rf"{_EDGE}[A-Z]{{2}}[0-9]{{2}}(?:[A-Z0-9]{{11,30}}|(?:[ -][A-Z0-9]{{4}}){{2,7}}"
        rf"(?:[ -][A-Z0-9]{{1,3}})?){_END}",
        _iban,
    ),
    _form(
        "card",
        r"(?<![\w.,$€£-])(?:[0-9]{13,19}|[0-9]{4}([ -])[0-9]{4}\1[0-9]{4}\1[0-9]{1,7}"
        r"|3[0-9]{3}([ -])[0-9]{6}\2[0-9]{4,5})(?![\w-]|[.,][0-9])",
        _card,
    ),
    _form(
        "ssn",
        r"(?<![\w.-])(?!000|666|9[0-9]{2})[0-9]{3}-(?!00)[0-9]{2}-(?!0000)[0-9]{4}(?![\w-])",
    ),
    _form("ip", rf"(?<![\w.-])(?:{_OCTET}\.){{3}}{_OCTET}(?![\w-]|\.[0-9])", _ipv4),
    _form(
        "ip",
        r"(?<![\w:.])(?=[0-9A-Fa-f]{0,4}:)[0-9A-Fa-f:]{4,38}[0-9A-Fa-f](?!\w|:[0-9A-Fa-f:])",
        _ipv6,
    ),
    _form("phone", r"(?<![\w+])\+[1-9](?:[ .()/-]{0,2}[0-9]){7,14}(?![0-9])", _phone),
    _form(
        "phone",
        r"(?<![\w.+$€£/-])(?<![0-9] )(?:1[ .-])?(?:\([2-9][0-9]{2}\)[ .-]?|[2-9][0-9]{2}[ .-])"
        r"[2-9][0-9]{2}[ .-][0-9]{4}(?!\w|[ .-][0-9])",
        _phone,
    ),
    _form("phone", r"(?<![\w.+-])0[1-9](?:[ .][0-9]{2}){4}(?!\w|[ .-][0-9])", _phone),
    _form(
        "phone",
        r"(?<![\w.+-])0[1-9][0-9]{1,3}[ -][0-9]{3,4}[ -][0-9]{3,4}(?!\w|[ .-][0-9])",
        _phone,
    ),
    _form(
        "phone",
        r"\b(?i:phone|telephone|tel|mobile|cell|fax|whatsapp)(?i: number| no\.?)?(?i: is)?"
        r"[ :#.]{0,3}(?P<it>\(?[0-9][0-9 .()-]{5,18}[0-9])(?![0-9])",
        _phone,
    ),
)

_CANDIDATES = (
    r"\S@\S",
    r"://[^\s/]{3,200}@",
    "PRIVATE KEY",
    "eyJ",
    "AKIA|ASIA|(?i:secret_?access_?key)",
    "gh[pousr]_|github_pat_|glpat-|hf_|npm_|xox[a-z]-|xapp-|AIza|ya29|GOCSPX-|k_live_|k_test_",
    "hooks[.]slack|sk-",
    # Seven digits that stand close together: phones, cards, most IBANs and SSNs.
    r"[0-9](?:[ .()/-]{0,3}[0-9]){6}",
    r"[A-Z]{2}[0-9]{2}[ -]?[A-Z0-9]{4}",
    r"[0-9]\.[0-9]{1,3}\.[0-9]{1,3}\.[0-9]",
    r"[0-9A-Fa-f]{0,4}:[0-9A-Fa-f]{0,4}:[0-9A-Fa-f]",
)


def may_hold_pii(text: pl.Expr) -> pl.Expr:
    """Whether a text may hold any: false only where `entities` finds nothing."""
    return text.str.contains("|".join(_CANDIDATES))


def entities(text: str, kinds: Iterable[Kind] = KINDS) -> list[Entity]:
    """What is found in a text, by place, without overlaps."""
    wanted = frozenset(kinds)
    found: list[tuple[int, int, int, Entity]] = []
    for form in _FORMS:
        if form.kind not in wanted:
            continue
        for match in form.pattern.finditer(text):
            key = form.key(match)
            if key is not None:
                entity = Entity(*match.span(_part(match)), form.kind, key)
                found.append((entity.start, KINDS.index(form.kind), -entity.stop, entity))
    kept: list[Entity] = []
    for *_, entity in sorted(found):
        if not kept or entity.start >= kept[-1].stop:
            kept.append(entity)
    return kept


# -- masking -------------------------------------------------------------------------------------

_PLACEHOLDER = re.compile(rf"<({'|'.join(kind.upper() for kind in KINDS)})_([0-9]{{1,6}})>")


PASSES = 5


class Masks:
    """The placeholders of one row: `<EMAIL_1>` for its first e-mail, in every text of the row.

    Numbers go up by first occurrence, from above those that the row already holds. `stuck`: what
    is left still holds a find after PASSES, as only a text made for that does.
    """

    def __init__(self, texts: Sequence[str], kinds: Iterable[Kind] = KINDS) -> None:
        self._kinds = tuple(kinds)
        self._last: Counter[str] = Counter()
        self._numbers: dict[tuple[Kind, str], int] = {}
        self._texts: dict[str, str] = {}
        self.stuck = False
        for text in texts:
            for kind, number in _PLACEHOLDER.findall(text):
                self._last[kind] = max(self._last[kind], int(number))
        for text in texts:
            self._texts[text] = self.mask(text)

    def counts(self) -> dict[Kind, int]:
        """Number of different entities of each kind that was found."""
        counted: dict[Kind, int] = defaultdict(int)
        for kind, _ in self._numbers:
            counted[kind] += 1
        return dict(counted)

    def mask(self, text: str) -> str:
        """The text with a placeholder for each find; masked again it stays as it is."""
        if text in self._texts:
            return self._texts[text]
        masked = text
        # What stood beside a find may be one itself once that is gone.
        passes = 0
        while found := entities(masked, self._kinds):
            passes += 1
            if passes > PASSES:
                self.stuck = True
                break
            pieces: list[str] = []
            place = 0
            for entity in found:
                pieces += [masked[place : entity.start], self._placeholder(entity)]
                place = entity.stop
            masked = "".join([*pieces, masked[place:]])
        return masked

    def _placeholder(self, entity: Entity) -> str:
        name = entity.kind.upper()
        named = (entity.kind, entity.key)
        if named not in self._numbers:
            self._last[name] += 1
            self._numbers[named] = self._last[name]
        return f"<{name}_{self._numbers[named]}>"
