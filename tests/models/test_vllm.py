"""Local servers: packed onto GPUs, started, watched and stopped, with a stand-in and with vLLM.

The stand-in is a program that takes vLLM's command line and does what FAKE says. The real one runs
where DATAKIT_TEST_VLLM names a Python whose environment holds vLLM.
"""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from tiny_model import make_tiny_model

from datakit.errors import EndpointError, InputError
from datakit.models import vllm
from datakit.models.specs import VLLMSpec
from datakit.models.vllm import (
    VLLMServer,
    assign,
    gpu_names,
    phases,
    server_command,
    server_environment,
    serving,
    visible_gpus,
)

FAKE = """
import http.server, json, os, signal, subprocess, sys, time

assert sys.argv[1:3] == ["-m", "vllm.entrypoints.openai.api_server"]
given = dict(arg[2:].split("=", 1) for arg in sys.argv[3:] if "=" in arg)
does = json.loads(os.environ.get("FAKE", "{}"))
print("server", os.getpid(), flush=True)
for line in does.get("says", []):
    print(line, flush=True)
if does.get("worker"):
    # A child that takes no notice of SIGTERM, as a stuck worker would.
    stuck = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"
    worker = subprocess.Popen([sys.executable, "-c", stuck])
    print("worker", worker.pid, flush=True)
if does.get("stubborn"):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if "marker" in does:
    # Ends at its start if this is not its first.
    if os.path.exists(does["marker"]):
        sys.exit(7)
    open(does["marker"], "w").close()
if "exits" in does:
    sys.exit(does["exits"])
time.sleep(does.get("loads_s", 0))


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.reply(503 if does.get("sick") else 200, {})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        said = body["messages"][-1]["content"]
        if said == "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        known = body["model"] == given["served-model-name"]
        seen = {"pid": os.getpid(), "env": dict(os.environ), "argv": sys.argv}
        message = {"role": "assistant", "content": json.dumps(seen)}
        self.reply(200 if known else 404, {"choices": [{"message": message}]})

    def reply(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


http.server.ThreadingHTTPServer((given["host"], int(given["port"])), Handler).serve_forever()
"""


@pytest.fixture
def fake(tmp_path):
    """Makes specs whose Python is the stand-in; keyword arguments are what it does."""
    program = tmp_path / "fake.py"
    program.write_text(FAKE)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S {program} "$@"\n')
    python.chmod(0o755)

    def spec(fields=None, **does):
        environment = {"FAKE": json.dumps(does)}
        given = {"model": "m", "python": str(python), "environment": environment}
        return VLLMSpec(kind="vllm", **given | (fields or {}))

    return spec


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


def ask(url, said="hello", model="m"):
    """What the stand-in tells of itself."""
    status, body = post(
        url,
        "/chat/completions",
        {"model": model, "messages": [{"role": "user", "content": said}]},
    )
    assert status == 200, body
    return json.loads(body["choices"][0]["message"]["content"])


def crash(url):
    with pytest.raises((OSError, urllib.error.URLError)):
        ask(url, "crash")


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


@contextlib.asynccontextmanager
async def started(spec, log, **options):
    server = VLLMServer(spec, "m", (), log, **options)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


# Which models run together, and where.


def roles(**sizes):
    """Specs with that many GPUs each, in that order."""
    return {role: spec_of(model=role, gpus=size) for role, size in sizes.items()}


def test_models_that_fit_run_together():
    assert phases(roles(a=1, b=1), 2) == [["a", "b"]]
    assert phases(roles(a=2, b=1, c=1), 2) == [["a"], ["b", "c"]]
    assert phases(roles(a=1, b=2, c=1), 2) == [["a", "c"], ["b"]]
    assert phases({}, 0) == []


def test_models_without_gpus_join_the_newest_phase():
    assert phases(roles(a=0, b=0), 0) == [["a", "b"]]
    assert phases(roles(a=2, b=0, c=2, d=0), 2) == [["a", "b"], ["c", "d"]]


def test_replicas_stay_together():
    specs = {"a": spec_of(tensor_parallel=2, replicas=2), "b": spec_of(model="n")}
    assert phases(specs, 4) == [["a"], ["b"]]
    assert phases(specs, 5) == [["a", "b"]]


