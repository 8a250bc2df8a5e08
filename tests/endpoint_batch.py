"""Files and batches, as OpenAI has them, in the memory of the test endpoint.

A batch is worked on when somebody looks: so far as its time has come, in the order of its lines.
Its faults are drawn as those of single calls are. A 4xx or 5xx goes to the error file; `pbad` puts
half of the answer, as text, where the answer belongs; `pcut` and `phang` leave no line anywhere.
"""

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import count
from typing import Any

from aiohttp import web
from endpoint_answers import body_key
from endpoint_knobs import Json, Knobs, Refusal, Tally

URLS = ("/v1/chat/completions", "/v1/completions")
SLICE = 100  # lines of a batch answered before others have their turn
EXPIRED = "This request could not be executed before the completion window expired."

Complete = Callable[[Json, str, str], Json]  # body, path, outcome: the answer, or a Refusal
Fate = Callable[[Json, bytes, str, int], tuple[str, float]]  # body, as sent, key, attempt


@dataclass
class File:
    """A file, as uploaded or as a batch left it."""

    id: str
    filename: str
    purpose: str
    data: bytes
    created_at: int = field(default_factory=lambda: int(time.time()))

    def shown(self) -> Json:
        told = {name: getattr(self, name) for name in ("id", "created_at", "filename", "purpose")}
        return {**told, "object": "file", "bytes": len(self.data), "status": "processed"}


@dataclass
class Batch:
    """A batch: what was asked, and how far it is."""

    shown: Json  # as it goes out
    requests: list[Json]
    errors: list[Json]
    began: float = field(default_factory=time.monotonic)
    done: int = 0
    expired: bool = False
    lines: dict[str, list[str]] = field(default_factory=lambda: {"output": [], "error": []})

    @property
    def status(self) -> str:
        return self.shown["status"]

    def enter(self, status: str) -> None:
        """Go over to another state."""
        self.shown |= {"status": status, f"{status}_at": int(time.time())}

    def write(self, kind: str, custom_id: str, response: Json | None, error: Json | None) -> None:
        """A line of the output or the error file."""
        seed = f"{self.shown['id']} {custom_id}"
        id_ = f"batch_req_{sha256(seed.encode(errors='surrogatepass')).hexdigest()[:16]}"
        line = {"id": id_, "custom_id": custom_id, "response": response, "error": error}
        self.lines[kind].append(json.dumps(line))


def checked(data: bytes, url: str, knobs: Knobs) -> tuple[list[Json], list[Json]]:
    """The requests in a file, and what is wrong with it: any error fails the batch."""
    requests, errors, names, models = list[Json](), list[Json](), set[str](), set[str]()

    def wrong(code: str, message: str, line: int | None = None, param: str | None = None) -> None:
        errors.append({"code": code, "message": message, "line": line, "param": param})

    for number, line in enumerate(data.splitlines(), 1):
        try:
            request = json.loads(line)
            name, body = request["custom_id"], request["body"]
            model = body["model"]
            requests.append(request)
        except (KeyError, TypeError) as error:
            wrong("missing_required_parameter", f"missing or not an object: {error}", number)
            continue
        except ValueError:
            wrong("invalid_json_line", "This line is not parseable as valid JSON.", number)
            continue
        if name in names:
            wrong("duplicate_custom_id", f"{name!r} came before", number, "custom_id")
        if (request.get("method"), request.get("url")) != ("POST", url):
            wrong("invalid_url", f"each request is a POST to {url}", number, "url")
        if knobs.models and model not in knobs.models:
            wrong("model_not_found", f"no model {model!r}", number, "body.model")
        elif models and model not in models:
            wrong("mismatched_model", f"{model!r} differs from lines before", number, "body.model")
        names.add(name)
        models.add(model)
    if not requests and not errors:
        wrong("empty_file", "The file holds no requests.")
    if knobs.batch_limit and len(requests) > knobs.batch_limit:
        wrong("too_many_tasks", f"{len(requests)} requests, at most {knobs.batch_limit}")
    return requests, errors


