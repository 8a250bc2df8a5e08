"""Importing costs next to nothing: heavy packages wait until they are used."""

import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "faiss", "vllm", "sentence_transformers", "datasets", "prefect", "openai")
CLI = """
from datakit.cli import app
from typer.testing import CliRunner
assert CliRunner().invoke(app, ["{}"]).exit_code == 0
"""


def loaded_by(code):
    """The heavy packages that a fresh interpreter holds after `code`."""
    tail = f"\nimport sys, json; print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    done = subprocess.run(
        [sys.executable, "-c", code + tail], capture_output=True, check=True, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "code",
    [
        "import datakit",
        "import datakit as dk; dk.run; dk.load_recipe('quickstart')",
        CLI.format("--help"),
        CLI.format("methods"),
    ],
)
def test_nothing_heavy_is_loaded(code):
    assert loaded_by(code) == []


def test_only_flows_import_prefect():
    assert loaded_by("import flows.curate") == ["prefect"]
