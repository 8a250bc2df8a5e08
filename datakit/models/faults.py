"""What can go wrong with one attempt at a model, and the one policy for each.

    kind              policy
    rate_limited      429: wait as long as the endpoint says, halve the window, try again
    overloaded        503, 529: wait with jitter, halve the window where there are many, try again
    server_error      other 5xx, 408, 409: wait with jitter, try again, elsewhere where that can be
    timeout           the same; an address that goes on failing so is left out a while
    connection        refused: the same
    cut               the body ends too soon: the same
    malformed_body    no JSON, or no completion: wait with jitter, try again
    exhausted         429 for longer than ten minutes: stop the run at once
    authentication    401, 403: stop the run at once
    unknown_model     404: stop the run at once
    payment           402, or 429 for a quota that is used up: stop the run at once
    redirected        3xx: stop the run at once
    bad_request       other 4xx: the row is unanswered; the next run asks again
    content_filter    the row is refused (`Refused`)

What is tried again and never succeeds leaves its row `Unanswered`, under the kind of the last
failure. Three more come as answers, are kept as what they are, and concern the row alone: an empty
answer (`Unparsable`), one cut by its length (`Truncated`), and one that does not fit the schema,
which the model may repair once when it is shown its error (`Unparsable` after that).
"""

import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Literal

from datakit.errors import EndpointError, Refused, RowError, Unanswered
from datakit.text import shorten

Kind = Literal[
    "rate_limited",
    "overloaded",
    "server_error",
    "timeout",
    "connection",
    "cut",
    "malformed_body",
    "exhausted",
    "authentication",
    "unknown_model",
    "payment",
    "redirected",
    "bad_request",
    "content_filter",
]


@dataclass(frozen=True, slots=True)
class Policy:
    """What is done about a fault.

    again: try again; slows: halve the window; suspects: the address may be dead; billed: it may
    have been paid for; stops: the run ends here.
    """

    again: bool = False
    slows: bool = False
    suspects: bool = False
    billed: bool = False
    stops: bool = False


POLICIES: dict[Kind, Policy] = {
    "rate_limited": Policy(again=True, slows=True),
    "overloaded": Policy(again=True, slows=True),
    "server_error": Policy(again=True, suspects=True),
    "timeout": Policy(again=True, suspects=True, billed=True),
    "connection": Policy(again=True, suspects=True),
    "cut": Policy(again=True, suspects=True, billed=True),
    "malformed_body": Policy(again=True, billed=True),
    "exhausted": Policy(stops=True),
    "authentication": Policy(stops=True),
    "unknown_model": Policy(stops=True),
    "payment": Policy(stops=True),
    "redirected": Policy(stops=True),
    "bad_request": Policy(),
    "content_filter": Policy(),
}


_KEY_LENGTH = 6
_LONGEST_PAUSE_S = 600.0
_FILTERED = re.compile(r"content\W+(\w+\W+)?(filter|policy)|content_filter|moderation|flagged")


class Fault(Exception):
    """One attempt failed. wait_s: how long the endpoint asks to be left alone."""

    def __init__(self, kind: Kind, said: str, wait_s: float | None = None) -> None:
        super().__init__(said)
        self.kind: Kind = kind
        self.policy = POLICIES[kind]
        self.wait_s = wait_s

    def error(self, tries: int) -> EndpointError | RowError:
        """What the asker gets after the last try."""
        if self.policy.stops:
            return EndpointError(str(self))
        if self.kind == "content_filter":
            return Refused(self.kind, str(self))
        said = f"{self} after {tries} tries" if tries > 1 else str(self)
        return Unanswered(self.kind, said)


def fault_of(
    status: int,
    headers: Mapping[str, str],
    raw: bytes,
    url: str,
    model: str,
    secret: str,
    key_env: str | None = None,
) -> Fault:
    """The fault that an HTTP status of 300 or more stands for.

    secret: the key, which the fault must not repeat, and key_env: where it was read.
    """
    said = shorten(_message(blotted(raw, secret)), 200)
    if status < 400:
        target = blotted(headers.get("Location", "").encode(), secret).decode()
        return Fault(
            "redirected", f"{url} redirects to {shorten(target, 200)!r}: give that as base_url"
        )
    lowered = said.lower()
    if status in (400, 403) and _FILTERED.search(lowered):
        return Fault("content_filter", f"{url} answers {status}: {said}")
    if status in (401, 403):
        where = f"in {key_env!r}" if key_env else "(api_key_env is not set)"
        return Fault("authentication", f"{url} refuses the key {where} with {status}: {said}")
    if status == 402:
        return Fault("payment", f"{url} asks for payment: {said}")
    if status == 404:
        return Fault("unknown_model", f"{url} does not know model {model!r}: {said}")
    if status == 429 and "insufficient_quota" in lowered:
        return Fault("payment", f"{url} has no quota left: {said}")
    if status == 429 and (wait_s_of(headers) or 0.0) > _LONGEST_PAUSE_S:
        pause_s = wait_s_of(headers)
        return Fault(
            "exhausted", f"{url} asks for a pause of {pause_s:,.0f} s; run it again then: {said}"
        )
    if status == 429:
        return Fault("rate_limited", f"{url} answers 429: {said}", wait_s_of(headers))
    if status in (503, 529):
        return Fault("overloaded", f"{url} answers {status}: {said}", wait_s_of(headers))
    if status in (408, 409) or status >= 500:
        return Fault("server_error", f"{url} answers {status}: {said}", wait_s_of(headers))
    return Fault("bad_request", f"{url} answers {status}: {said}")


def blotted(raw: bytes, secret: str) -> bytes:
    """What an endpoint said, without the key that it may repeat; a word such as `none` is none."""
    return raw.replace(secret.encode(), b"***") if len(secret) >= _KEY_LENGTH else raw


def wait_s_of(headers: Mapping[str, str]) -> float | None:
    """The seconds of `retry-after-ms` or `Retry-After`; None where neither says any."""
    for name, unit in (("retry-after-ms", 1000.0), ("Retry-After", 1.0)):
        try:
            return max(0.0, float(headers[name]) / unit)
        except (KeyError, ValueError):
            continue
    try:
        when = parsedate_to_datetime(headers["Retry-After"])
        return max(0.0, when.timestamp() - time.time())
    except (KeyError, ValueError):
        return None


def _message(raw: bytes) -> str:
    """What an error body says: OpenAI's `error.message` where it has that shape."""
    try:
        error = json.loads(raw)["error"]
        return (
            f"{error['message']} ({error['code']})" if error.get("code") else str(error["message"])
        )
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return raw[:1000].decode("utf-8", "replace")
