"""The curation flow, for real: on Prefect's ephemeral server and against one that runs."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from endpoint import Endpoint

from datakit.pipeline import run
from datakit.versions import find_version

pytestmark = pytest.mark.slow

KEY = "sk-planted-where-nobody-may-find-it"


@pytest.fixture
def prefect(tmp_path):
    """An environment with a Prefect home of its own and no telemetry."""
    quiet = {
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",
        "DO_NOT_TRACK": "1",
    }
    return os.environ | quiet


def curate(tmp_path, environment, *overrides):
    """Run the flow over two lanes in a process of its own; what it says goes to `said`."""
    code = (
        "import sys\n"
        "from flows.curate import curate\n"
        "print(curate('smoke/pairs', outputs=sys.argv[1], state=sys.argv[2], lanes=2,"
        " overrides=['rows_per_part=3', *sys.argv[3:]]))"
    )
    where = [str(tmp_path / "flow"), str(tmp_path / "state")]
    done = subprocess.run(
        [sys.executable, "-c", code, *where, *overrides],
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (tmp_path / "said").write_text(done.stdout + done.stderr)
    assert done.stdout.splitlines()[-1] == "smoke-pairs@1.0.0"
    assert "judge+pair lane 2/2" in done.stderr + done.stdout
    return find_version(tmp_path / "flow", "smoke-pairs")


def test_a_flow_needs_no_server_and_makes_the_same_version(tmp_path, prefect):
    version = curate(tmp_path, prefect)
    plain = run(
        "smoke/pairs",
        outputs=tmp_path / "plain",
        state=tmp_path / "other",
        overrides=["rows_per_part=3"],
    )
    assert version.manifest.digest == plain.manifest.digest


def test_a_flow_against_a_server_leaves_its_funnel_there_and_no_key(tmp_path, prefect):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "prefect", "server", "start", "--port", str(port)],
        env=prefect,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    api = f"http://127.0.0.1:{port}/api"
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(f"{api}/health", timeout=1).close()
                break
            except OSError:
                time.sleep(0.5)
        with Endpoint(key=KEY) as endpoint:
            judge = {"kind": "openai", "model": "any", "base_url": endpoint.url}
            given = [f"models.judge.{name}={value}" for name, value in judge.items()]
            environment = prefect | {"PREFECT_API_URL": api, "JUDGE_KEY": KEY}
            curate(tmp_path, environment, *given, "models.judge.api_key_env=JUDGE_KEY")
            assert endpoint.stats()["ok"]
        found = _post(f"{api}/artifacts/filter", {})
        tasks = _post(f"{api}/task_runs/filter", {})
    finally:
        server.terminate()
        server.wait(30)
    assert "| judge |" in found[0]["data"]
    assert found[0]["key"] == "funnel-smoke-pairs"
    names = {task["name"] for task in tasks}
    assert {"pairs", "exact", "near", "judge+pair lane 1/2", "judge+pair lane 2/2"} == names
    # Everything that was written: outputs, state, what was said, and the server's own database.
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any("prefect" in path.name for path in files)
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []


def _post(url, body):
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.loads(answer.read())
