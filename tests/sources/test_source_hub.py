"""Reading from a stand-in of the Hub, in a process of its own: the address is read at import."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import COMMIT, HubServer

ROOT = Path(__file__).parents[2]

READ = """
import asyncio, json, sys
from pathlib import Path
from datakit.errors import DatakitError
from datakit.kit import Kit
from datakit.sources.hub import Hub
from datakit.step import Reject

assert "datasets" not in sys.modules
for fields in json.loads(sys.argv[1]):
    kit = Kit("src", 0, Path(), Path(), {}, {}, {})
    step = Hub.model_validate({"kind": "Pair", "revision": "main"} | fields)
    try:
        parts = list(step.ranges(kit))
        rows = [row for part in parts for row in asyncio.run(step.read(part, kit))]
        said = [
            [row.reason, row.detail] if isinstance(row, Reject) else row.model_dump()
            for row in rows
        ]
        found = {"parts": [part.model_dump() for part in parts], "rows": said}
    except DatakitError as error:
        found = {"error": type(error).__name__, "text": str(error)}
    print("RESULT" + json.dumps(found))
"""


def parquet(rows):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


PAIRS = [
    {"prompt": "Hello?", "chosen": "Hi.", "rejected": "Go.", "n": 1},
    {"prompt": "Why?", "chosen": "", "rejected": "So.", "n": 2},
    {"prompt": "Where?", "chosen": "There.", "rejected": "No.", "n": 3},
]
CARD = b"""---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*
  - split: test
    path: data/test-*
- config_name: other
  data_files:
  - split: train
    path: other/train-*
---
"""
FILES = {
    "README.md": CARD,
    "data/train-00000-of-00001.parquet": parquet(PAIRS),
    "data/test-00000-of-00001.parquet": parquet(PAIRS[:1]),
    "other/train-00000-of-00001.parquet": parquet(PAIRS[2:]),
}
SETS = {"org/set": FILES, "org/private": FILES}

ASKED = {
    "train": {"dataset": "org/set"},
    "commit": {"dataset": "org/set", "revision": COMMIT},
    "tag": {"dataset": "org/set", "revision": "v1", "split": "test"},
    "config": {"dataset": "org/set", "config": "other"},
    "no config": {"dataset": "org/set", "config": "none"},
    "no split": {"dataset": "org/set", "split": "none"},
    "no revision": {"dataset": "org/set", "revision": "none"},
    "no commit": {"dataset": "org/set", "revision": "f" * 40},
    "no dataset": {"dataset": "org/none"},
    "private": {"dataset": "org/private"},
    "down": {"dataset": "org/down"},
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    home = tmp_path_factory.mktemp("hub")
    with HubServer(SETS) as url:
        environment = os.environ | {
            "HF_ENDPOINT": url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "PYTHONPATH": str(ROOT),
        }
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"):
            environment.pop(name, None)
        done = subprocess.run(
            [sys.executable, "-c", READ, json.dumps(list(ASKED.values()))],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    found = [json.loads(line.removeprefix("RESULT")) for line in lines]
    return dict(zip(ASKED, found, strict=True))


def test_rows_and_rejects(answers):
    first, fault, last = answers["train"]["rows"]
    assert first["prompt"] == [{"role": "user", "content": "Hello?"}]
    assert first["extra"] == '{"n":1}'
    assert first["source"] == "org/set"
    assert last["chosen"] == [{"role": "assistant", "content": "There."}]
    assert fault == ["empty_text", "org/set:train, row 2: column 'chosen' is empty"]


def test_a_name_of_a_commit_is_the_commit(answers):
    assert answers["train"] == answers["commit"]
    assert answers["train"]["parts"][0]["name"] == COMMIT
    assert len(answers["tag"]["rows"]) == 1
    assert answers["tag"]["parts"][0]["fingerprint"] != answers["train"]["parts"][0]["fingerprint"]


def test_config(answers):
    assert [row["extra"] for row in answers["config"]["rows"]] == ['{"n":3}']


@pytest.mark.parametrize("name", ["config", "split"])
def test_what_the_dataset_does_not_have_is_the_recipes_fault(name, answers):
    found = answers[f"no {name}"]
    assert found["error"] == "InputError"
    assert f"{name} 'none'" in found["text"]
    assert "org/set" in found["text"]


@pytest.mark.parametrize("name", ["no revision", "no commit", "no dataset", "private", "down"])
def test_what_the_hub_does_not_give_happens_outside(name, answers):
    found = answers[name]
    assert found["error"] == "OutsideError", found
    assert ASKED[name]["dataset"] in found["text"]
    assert "\n" not in found["text"]
    assert len(found["text"]) < 600