def test_roles_of_one_server_share_it():
    from datakit.models.specs import Sampling

    judge = spec_of(sampling=Sampling(temperature=0), max_in_flight=3)
    specs = {"writer": spec_of(), "other": spec_of(model="n"), "judge": judge}
    assert phases(specs, 1) == [["writer", "judge"], ["other"]]
    assert assign({"writer": spec_of(), "judge": judge}, ["5"]) == {
        "writer": [("5",)],
        "judge": [("5",)],
    }


def test_too_large_a_model_says_what_to_lower():
    with pytest.raises(
        InputError, match=r"a needs 6 GPUs \(replicas 3 × 2\), and there are 5"
    ) as e:
        phases({"a": spec_of(tensor_parallel=2, replicas=3)}, 5)
    assert "set models.a.replicas to 2 or less" in str(e.value)
    with pytest.raises(InputError, match=r"needs 8 GPUs .* lower models.a.tensor_parallel"):
        phases({"a": spec_of(tensor_parallel=8)}, 4)
    with pytest.raises(
        InputError, match=r"needs 1 GPUs .* there are 0; lower models.a.gpus.*gpus: 0"
    ):
        phases({"a": spec_of(gpus=1)}, 0)


def test_every_role_is_in_one_phase_and_none_is_overfull():
    import itertools

    for sizes in itertools.product(range(4), repeat=4):
        specs = roles(**dict(zip("abcd", sizes, strict=True)))
        packed = phases(specs, 3)
        assert sorted(itertools.chain(*packed)) == list("abcd")
        assert all(sum(specs[role].gpus_each for role in phase) <= 3 for phase in packed)
        # What is needed first comes first.
        assert [phase[0] for phase in packed] == sorted(phase[0] for phase in packed)
        for phase in packed:
            places = assign({role: specs[role] for role in phase}, ["x", "y", "z"])
            used = [name for places in places.values() for place in places for name in place]
            assert len(used) == len(set(used))


def test_replicas_are_assigned_apart():
    specs = {
        "a": spec_of(tensor_parallel=2, replicas=2),
        "b": spec_of(model="n", gpus=0, replicas=2),
        "c": spec_of(model="o"),
    }
    assert assign(specs, ["4", "5", "6", "GPU-x", "9"]) == {
        "a": [("4", "5"), ("6", "GPU-x")],
        "b": [(), ()],
        "c": [("9",)],
    }
    with pytest.raises(InputError, match="there are 0"):
        assign(specs, ["4", "5", "6", "7"])


