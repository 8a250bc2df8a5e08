"""The lines of batch files: requests as a provider takes them, and the responses it gives.

The same two kinds of file serve where no batch API is: `write_requests` gives what is queued, for
being answered anywhere, and `read_responses` takes the answers in.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from datakit.errors import InputError
from datakit.models.chat import Reply
from datakit.models.faults import Fault, blotted, fault_of
from datakit.models.ledger import Answer, Ledger
from datakit.models.openai import reply_of
from datakit.text import canonical_json, shorten

UrlPath = Literal["/v1/chat/completions", "/v1/completions"]
"""What a batch is for; one holds requests for one of them."""

CHAT: UrlPath = "/v1/chat/completions"
TEXT: UrlPath = "/v1/completions"

_UNANSWERED = (
    "FROM queue LEFT JOIN batches ON batches.name = queue.batch AND NOT batches.collected "
    "WHERE batches.name IS NULL AND NOT EXISTS "
    "(SELECT 1 FROM answers WHERE answers.key = queue.key)"
)


def request_line(key: str, path: str, model: str, request: str) -> bytes:
    """One line of an input file; `request` is the canonical JSON of the body without its model."""
    head = canonical_json({"custom_id": key, "method": "POST", "url": path})
    return f'{head[:-1]},"body":{{"model":{canonical_json(model)},{request[1:]}}}\n'.encode()


def outcome_of(line: bytes, url: str, model: str, secret: str) -> tuple[str, Reply | Fault | None]:
    """The custom id of an output line with its reply or fault; None where it was never worked on.

    Raises ValueError where the line is none of a batch.
    """
    try:
        data = json.loads(blotted(line, secret))
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    if not isinstance(data, dict) or not isinstance(data.get("custom_id"), str):
        raise ValueError("no object with a custom_id")  # noqa: TRY004
    if "method" in data:
        raise ValueError("it is a request, as a provider takes it")
    key, error = data["custom_id"], data.get("error")
    response = data.get("response")
    if response is None and error is None:
        # Other tools leave the envelope out.
        response = data if "body" in data else {"body": data} if "choices" in data else None
        if response is None:
            raise ValueError("neither response nor error")
    if isinstance(response, dict):
        return key, _answered(response, url, model, secret)
    code = error.get("code") if isinstance(error, dict) else ""
    if code == "batch_cancelled":
        return key, None
    if code == "batch_expired":
        return key, Fault("timeout", f"{url}: the batch expired before it came to this request")
    said = canonical_json(error)
    return key, Fault("server_error", f"{url}: {shorten(said, 200)}")


def _answered(response: dict[str, Any], url: str, model: str, secret: str) -> Reply | Fault:
    status, body = response.get("status_code", 200), response.get("body")
    if isinstance(status, int) and status >= 300:
        raw = body if isinstance(body, str) else canonical_json(body)
        return fault_of(status, {}, raw.encode("utf-8", "replace"), url, model, secret)
    try:
        return reply_of(body)
    except (ValueError, RecursionError) as error:
        return Fault("malformed_body", f"{url}: {error}")


def write_requests(
    ledger: Ledger,
    file: Path,
    path: UrlPath | None = None,
    model: str | None = None,
    run: str | None = None,
) -> int:
    """Write what is queued, unanswered and in no batch under way as a batch input file.

    path: only requests for that URL path. model: only those of that model identity. run: only those
    that this run was the last to ask for. Returns how many. A provider takes one path and one model
    in a file.
    """
    where, values = "", list[str]()
    for column, value in (("path", path), ("model", model), ("run", run)):
        if value is not None:
            where += f" AND queue.{column} = ?"
            values.append(value)
    sql = (
        "SELECT queue.key, queue.path, queue.name, queue.request "
        f"{_UNANSWERED}{where} ORDER BY queue.rowid"
    )
    count = 0
    with file.open("wb") as out, ledger.outside():
        for row in ledger.db.execute(sql, values):
            out.write(request_line(*row))
            count += 1
    return count


def read_responses(ledger: Ledger, file: Path) -> tuple[int, int]:
    """Read a batch output file into the ledger, all or nothing; returns (lines, new answers).

    Lines that tell of a failure are counted, and their requests stay queued. Raises InputError that
    names the file and the line that is broken, or that answers a request nobody queued.
    """
    count = new = 0
    with ledger.transaction():
        for number, line in _lines(file):
            try:
                key, outcome = outcome_of(line, "the file", "", "")
                row = ledger.db.execute(
                    "SELECT model, draw, request, batch FROM queue WHERE key = ?", (key,)
                ).fetchone()
                if row is None and ledger.get(key) is None:
                    raise ValueError(
                        f"nobody queued a request with the custom_id {key!r}; give the --state "
                        "folder of the run that did"
                    )
            except ValueError as error:
                shown = shorten(line.decode(errors="replace"), 80)
                raise InputError(
                    f"{file}, line {number}: not a response of a batch: {error}; {shown!r}"
                ) from error
            count += 1
            if row is None or not isinstance(outcome, Reply):
                continue
            model, draw, request, batch = row
            new += ledger.put([Answer(key, model, draw, request, outcome)])
            # What is in a batch stays: its bill comes with the batch.
            if not batch:
                ledger.db.execute("DELETE FROM queue WHERE key = ?", (key,))
    return count, new


def holds_responses(file: Path) -> bool:
    """Whether the first line of a file is one of a batch's output, not of a ledger export."""
    try:
        for _, line in _lines(file):
            outcome_of(line, "", "", "")
            return True
    except ValueError:
        return False
    return False


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that are not empty, with their numbers."""
    try:
        opened = file.open("rb")
    except OSError as error:
        raise InputError(f"cannot read the batch file {str(file)!r}: {error}") from error
    with opened:
        for number, line in enumerate(opened, start=1):
            if line.strip():
                yield number, line
