"""A recipe that asks an endpoint at three steps' cost, and what the endpoint's own counts say."""

import contextlib
import io
import json
import os
import signal
import sys
from types import SimpleNamespace
from unittest import mock

import yaml

from datakit.cli import main

PRICE = {"input": 1000, "output": 3000}
"""Dollars for a million tokens; the endpoint's tokens are words."""


def recipe_of(url, rows=60, **more):
    """Two writers of other names, for other texts, and a judge; all of them priced."""

    def model(name):
        fixed = {"kind": "openai", "model": name, "base_url": url, "revision": "1"}
        limits = {"sampling": {"max_tokens": 100}, "max_in_flight": 4}
        return fixed | limits | {"price": dict(PRICE)} | more

    return {
        "name": "asking",
        "rows_per_part": 10,
        "models": {role: model(f"the-{role}") for role in ("writer", "drafter", "judge")},
        "steps": [
            {"step": "toys.numbers", "rows": rows},
            {"step": "annotation.respond", "models": ["writer", "drafter"]},
            {"step": "annotation.judge", "judge": "judge"},
            {"step": "annotation.pair"},
        ],
    }


def write(folder, recipe, name="asking.yaml"):
    path = folder / name
    path.write_text(yaml.safe_dump(recipe))
    return path


def datakit(folder, *arguments, columns=80, **variables):
    """What `datakit ...` prints and exits with, in a folder, with the state in it."""
    out, err = io.StringIO(), io.StringIO()
    known = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    named = {"DATAKIT_STATE": str(folder / "state"), "COLUMNS": str(columns)} | variables
    with (
        contextlib.chdir(folder),
        mock.patch.dict(os.environ, named),
        mock.patch.object(sys, "argv", ["datakit", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        finally:
            for number, handler in known.items():
                signal.signal(number, handler)
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def finished(folder, *arguments, code=0):
    """What a command printed that ended with a code."""
    done = datakit(folder, *arguments)
    assert done.returncode == code, done.stderr
    return done.stdout


def manifest_of(folder, *arguments):
    """The manifest of a run."""
    return json.loads(finished(folder, "run", *arguments, "--json"))


class Bill:
    """Give as `reply` to an Endpoint: counts the words that pass, at the prices above."""

    def __init__(self):
        self.usd = 0.0

    def __call__(self, body):
        from endpoint_answers import answer

        usage = answer(body, chat=True)["usage"]
        self.usd += usage["prompt_tokens"] * PRICE["input"] / 1e6
        self.usd += usage["completion_tokens"] * PRICE["output"] / 1e6