@pytest.fixture
def nvidia(tmp_path, monkeypatch):
    """A machine with three GPUs, of which one is cut into parts."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("DATAKIT_GPUS", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    program = tmp_path / "nvidia-smi"
    lines = ["GPU 0: NVIDIA H200 (UUID: GPU-1)", "  MIG 1g.18gb Device 0: (UUID: MIG-2)"]
    lines += ["GPU 1: NVIDIA H200 (UUID: GPU-3)", "GPU 2: NVIDIA H200 (UUID: GPU-4)"]
    program.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines))
    program.chmod(0o755)
    return program


def test_gpus_are_those_of_nvidia_smi(nvidia):
    assert gpu_names() == ("0", "1", "2")
    nvidia.write_text("#!/bin/sh\necho 'GPU 0: no driver'\nexit 9\n")
    assert visible_gpus() == 0
    nvidia.unlink()
    assert visible_gpus() == 0


def test_gpus_are_those_that_cuda_shows(nvidia, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-7,1")
    assert gpu_names() == ("3", "GPU-7", "1")
    monkeypatch.setenv("DATAKIT_GPUS", "2")
    assert gpu_names() == ("3", "GPU-7")
    monkeypatch.setenv("DATAKIT_GPUS", "4")
    with pytest.raises(InputError, match="DATAKIT_GPUS is 4, and CUDA_VISIBLE_DEVICES lists 3"):
        gpu_names()


@pytest.mark.parametrize("hidden", ["", "-1", "NoDevFiles", "-1,0"])
def test_hidden_gpus_do_not_count(nvidia, monkeypatch, hidden):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert visible_gpus() == 0


def test_room_may_be_declared(nvidia, monkeypatch):
    for room in (0, 1, 2, 5):
        monkeypatch.setenv("DATAKIT_GPUS", str(room))
        assert gpu_names() == tuple("01234"[:room])
    for wrong in ("-1", "two", "1.5", "99999"):
        monkeypatch.setenv("DATAKIT_GPUS", wrong)
        with pytest.raises(InputError, match="give a number of GPUs"):
            visible_gpus()


# What a server is started with.


def test_arguments_are_written_as_vllm_reads_them():
    args = {
        "max_model_len": 1024,
        "gpu-memory-utilization": 0.5,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "quantization": None,
        "chat_template": "--odd",
        "hf_overrides": {"rope": {"factor": 2}},
        "lora_modules": ["a=b", {"name": "c"}],
        "middleware": [],
    }
    spec = spec_of(model="org/m", revision="abc", tensor_parallel=2, args=args)
    command = server_command(spec, "served", 1234)
    assert command[0] == sys.executable
    assert command[1:] == [
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model=org/m",
        "--served-model-name=served",
        "--host=127.0.0.1",
        "--port=1234",
        "--revision=abc",
        "--tensor-parallel-size=2",
        "--max-model-len=1024",
        "--gpu-memory-utilization=0.5",
        "--enforce-eager",
        "--no-enable-prefix-caching",
        "--chat-template=--odd",
        '--hf-overrides={"rope": {"factor": 2}}',
        "--lora-modules",
        "a=b",
        '{"name": "c"}',
    ]
    plain = server_command(spec_of(), "m", 1)
    assert not any("revision" in part or "tensor" in part for part in plain)


@pytest.mark.parametrize("key", ["port", "tensor_parallel_size", "tensor-parallel-size", "model"])
def test_arguments_that_are_ours_are_refused(key):
    with pytest.raises(InputError, match=f"leave out '{key}'"):
        server_command(spec_of(args={key: 1}), "m", 1)


@pytest.mark.parametrize("key", ["--dtype", "a b", "", "x=y"])
def test_names_that_are_no_arguments_are_refused(key):
    with pytest.raises(InputError, match="not the name of an engine argument"):
        server_command(spec_of(args={key: 1}), "m", 1)


def test_secrets_stay_here(monkeypatch):
    secrets = ["JUDGE_API_KEY", "OPENAI_APIKEY", "my_secret", "GH_TOKEN", "DB_PASSWORD"]
    for name in [*secrets, "HF_TOKEN", "TOKENIZERS_PARALLELISM", "WANTED_KEY", "PYTHONPATH"]:
        monkeypatch.setenv(name, "ours")
    spec = spec_of(python="/x/python", environment={"WANTED_KEY": "theirs"})
    given = server_environment(spec, ("3", "GPU-7"))
    assert not set(secrets) & set(given)
    assert (given["HF_TOKEN"], given["WANTED_KEY"]) == ("ours", "theirs")
    assert given["TOKENIZERS_PARALLELISM"] == "ours"
    assert given["PATH"] == os.environ["PATH"]
    assert "PYTHONPATH" not in given
    assert server_environment(spec_of(), ())["PYTHONPATH"] == "ours"


def test_a_server_sees_its_own_gpus_only(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    assert server_environment(spec_of(), ("3", "GPU-7"))["CUDA_VISIBLE_DEVICES"] == "3,GPU-7"
    assert server_environment(spec_of(gpus=0), ())["CUDA_VISIBLE_DEVICES"] == ""
    shared = spec_of(gpus=0, environment={"CUDA_VISIBLE_DEVICES": "1"})
    assert server_environment(shared, ())["CUDA_VISIBLE_DEVICES"] == "1"
    given = server_environment(spec_of(), ())
    assert (given["VLLM_NO_USAGE_STATS"], given["DO_NOT_TRACK"]) == ("1", "1")


# One server.


def test_a_server_answers_once_it_is_started(fake, tmp_path, monkeypatch):
    monkeypatch.setenv("OTHER_API_KEY", "secret")
    log = tmp_path / "logs" / "m.log"

    async def run():
        async with started(fake(says=["loading"], loads_s=0.5), log) as server:
            await server.until_up()
            assert server.url.startswith("http://127.0.0.1:")
            seen = await asyncio.to_thread(ask, server.url)
            assert alive(seen["pid"])
        return seen

    seen = asyncio.run(run())
    assert not alive(seen["pid"])
    assert "OTHER_API_KEY" not in seen["env"]
    assert log.read_text().endswith("\nloading\n")


def test_its_end_at_the_start_is_told_at_once_with_the_log(fake, tmp_path):
    lines = [f"line {number} \x1b[31m" for number in range(40)]
    begun = time.monotonic()
    with pytest.raises(EndpointError) as raised:
        asyncio.run(VLLMServer(fake(says=lines, exits=3), "m", (), tmp_path / "m.log").start())
    assert time.monotonic() - begun < 5
    said = str(raised.value)
    assert "the vLLM server of model 'm' ended before it answered with exit code 3" in said
    assert "line 39" in said
    assert "line 24" not in said
    assert "\x1b" not in said
    assert str(tmp_path / "m.log") in said


def test_a_server_that_is_killed_while_it_loads_says_so(fake, tmp_path):
    log = tmp_path / "m.log"

    async def run():
        starting = asyncio.create_task(VLLMServer(fake(loads_s=60), "m", (), log).start())
        pid = await asyncio.to_thread(wait_for, lambda: logged_pid(log, "server"))
        os.kill(pid, signal.SIGKILL)
        await starting

    with pytest.raises(EndpointError, match=r"exit code 137.*was there enough memory"):
        asyncio.run(run())


@pytest.mark.parametrize("does", [{"loads_s": 60}, {"sick": True}])
def test_the_start_has_a_time_limit(fake, tmp_path, does):
    log = tmp_path / "m.log"
    spec = fake({"start_timeout_s": 1}, **does)
    with pytest.raises(EndpointError, match=r"did not answer within 1 s \(start_timeout_s\)"):
        asyncio.run(VLLMServer(spec, "m", (), log).start())
    assert not alive(logged_pid(log, "server"))


def test_wrong_pythons_and_arguments_are_the_users(fake, tmp_path):
    def start(spec):
        asyncio.run(VLLMServer(spec, "m", (), tmp_path / "m.log").start())

    with pytest.raises(InputError, match="there is no Python at '/no/python'"):
        start(spec_of(python="/no/python"))
    with pytest.raises(InputError, match="there is no model at '/no/model'"):
        start(spec_of(model="/no/model"))
    # This environment's Python has no vLLM.
    with pytest.raises(InputError, match=r"there is no vLLM in the environment .* --install-vllm"):
        start(spec_of(python=sys.executable))
    said = "api_server.py: error: unrecognized arguments: --max-modle-len=3"
    with pytest.raises(InputError, match=r"does not take the args .*--max-modle-len=3"):
        start(fake(says=["usage: api_server.py", said], exits=2))


def test_a_log_is_shown_without_the_frames_of_tracebacks(fake, tmp_path):
    head = "(EngineCore pid=7) ERROR 11-21 14:51:44 [core.py:12]"
    says = [
        f"{head} Traceback (most recent call last):",
        f'{head}   File "core.py", line 3, in run',
    ]
    says += [
        f"{head}     step()",
        f"{head}     ^^^^^^",
        f"{head} ValidationError: too long",
        "  why",
    ]
    with pytest.raises(InputError) as raised:
        asyncio.run(VLLMServer(fake(says=says, exits=1), "m", (), tmp_path / "m.log").start())
    shown = str(raised.value).splitlines()[2:]
    assert shown == [f"  {says[0]}", f"  {head} ValidationError: too long", "  why"]


def test_a_crashed_server_comes_back_at_its_address(fake, tmp_path):
    async def run():
        async with started(fake(loads_s=0.5), tmp_path / "m.log") as server:
            watching = asyncio.create_task(server.watch())
            url, pids = server.url, []
            for _ in range(vllm.RESTARTS):
                pids.append((await asyncio.to_thread(ask, url))["pid"])
                await asyncio.to_thread(crash, url)
                await asyncio.sleep(0.3)
                await server.until_up()
                assert server.url == url
            pids.append((await asyncio.to_thread(ask, url))["pid"])
            assert len(set(pids)) == vllm.RESTARTS + 1
            await asyncio.to_thread(crash, url)
            with pytest.raises(EndpointError, match=r"ended 4 times in 10 minutes.*exit code 137"):
                await watching

    asyncio.run(run())


def test_a_server_that_does_not_come_back_is_given_up(fake, tmp_path):
    spec = fake(marker=str(tmp_path / "marker"), says=["why"])

    async def run():
        async with started(spec, tmp_path / "m.log") as server:
            await asyncio.to_thread(crash, server.url)
            with pytest.raises(
                EndpointError, match=r"with exit code 7; .*m.log' ends:\n  server \d+\n  why$"
            ):
                await server.watch()

    asyncio.run(run())


def test_workers_that_a_crash_leaves_behind_are_killed(fake, tmp_path):
    log = tmp_path / "m.log"

    async def run():
        async with started(fake(worker=True), log) as server:
            worker = logged_pid(log, "worker")
            assert alive(worker)
            await asyncio.to_thread(crash, server.url)
            await asyncio.to_thread(wait_for, lambda: not alive(worker))

    asyncio.run(run())


def test_a_server_that_does_not_stop_is_killed_with_its_workers(fake, tmp_path):
    log = tmp_path / "m.log"

    async def run():
        async with started(fake(stubborn=True, worker=True), log, grace_s=1.0):
            begun = time.monotonic()
        return time.monotonic() - begun

    assert 0.9 < asyncio.run(run()) < 8
    assert not alive(logged_pid(log, "server"))
    assert not alive(logged_pid(log, "worker"))


def test_a_hurried_stop_kills_at_once(fake, tmp_path):
    log = tmp_path / "m.log"

    async def run():
        server = VLLMServer(fake(stubborn=True), "m", (), log)
        await server.start()
        begun = time.monotonic()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(server.stop(), 0.5)
        return time.monotonic() - begun

    assert asyncio.run(run()) < 5
    assert not alive(logged_pid(log, "server"))


PARENT = """
import asyncio, os, sys, time
from pathlib import Path
from datakit.models.specs import VLLMSpec
from datakit.models.vllm import VLLMServer

