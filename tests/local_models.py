"""Helpers for the tests of local models: a stand-in for vLLM, and vLLM itself.

The stand-in is `fake_vllm.py`, a program that does what $FAKE says. The real one runs
where DATAKIT_TEST_VLLM names a Python whose environment holds vLLM.
"""

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from tiny_model import make_tiny_model

from datakit.models.specs import VLLMSpec


def fake_python(folder):
    """The path of a "Python" that runs the stand-in."""
    program = Path(__file__).with_name("fake_vllm.py")
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S {program} "$@"\n')
    python.chmod(0o755)
    return str(python)


def spec_of(**fields):
    return VLLMSpec(kind="vllm", model=fields.pop("model", "m"), **fields)


def post(url, path, body):
    """The status and the JSON of a POST."""
    data = json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def alive(pid):
    """Whether a process runs; one that is only not yet collected does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def logged_pid(log, who):
    """The last process id that the stand-in has logged for `who`; None where there is none yet."""
    text = log.read_text() if log.exists() else ""
    found = [line.split()[1] for line in text.splitlines() if line.startswith(f"{who} ")]
    return int(found[-1]) if found else None


def wait_for(what, seconds=10.0):
    """The first true value of `what()`."""
    until = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)
    return found


PYTHON = os.environ.get("DATAKIT_TEST_VLLM", "")


def real(test):
    """Marks a test that starts vLLM."""
    told = "DATAKIT_TEST_VLLM does not name a Python that has vLLM"
    marks = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.skipif(not PYTHON, reason=told)]
    for mark in marks:
        test = mark(test)
    return test


def tiny_spec(folder, seed=0):
    """A tiny model for a machine without GPUs."""
    args = {"max_model_len": 1024, "enforce_eager": True, "max_num_seqs": 32, "dtype": "bfloat16"}
    environment = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    model = str(make_tiny_model(folder, seed))
    fields = {"python": PYTHON, "gpus": 0, "args": args, "environment": environment}
    return spec_of(model=model, **fields)


def processes_below(pid):
    """The process and all that come from it, with their names."""
    listed = subprocess.run(["ps", "-ww", "-eo", "pid,ppid,args"], capture_output=True, text=True)
    rows = [line.split(None, 2) for line in listed.stdout.splitlines()[1:]]
    found = {pid: ""}
    for _ in rows:
        found |= {int(row[0]): row[2] for row in rows if int(row[1]) in found}
    return found
