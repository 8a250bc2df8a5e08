"""An OpenAI-compatible endpoint for tests and benchmarks, with faults on demand.

Why: code that pays for answers must meet a server that is slow, refuses, lies and hangs up, and do
so alike on every run. So an answer is a pure function of the request body, and a fault is drawn
from (seed, body, attempt number of that body), never from time or order of arrival.

A program (`python tests/endpoint.py --port 0 --p500 .1` prints `ready http://127.0.0.1:PORT/v1`)
or a thread (`with Endpoint(p500=0.1) as e:` gives `e.url`, `e.stats()`, `e.set(p500=0)`). Routes:
POST /v1/chat/completions and /v1/completions, GET /v1/models, /v1/files and /v1/batches as OpenAI
has them; GET /stats (?bodies), POST /reset and /set (a JSON object of knobs), which lie beside /v1,
not below it.
"""

import argparse
import asyncio
import json
import math
import re
import signal
import threading
from collections.abc import Awaitable, Callable
from typing import Any, Self

from aiohttp import web
from endpoint_answers import answer, body_key, repairs, schema_asked, texts_of
from endpoint_batch import Batches
from endpoint_knobs import Bucket, Json, Knobs, Refusal, Tally

Reply = Callable[[Json], str | None]
Handler = Callable[[web.Request], Awaitable[web.Response]]

HANG_S = 60.0
LARGEST = 64 * 1024**2
BAD = (ValueError, TypeError, AttributeError, LookupError, RecursionError)
# How an attempt may end with a body of a 200, whole or not.
ANSWERED = ("ok", "pbad", "pcut", "phang", "pempty", "plength", "pfilter", "pinvalid")
ASKS = re.compile(rb"POST /v1/(chat/)?completions HTTP/1\.1\r\n")
LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)
# What only the long way understands.
SPECIAL = re.compile(
    rb"\r\n(expect|transfer-encoding|content-encoding|connection: *close)", re.IGNORECASE
)


class Lane(asyncio.Protocol):
    """The short way of requests whose answer nothing spoils or delays: read, answered, counted.

    It costs a quarter of the long way. The first bytes that are no such request hand the connection
    over to aiohttp for good.
    """

    def __init__(self, endpoint: "Endpoint", long_way: Callable[[], Any], lanes: set["Lane"]):
        self._endpoint, self._long_way, self._lanes = endpoint, long_way, lanes
        self._read = b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self._lanes.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._lanes.discard(self)

    def data_received(self, data: bytes) -> None:
        self._read += data
        reply = self._endpoint.at_once(self._read, self.transport)
        if reply is None:
            self._lanes.discard(self)
            protocol = self._long_way()
            self.transport.set_protocol(protocol)
            protocol.connection_made(self.transport)
            protocol.data_received(self._read)
        elif reply:
            self._read = b""
            self.transport.write(reply)