async def main():
    spec = VLLMSpec.model_validate_json(sys.argv[1])
    await VLLMServer(spec, "m", (), Path(sys.argv[2])).start()
    # A child of the parent's own, which outlives it and holds whatever it had open.
    if not os.fork():
        time.sleep(30)
        os._exit(0)
    print("up", flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.mark.parametrize("stubborn_worker", [False, True])
def test_no_server_outlives_us(fake, tmp_path, stubborn_worker):
    log = tmp_path / "m.log"
    spec = fake(worker=stubborn_worker)
    command = [sys.executable, "-c", PARENT, spec.model_dump_json(), str(log)]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert parent.stdout.readline() == b"up\n"
        assert alive(logged_pid(log, "server"))
        parent.kill()
        parent.wait()
        wait_for(lambda: not alive(logged_pid(log, "server")))
        if stubborn_worker:
            wait_for(lambda: not alive(logged_pid(log, "worker")))
    finally:
        os.killpg(parent.pid, signal.SIGKILL)
        parent.wait()
        parent.stdout.close()


def test_ctrl_c_reaches_the_server_through_us_only(fake, tmp_path):
    async def run():
        async with started(fake(), tmp_path / "m.log") as server:
            pid = (await asyncio.to_thread(ask, server.url))["pid"]
            assert os.getsid(pid) != os.getsid(0)

    asyncio.run(run())


# All servers of a phase.


def test_all_servers_are_started_at_once_and_stopped(fake, tmp_path):
    specs = {
        "writer": fake({"replicas": 2}, loads_s=2),
        "other": fake({"model": "n", "gpus": 0}, loads_s=2),
        "judge": fake({"replicas": 2, "timeout_s": 5}, loads_s=2),
    }

    async def run():
        begun = time.monotonic()
        async with serving(specs, ["4", "5"], tmp_path) as servers:
            assert time.monotonic() - begun < 5
            assert list(servers) == list(specs)
            assert servers["writer"] == servers["judge"]
            seen = []
            for model, server in [*(("m", s) for s in servers["writer"]), ("n", *servers["other"])]:
                seen.append(await asyncio.to_thread(ask, server.url, model=model))
            return seen

    seen = asyncio.run(run())
    assert [one["env"]["CUDA_VISIBLE_DEVICES"] for one in seen] == ["4", "5", ""]
    assert not any(alive(one["pid"]) for one in seen)
    assert sorted(log.name for log in tmp_path.glob("*.log")) == [
        "other-0.log",
        "writer-0.log",
        "writer-1.log",
    ]


def test_one_that_fails_to_start_stops_the_others(fake, tmp_path):
    specs = {"a": fake({"gpus": 0}), "b": fake({"gpus": 0, "model": "n"}, loads_s=0.5, exits=1)}

    async def run():
        async with serving(specs, [], tmp_path):
            raise AssertionError("must not begin")

    with pytest.raises(EndpointError, match="model 'n' ended before it answered"):
        asyncio.run(run())
    assert not alive(logged_pid(tmp_path / "a-0.log", "server"))


def test_one_that_is_given_up_ends_the_work(fake, tmp_path):
    specs = {"a": fake({"gpus": 0}, marker=str(tmp_path / "marker"))}

    async def run():
        async with serving(specs, [], tmp_path) as servers:
            await asyncio.to_thread(crash, servers["a"][0].url)
            await asyncio.sleep(30)

    with pytest.raises(EndpointError, match="ended 4 times"):
        asyncio.run(run())


def test_errors_of_the_work_pass_and_stop_the_servers(fake, tmp_path):
    async def run(error):
        async with serving({"a": fake({"gpus": 0})}, [], tmp_path):
            raise error

    for error in (ValueError("mine"), KeyboardInterrupt(), asyncio.CancelledError()):
        with pytest.raises(type(error)):
            asyncio.run(run(error))
        assert not alive(logged_pid(tmp_path / "a-0.log", "server"))


def test_importing_starts_and_loads_nothing_heavy():
    check = (
        "import sys, datakit.models.vllm; "
        "assert not {'aiohttp', 'vllm', 'torch'} & set(sys.modules), 'heavy'"
    )
    subprocess.run([sys.executable, "-c", check], check=True)


# vLLM itself.


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


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    """The address of a tiny model that vLLM serves as `tiny`."""
    folder = tmp_path_factory.mktemp("live")
    server = VLLMServer(tiny_spec(folder / "model"), "tiny", (), folder / "tiny.log")
    with asyncio.Runner() as runner:
        runner.run(server.start())
        yield server.url
        runner.run(server.stop())


def complete(url, prompt, **fields):
    status, body = post(url, "/completions", {"model": "tiny", "prompt": prompt} | fields)
    assert status == 200, body
    return body["choices"]


def chat(url, **fields):
    messages = [{"role": "user", "content": "Say hi."}]
    asked = {"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": 5}
    status, body = post(url, "/chat/completions", asked | fields)
    assert status == 200, body
    return body


@real
def test_vllm_answers_chats_and_texts(live):
    body = chat(live)
    assert body["usage"]["completion_tokens"] == 5
    assert body["choices"][0]["finish_reason"] == "length"
    assert (
        body["choices"][0]["message"]["content"] == chat(live)["choices"][0]["message"]["content"]
    )
    [choice] = complete(live, "The quick", max_tokens=3, temperature=0)
    assert choice["finish_reason"] == "length"
    assert choice["text"]
    drawn = chat(live, n=3, temperature=1, seed=5)["choices"]
    assert len({choice["message"]["content"] for choice in drawn}) == 3


@real
def test_vllm_gives_the_likelihood_of_what_it_says(live):
    tokens = chat(live, logprobs=True, top_logprobs=3)["choices"][0]["logprobs"]["content"]
    assert len(tokens) == 5
    for token in tokens:
        assert token["logprob"] < 0
        assert len(token["top_logprobs"]) == 3
        # At temperature 0 it says the likeliest.
        assert token["token"] == token["top_logprobs"][0]["token"]


@real
@pytest.mark.parametrize("max_tokens", [0, 1])
def test_vllm_scores_a_given_text(live, max_tokens):
    text = "The quick fox, \u00e9\u4f60 <|im_end|>"
    score = {"echo": True, "logprobs": 1, "max_tokens": max_tokens, "temperature": 0}
    [choice] = complete(live, text, **score)
    found = choice["logprobs"]
    length = len(found["tokens"]) - max_tokens
    assert choice["text"].startswith(text)
    assert (choice["text"] == text) or max_tokens
    assert found["token_logprobs"][0] is None
    assert all(value < 0 for value in found["token_logprobs"][1:])
    assert len(found["token_logprobs"]) == len(found["text_offset"]) == len(found["tokens"])
    # Offsets are in characters; a token that ends inside a character has an empty text.
    offsets = found["text_offset"][:length]
    assert offsets == sorted(offsets)
    assert "".join(found["tokens"][:length]) == text
    ends = [*offsets[1:], len(text)]
    assert [text[a:b] for a, b in zip(offsets, ends, strict=True)] == found["tokens"][:length]


@real
def test_vllm_scores_token_ids_as_it_scores_their_text(live):
    text = "The quick fox"
    root = live.removesuffix("/v1")
    status, body = post(root, "/tokenize", {"model": "tiny", "prompt": text})
    assert status == 200
    ids = body["tokens"]
    score = {"echo": True, "logprobs": 1, "max_tokens": 0}
    [of_text] = complete(live, text, **score)
    [of_ids, of_two] = complete(live, [ids, ids[:2]], **score)
    assert of_ids["logprobs"]["tokens"] == of_text["logprobs"]["tokens"]
    expected = of_text["logprobs"]["token_logprobs"][1:]
    # Batched sums in bfloat16 may differ in their last bits.
    assert of_ids["logprobs"]["token_logprobs"][1:] == pytest.approx(expected, abs=0.05)
    assert of_two["logprobs"]["token_logprobs"][1:] == pytest.approx(expected[:1], abs=0.05)


@real
def test_vllm_answers_in_the_schema_asked_for(live):
    properties = {"verdict": {"enum": ["A", "B"]}, "sure": {"type": "boolean"}}
    schema = {"type": "object", "properties": properties, "required": ["verdict", "sure"]}
    schema["additionalProperties"] = False
    wanted = {"name": "answer", "schema": schema, "strict": True}
    asked = {"type": "json_schema", "json_schema": wanted}
    # A random model likes white space, hence the room.
    body = chat(live, response_format=asked, max_tokens=500, temperature=1, n=4, seed=1)
    said = [c["message"]["content"] for c in body["choices"] if c["finish_reason"] == "stop"]
    assert said
    for text in said:
        verdict = json.loads(text)
        assert verdict["verdict"] in ("A", "B")
        assert verdict["sure"] in (True, False)


@real
def test_vllm_refuses_what_is_wrong(live):
    long = {"model": "tiny", "prompt": "a b " * 2000, "max_tokens": 1}
    status, body = post(live, "/completions", long)
    assert status == 400
    assert "maximum context length" in body["error"]["message"]
    assert post(live, "/completions", {"model": "other", "prompt": "x"})[0] == 404


@real
def test_vllm_does_not_take_an_argument_that_it_does_not_know(tmp_path):
    spec = tiny_spec(tmp_path / "model")
    wrong = spec.model_copy(update={"args": {"max_modle_len": 1024}})
    with pytest.raises(InputError, match=r"does not take the args .*--max-modle-len=1024"):
        asyncio.run(VLLMServer(wrong, "tiny", (), tmp_path / "m.log").start())
    long = spec.model_copy(update={"args": {"max_model_len": 100_000}})
    with pytest.raises(InputError, match=r"User-specified max_model_len \(100000\)"):
        asyncio.run(VLLMServer(long, "tiny", (), tmp_path / "m.log").start())


def processes_below(pid):
    """The process and all that come from it, with their names."""
    listed = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True)
    rows = [line.split(None, 2) for line in listed.stdout.splitlines()[1:]]
    found = {pid: ""}
    for _ in rows:
        found |= {int(row[0]): row[2] for row in rows if int(row[1]) in found}
    return found


