"""Helpers for the tests of models: asks through a whole session, and what the ledger keeps."""

import asyncio
import contextlib

from aiohttp import web
from anyio.from_thread import start_blocking_portal
from toys.answer import Answer

from datakit.models.chat import Ask
from datakit.models.ledger import Attempt, Ledger
from datakit.models.specs import OpenAISpec
from datakit.records import Message
from datakit.session import Session, Settings, Watch


def say(text="What is 1 + 1?", **fields):
    return Ask(messages=(Message(role="user", content=text),), **fields)


def openai(url="http://127.0.0.1:9/v1", **fields):
    """A model behind an endpoint, asked once and no more."""
    return OpenAISpec(**{"kind": "openai", "model": "any", "base_url": url, "retries": 0} | fields)


def session(folder, spec, *, watch=None, models=None, **settings):
    """A session whose role `m` is `spec`; use as `with`."""
    fixed = {"outputs": folder / "outputs", "state": folder / "state", "base": folder}
    names = {"recipe": "recipe", "run": "run-1", "models": {"m": spec}}
    return Session(Settings(**fixed | names | settings), [Answer()], watch or Watch(), models)


def within(folder, spec, work, **more):
    """What `await work(kit)` gives in a session of its own."""

    async def done(opened):
        try:
            return await work(opened.kit("step"))
        finally:
            await opened.close_models()

    with session(folder, spec, **more) as opened:
        return asyncio.run(done(opened))


def answers(folder, spec, asks, **more):
    """What each ask gives, all of them asked at once; errors in their place."""

    async def all_of_them(kit):
        return await asyncio.gather(*(kit.ask("m", one) for one in asks), return_exceptions=True)

    return within(folder, spec, all_of_them, **more)


def answer(folder, spec, ask, **more):
    """The reply to one ask; its error is raised."""
    [found] = answers(folder, spec, [ask], **more)
    if isinstance(found, BaseException):
        raise found
    return found


def entries(folder):
    """All answers in the ledger."""
    with Ledger.opened(folder / "state") as ledger:
        return list(ledger.entries())


def attempts(folder):
    """All attempts in the ledger, in their order."""
    with Ledger.opened(folder / "state") as ledger:
        found = ledger.db.execute("SELECT * FROM attempts ORDER BY rowid")
        return [Attempt(*row) for row in found]


def outcomes(folder):
    return [one.outcome for one in attempts(folder)]


@contextlib.contextmanager
def server(handler):
    """A server whose every reply `handler(request)` makes; gives its address."""

    async def started():
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", handler)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return runner

    with start_blocking_portal() as portal:
        runner = portal.call(started)
        try:
            yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        finally:
            portal.call(runner.cleanup)


def sends(body=b"", status=200, headers=None, content_type="application/json"):
    """A handler that always sends these bytes, and counts in `seen` what was asked."""

    async def handler(request):
        handler.seen.append(await request.json())
        return web.Response(body=body, status=status, headers=headers, content_type=content_type)

    handler.seen = []
    return handler