class Endpoint:
    """The server; keyword arguments other than `reply` and `port` are `Knobs`.

    `reply(body)` may give the text of an answer, or None to leave it to the default. It runs in the
    server's thread and must be a function of the body alone.
    """

    def __init__(self, *, reply: Reply | None = None, port: int = 0, **knobs: Any) -> None:
        self.knobs, self.url = Knobs(**knobs), ""
        self._reply, self._port = reply, port
        self._tally, self._lanes = Tally(), set[Lane]()
        self._requests, self._tokens = Bucket("requests"), Bucket("tokens")
        self._batches = Batches(lambda: self.knobs, self._tally, self._fate, self._complete)
        self.stats = self._tally.stats

    def set(self, **changes: Any) -> None:
        """Change knobs while it runs; a ValueError leaves them as they were."""
        self.knobs = Knobs.model_validate({**self.knobs.model_dump(), **changes})

    def reset(self) -> None:
        """Forget what was counted, attempts and the minute's use too; knobs and files stay."""
        self._tally.reset()
        self._requests, self._tokens = Bucket("requests"), Bucket("tokens")

    async def start(self) -> None:
        """Take requests at `url`, in the running loop; OSError where the port is taken."""
        app = web.Application(client_max_size=LARGEST)
        app.router.add_post("/v1/{kind:chat/completions|completions}", self._serve)
        app.router.add_get("/v1/models", self._guarded(self._models))
        for method, path, handler in self._batches.routes:
            app.router.add_route(method, f"/v1{path}", self._guarded(handler))
        app.router.add_get("/{action:stats}", self._control)
        app.router.add_post("/{action:reset|set}", self._control)
        # Cancellation tells that a client has left; by default a hung reply delays the end by 60 s.
        options: Json = {"handler_cancellation": True, "shutdown_timeout": 0.1}
        self._runner = web.AppRunner(app, access_log=None, **options)
        await self._runner.setup()
        long_way, lanes = self._runner.server, self._lanes
        # The default backlog of 128 drops a burst of connections, which then take a second longer.
        self._listener = await asyncio.get_running_loop().create_server(
            lambda: Lane(self, long_way, lanes), "127.0.0.1", self._port, backlog=4096
        )
        self.url = f"http://127.0.0.1:{self._listener.sockets[0].getsockname()[1]}/v1"

    async def close(self) -> None:
        """Stop serving; what is in flight is broken off."""
        if self.url:
            self._listener.close()
        for lane in list(self._lanes):
            lane.transport.abort()
        await self._runner.cleanup()

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        try:
            asyncio.run_coroutine_threadsafe(self.start(), self._loop).result()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self.close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def at_once(self, data: bytes, transport: Any) -> bytes | None:
        """The reply to a whole request; empty where more of it must come; None: the long way."""
        if not self.knobs.plain or not (asks := ASKS.match(data)):
            return None
        head, found, raw = data.partition(b"\r\n\r\n")
        length = LENGTH.search(head + b"\r\n") if found else None
        if found and (not length or SPECIAL.search(head)):
            return None
        if length is None or len(raw) < int(length[1]) <= LARGEST:
            return b"" if len(head) < 8192 else None
        try:
            if len(raw) != int(length[1]):
                return None
            body = {k: v for k, v in json.loads(raw).items() if v is not None}
            own = self._reply(body) if self._reply else None
            made = json.dumps(answer(body, chat=bool(asks[1]), own=own)).encode()
        except Exception:
            return None  # the long way says what is wrong
        self._tally.pass_by(transport)
        kind = b"HTTP/1.1 200 OK\r\nContent-Type: application/json; charset=utf-8\r\n"
        return b"%bContent-Length: %d\r\n\r\n%b" % (kind, len(made), made)

    async def _serve(self, request: web.Request) -> web.Response:
        """Count a request in, answer or spoil it, and count it out before the reply is sent."""
        knobs, key, kind, headers = self.knobs, "", "client_left", dict[str, str]()
        self._tally.arrive(request.transport)
        try:
            raw = await request.read()
            if not self._allows(request):
                raise Refusal("key", "is not the one asked for")
            if knobs.rpm:
                self._take("rpm", self._requests, 1, headers)
            body = {k: v for k, v in json.loads(raw).items() if v is not None}
            if knobs.tpm:
                usage = self._complete(body, request.path, "ok")["usage"]
                self._take("tpm", self._tokens, usage["total_tokens"], headers)
            key = body_key(body) if knobs.per_body else ""
            attempt = self._tally.admit(key)
            outcome, delay_s = self._fate(body, raw, key, attempt)
            await asyncio.sleep(delay_s)
            if outcome == "phang":
                kind = outcome
                await asyncio.sleep(HANG_S)
            response = self._reply_to(body, request.path, outcome)
            kind = outcome
        except Refusal as refusal:
            kind, response = refusal.kind, refusal.response
        except web.HTTPRequestEntityTooLarge:
            kind, response = "too_large", Refusal("too_large").response
        except BAD as error:
            kind, response = "bad_request", Refusal("bad_request", str(error)).response
        finally:
            self._tally.settle(key, kind)
        if headers:
            response.headers.update(headers)
        return response

    def _take(self, kind: str, bucket: Bucket, amount: int, headers: dict[str, str]) -> None:
        """Take from a limit and tell it in `headers`, or refuse."""
        wait_s, told = bucket.take(getattr(self.knobs, kind), amount)
        if not self.knobs.quiet_limits:
            headers.update(told)
        if wait_s:
            headers["retry-after-ms"] = str(math.ceil(wait_s * 1000))
            raise Refusal(kind, f"asks for {amount}", wait_s=math.ceil(wait_s))

    def _allows(self, request: web.Request) -> bool:
        key = self.knobs.key
        return not key or request.headers.get("Authorization") == f"Bearer {key}"

    def _guarded(self, handler: Handler) -> Handler:
        """A handler that asks for the key, and whose refusals become replies."""

        async def guarded(request: web.Request) -> web.Response:
            try:
                if not self._allows(request):
                    raise Refusal("key", "is not the one asked for")
                return await handler(request)
            except Refusal as refusal:
                return refusal.response
            except BAD as error:
                return Refusal("bad_request", str(error)).response

        return guarded

    def _fate(self, body: Json, raw: bytes, key: str, attempt: int) -> tuple[str, float]:
        """How an attempt shall end, `ok` or the name of the knob that spoils it, and its delay."""
        knobs = self.knobs
        outcome, delay_s = knobs.fate(key, attempt)
        matching = knobs.fail_matching
        # As it was sent, or as it reads: JSON writes some characters in two ways.
        if matching and matching in "\n".join([raw.decode(), *texts_of(body)]):
            outcome = "fail_matching"
        elif knobs.models and body.get("model") not in knobs.models:
            outcome = "models"
        elif attempt <= knobs.fail_first:
            outcome = "fail_first"
        elif outcome == "pinvalid" and (schema_asked(body) is None or repairs(body)):
            outcome = "ok"
        return outcome, delay_s

    def _complete(self, body: Json, path: str, outcome: str) -> Json:
        """The completion that `outcome` calls for, or a Refusal."""
        if outcome not in ANSWERED:
            waits = outcome in ("p429", "p503")
            raise Refusal(outcome, wait_s=self.knobs.retry_after if waits else None)
        try:
            own = self._reply(body) if self._reply else None
        except Exception as error:
            raise Refusal("reply", f"raised {error!r}") from error
        chat = path.endswith("/chat/completions")
        return answer(body, chat=chat, own=own, outcome=outcome)

    def _reply_to(self, body: Json, path: str, outcome: str) -> web.Response:
        """The completion as it is sent: whole, halved or cut off."""
        data = json.dumps(self._complete(body, path, outcome)).encode()
        sent = {"pbad": len(data) // 2, "pcut": len(data) // 2, "phang": 0}.get(outcome, len(data))
        response = web.Response(body=data[:sent], content_type="application/json")
        if outcome in ("pcut", "phang"):
            # Less is sent than was promised, and then the connection is closed.
            response.headers["Content-Length"] = str(len(data))
            response.force_close()
        return response

    async def _models(self, request: web.Request) -> web.Response:
        names = self.knobs.models or ("any",)
        data = [{"id": name, "object": "model", "created": 0, "owned_by": "test"} for name in names]
        return web.json_response({"object": "list", "data": data})

    async def _control(self, request: web.Request) -> web.Response:
        """GET /stats, POST /reset and POST /set: each answers with the numbers and the knobs."""
        try:
            if request.path == "/reset":
                self.reset()
            if request.path == "/set":
                self.set(**json.loads(await request.read()))
        except (ValueError, TypeError) as error:
            return Refusal("bad_request", str(error)).response
        stats = self.stats(bodies="bodies" in request.query)
        return web.json_response({**stats, "knobs": self.knobs.model_dump()})


async def serve(endpoint: Endpoint) -> None:
    """Serve as a program: say where, then run until SIGTERM or SIGINT."""
    asked_to_stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, asked_to_stop.set)
    await endpoint.start()
    print(f"ready {endpoint.url}", flush=True)
    await asked_to_stop.wait()
    await endpoint.close()


def main() -> None:
    """Read the knobs from the command line (`--fail-first 2 --models a b --no-per-body`)."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--models", nargs="*", default=[])
    parser.add_argument("--no-per-body", dest="per_body", action="store_false")
    parser.add_argument("--quiet-limits", action="store_true")
    apart = {"models", "per_body", "quiet_limits"}
    for name, default in Knobs().model_dump(exclude=apart).items():
        parser.add_argument(f"--{name.replace('_', '-')}", default=default, help="%(default)s")
    asyncio.run(serve(Endpoint(**vars(parser.parse_args()))))


if __name__ == "__main__":
    main()
