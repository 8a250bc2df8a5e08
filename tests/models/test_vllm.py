"""Local servers: started, watched and stopped, with a program that stands in for vLLM."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error

import pytest
from local_models import alive, fake_python, logged_pid, post, spec_of, wait_for
from pydantic import ValidationError

from datakit.errors import EndpointError, InputError
from datakit.models import vllm
from datakit.models.vllm import VLLMServer, server_command, server_environment, serving


@pytest.fixture
def fake(tmp_path):
    """Makes specs whose Python is the stand-in; keyword arguments are what it does."""
    python = fake_python(tmp_path)

    def spec(fields=None, **does):
        return spec_of(python=python, environment={"FAKE": json.dumps(does)}, **fields or {})

    return spec


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


@contextlib.asynccontextmanager
async def started(spec, log, **options):
    server = VLLMServer(spec, "m", (), log, **options)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


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


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"port": 1}, "leave out 'port'; datakit sets it"),
        ({"tensor_parallel_size": 1}, "leave out 'tensor_parallel_size'; datakit sets it"),
        ({"tensor-parallel-size": 1}, "leave out 'tensor-parallel-size'"),
        ({"model": "m"}, "leave out 'model'"),
        ({"hf_token": "x"}, "leave out 'hf_token'; a recipe holds no secrets"),
        ({"data_parallel_size_local": 1}, "runs each server as a whole on this machine"),
        ({"nnodes": 2}, "runs each server as a whole on this machine"),
        ({"--dtype": "half"}, "not the name of an engine argument"),
        ({"a b": 1}, "not the name of an engine argument"),
        ({"": 1}, "not the name of an engine argument"),
        ({"x=y": 1}, "not the name of an engine argument"),
        ({"max_model_len": 9, "max-model-len": 8}, "'max-model-len' is given twice"),
        ({"pipeline_parallel_size": 0}, "pipeline_parallel_size is 0; give a number"),
    ],
)
def test_arguments_that_cannot_be_are_refused_with_the_recipe(args, said):
    with pytest.raises(ValidationError, match=said):
        spec_of(args=args)


def test_gpus_are_counted_from_all_that_is_parallel():
    assert spec_of(tensor_parallel=2).gpus_each == 2
    both = {"pipeline-parallel-size": 2, "data_parallel_size": 3}
    assert spec_of(tensor_parallel=2, args=both).gpus_each == 12
    assert spec_of(tensor_parallel=2, args=both, gpus=4).gpus_each == 4


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


def test_one_that_is_given_up_refuses_requests_and_its_error_is_raised_at_the_end(fake, tmp_path):
    specs = {"a": fake({"gpus": 0}, marker=str(tmp_path / "marker"))}
    asked = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}

    def refusal(url):
        with contextlib.suppress(OSError):
            return post(url, "/chat/completions", asked)

    async def run(error):
        async with serving(specs, [], tmp_path) as servers:
            url = servers["a"][0].url
            await asyncio.to_thread(crash, url)
            status, body = await asyncio.to_thread(wait_for, lambda: refusal(url))
            assert status == 404
            assert (
                "the server is given up: the vLLM server of model 'm'" in body["error"]["message"]
            )
            if error:
                raise error

    for error, raised, said in (
        (None, EndpointError, "ended 4 times"),
        (EndpointError("404"), EndpointError, "ended 4 times"),
        (ValueError("mine"), ValueError, "mine"),
    ):
        (tmp_path / "marker").unlink(missing_ok=True)
        with pytest.raises(raised, match=said):
            asyncio.run(run(error))


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