class Batches:
    """The store, and the routes to it below /v1."""

    def __init__(
        self, knobs: Callable[[], Knobs], tally: Tally, fate: Fate, complete: Complete
    ) -> None:
        self._knobs, self._tally = knobs, tally
        self._fate, self._complete = fate, complete
        self._files, self._batches = dict[str, File](), dict[str, Batch]()
        self._numbers = count(1)
        self.routes: list[tuple[str, str, Any]] = [
            ("POST", "/files", self._upload),
            ("GET", "/files", self._list_files),
            ("GET", "/files/{id}", self._file),
            ("GET", "/files/{id}/content", self._content),
            ("DELETE", "/files/{id}", self._delete),
            ("POST", "/batches", self._create),
            ("GET", "/batches", self._list_batches),
            ("GET", "/batches/{id}", self._batch),
            ("POST", "/batches/{id}/cancel", self._cancel),
        ]

    async def _upload(self, request: web.Request) -> web.Response:
        parts = dict[str, tuple[str, bytes]]()
        async for part in await request.multipart():
            parts[part.name] = part.filename or "", bytes(await part.read())
        if parts.get("purpose", ("", b""))[1] != b"batch" or "file" not in parts:
            raise Refusal("bad_request", "give file, and purpose=batch")
        self._tally.count("files")
        return web.json_response(self._keep(*parts["file"], purpose="batch").shown())

    def _keep(self, filename: str, data: bytes, purpose: str) -> File:
        file = File(f"file-{next(self._numbers):06}", filename, purpose, data)
        self._files[file.id] = file
        return file

    def _found(self, request: web.Request, kept: dict[str, Any]) -> Any:
        name = request.match_info["id"]
        if name not in kept:
            raise Refusal("missing", f"no such object: {name}")
        return kept[name]

    async def _file(self, request: web.Request) -> web.Response:
        return web.json_response(self._found(request, self._files).shown())

    async def _content(self, request: web.Request) -> web.Response:
        data = self._found(request, self._files).data
        return web.Response(body=data, content_type="application/octet-stream")

    async def _delete(self, request: web.Request) -> web.Response:
        file = self._found(request, self._files)
        del self._files[file.id]
        self._tally.count("files_deleted")
        return web.json_response({"id": file.id, "object": "file", "deleted": True})

    async def _list_files(self, request: web.Request) -> web.Response:
        return _page(request, [file.shown() for file in self._files.values()])

    async def _create(self, request: web.Request) -> web.Response:
        asked = json.loads(await request.read())
        url, file = asked["endpoint"], self._files.get(asked["input_file_id"])
        if url not in URLS or not isinstance(asked["completion_window"], str):
            raise Refusal("bad_request", f"give completion_window, and endpoint of {URLS}")
        if file is None or file.purpose != "batch":
            raise Refusal("bad_request", f"no file to read: {asked['input_file_id']}")
        requests, errors = checked(file.data, url, self._knobs())
        now = int(time.time())
        shown = dict.fromkeys(("output_file_id", "error_file_id", "errors", "metadata"))
        shown |= asked
        shown |= {"object": "batch", "created_at": now, "expires_at": now + 86_400}
        shown |= {"id": f"batch_{next(self._numbers):06}", "status": "validating"}
        shown["request_counts"] = {"total": 0, "completed": 0, "failed": 0}
        self._batches[shown["id"]] = Batch(shown, requests, errors)
        self._tally.count("batches")
        return web.json_response(shown)

    async def _batch(self, request: web.Request) -> web.Response:
        batch = self._found(request, self._batches)
        await self._advance(batch)
        return web.json_response(batch.shown)

    async def _list_batches(self, request: web.Request) -> web.Response:
        for batch in list(self._batches.values()):
            await self._advance(batch)
        return _page(request, [batch.shown for batch in self._batches.values()])

    async def _cancel(self, request: web.Request) -> web.Response:
        batch = self._found(request, self._batches)
        await self._advance(batch)
        if batch.status not in ("validating", "in_progress"):
            raise Refusal("bad_request", f"a batch that is {batch.status} cannot be cancelled")
        batch.enter("cancelling")
        return web.json_response(batch.shown)

    async def _advance(self, batch: Batch) -> None:
        """Bring a batch to where it is by now."""
        age_s, whole_s = time.monotonic() - batch.began, self._knobs().batch_s
        total, counts = len(batch.requests), batch.shown["request_counts"]
        if batch.status == "validating" and age_s >= whole_s / 10:
            if batch.errors:
                batch.enter("failed")
                batch.shown["errors"] = {"object": "list", "data": batch.errors[:100]}
            else:
                batch.enter("in_progress")
                counts["total"] = total
        due = total if age_s >= whole_s else int(total * age_s / whole_s)
        while batch.status == "in_progress" and batch.done < due:
            # Taken before anything is awaited, so that two who look never answer one line twice.
            request, batch.done = batch.requests[batch.done], batch.done + 1
            kind = self._answer(batch, request)
            counts["completed" if kind == "output" else "failed"] += 1
            if batch.done % SLICE == 0:
                await asyncio.sleep(0)
        if batch.status == "cancelling":
            self._finish(batch, "cancelled")
        elif batch.status == "in_progress" and age_s >= whole_s and batch.done == total:
            self._finish(batch, "expired" if batch.expired else "completed")

    def _answer(self, batch: Batch, request: Json) -> str:
        """Answer one request; the file that tells of it, or `none`."""
        custom_id = request["custom_id"]
        body = {k: v for k, v in request["body"].items() if v is not None}
        knobs, sent = self._knobs(), json.dumps(body).encode()
        key = body_key(body) if knobs.per_body else ""
        attempt = self._tally.admit(key)
        if knobs.expires(key, attempt):
            batch.expired = True
            batch.write("error", custom_id, None, {"code": "batch_expired", "message": EXPIRED})
            self._tally.settle_in_batch(key, "pexpire")
            return "error"
        reply: Any = None
        try:
            kind, _ = self._fate(body, sent, key, attempt)
            reply, status = self._complete(body, request["url"], kind), 200
        except Refusal as refusal:
            kind, reply, status = refusal.kind, refusal.body, refusal.status
        except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
            refusal = Refusal("bad_request", str(error))
            kind, reply, status = refusal.kind, refusal.body, refusal.status
        self._tally.settle_in_batch(key, kind)
        if kind in ("pcut", "phang"):
            return "none"
        if kind == "pbad":
            text = json.dumps(reply)
            reply = text[: len(text) // 2]
        where = "output" if status == 200 else "error"
        told = {"status_code": status, "request_id": f"req_{key[:16]}_{attempt}", "body": reply}
        batch.write(where, custom_id, told, None)
        return where

    def _finish(self, batch: Batch, status: str) -> None:
        """Put what is answered into files, in an order that is not that of the requests."""
        for kind in ("output", "error"):
            if lines := batch.lines[kind]:
                lines.sort(key=lambda line: sha256(line.encode()).digest())
                data = "".join(f"{line}\n" for line in lines).encode()
                name = f"{batch.shown['id']}_{kind}.jsonl"
                batch.shown[f"{kind}_file_id"] = self._keep(name, data, "batch_output").id
        batch.requests, batch.lines = [], {}
        batch.enter(status)


def _page(request: web.Request, items: list[Json]) -> web.Response:
    """The newest first, `limit` of them, from the one behind `after`."""
    items.reverse()
    names = [item["id"] for item in items]
    start = names.index(request.query["after"]) + 1 if "after" in request.query else 0
    limit = int(request.query.get("limit", 20))
    data = items[start : start + limit]
    ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {}
    more = len(items) > start + limit
    return web.json_response({"object": "list", "data": data, "has_more": more, **ends})