@real
def test_two_vllm_models_run_together_and_one_comes_back_after_a_crash(tmp_path):
    specs = {
        "writer": tiny_spec(tmp_path / "a", seed=1),
        "judge": tiny_spec(tmp_path / "b", seed=2),
    }

    async def said(server, model):
        asked = {"model": model, "prompt": "The quick", "max_tokens": 8, "temperature": 0}
        status, body = await asyncio.to_thread(post, server.url, "/completions", asked)
        assert status == 200
        return body["choices"][0]["text"]

    async def run():
        async with serving(specs, [], tmp_path) as servers:
            [writer], [judge] = servers.values()
            before = await said(writer, specs["writer"].model)
            assert before != await said(judge, specs["judge"].model)
            ours = processes_below(os.getpid())
            guard = min(pid for pid, name in ours.items() if "_guard()" in name)
            names = processes_below(guard)
            [engine] = [pid for pid, name in names.items() if name.startswith("VLLM::EngineCore")]
            os.kill(engine, signal.SIGKILL)
            await asyncio.to_thread(wait_for, lambda: not alive(guard), 60)
            await asyncio.sleep(0.5)
            for server in (writer, judge):
                await server.until_up()
            assert await said(writer, specs["writer"].model) == before
            assert await said(judge, specs["judge"].model) != before
            return [*ours, *processes_below(os.getpid())]

    pids = asyncio.run(run())
    assert not [pid for pid in pids if pid != os.getpid() and alive(pid)]
