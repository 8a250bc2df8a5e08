"""Local vLLM servers: started, watched and stopped.

vLLM lives in an environment of its own and is spoken to over HTTP. Between us and each server
stands a guard, a process of a few megabytes: however we end, kill -9 included, it stops the server
with all of its worker processes, so that no GPU stays taken.
"""

import asyncio
import contextlib
import inspect
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import JsonValue

from datakit.errors import DatakitError, EndpointError, InputError, OutsideError
from datakit.loop import gather
from datakit.models.gpus import assign, server_key
from datakit.models.specs import VLLMSpec
from datakit.text import shorten

if TYPE_CHECKING:
    from aiohttp import web

RESTARTS = 3
RESTARTS_WITHIN_S = 600.0
"""A server that ends more often than RESTARTS times in this span is given up."""

_POLL_S = 0.1
_KILL_S = 10.0
_TAIL_LINES = 15
_TAIL_BYTES = 64 * 1024
_SECRET = re.compile("KEY|TOKEN(?!IZER)|SECRET|PASSW|CREDENTIAL|AUTH", re.IGNORECASE)
# With or without vLLM's prefix: "(EngineCore pid=7) ERROR 11-21 14:51:44 [core.py:12]   File ...".
_FRAME = re.compile(r'(\([^)]*\) )?((ERROR|INFO|WARNING) [^]]*\] )?(  File "|  warnings|    |\s*$)')


def server_command(spec: VLLMSpec, name: str, port: int) -> list[str]:
    """The command line of one server.

    Of `args`, True is a bare flag, False `--no-flag`, a list several values, a mapping JSON, and
    None left out. Raises InputError where there is no such Python or folder.
    """
    python = shutil.which(spec.python or sys.executable)
    if python is None:
        raise InputError(
            f"there is no Python at {spec.python!r} (python of model {spec.model!r}); name the one "
            "of the environment that holds vLLM"
        )
    folder = Path(spec.model)
    if folder.is_absolute() and not folder.exists():
        raise InputError(f"there is no model at {spec.model!r}; check its path")
    # Not the `vllm` script, which some builds ship broken. Links stay: an environment's Python is
    # one, and what it links to knows nothing of the environment.
    module = "vllm.entrypoints.openai.api_server"
    command = [str(Path(python).absolute()), "-m", module, f"--model={spec.model}"]
    command += [f"--served-model-name={name}", "--host=127.0.0.1", f"--port={port}"]
    if spec.revision:
        command.append(f"--revision={spec.revision}")
    if spec.tensor_parallel > 1:
        command.append(f"--tensor-parallel-size={spec.tensor_parallel}")
    for key, value in spec.args.items():
        command += _rendered(key.replace("_", "-"), value)
    return command


def _rendered(flag: str, value: JsonValue) -> list[str]:
    def text(one: JsonValue) -> str:
        return one if isinstance(one, str) else json.dumps(one)

    match value:
        case None:
            return []
        case bool():
            return [f"--{flag}" if value else f"--no-{flag}"]
        case list():
            return [f"--{flag}", *map(text, value)] if value else []
        case _:
            return [f"--{flag}={text(value)}"]


def server_environment(spec: VLLMSpec, gpus: Sequence[str]) -> dict[str, str]:
    """The variables of one server: ours without keys and tokens, its GPUs, what the spec sets.

    Of the tokens it is given HF_TOKEN, for models that are not open to all.
    """
    ours = {
        name: value
        for name, value in os.environ.items()
        if name in ("HF_TOKEN", "HF_TOKEN_PATH") or not _SECRET.search(name)
    }
    if spec.python:
        # They point into our environment, not into its own.
        for name in ("PYTHONPATH", "PYTHONHOME"):
            ours.pop(name, None)
    # Empty hides all GPUs. The safe path keeps a file of the current folder (openai.py, say) from
    # hiding a package of vLLM's.
    own = {"CUDA_VISIBLE_DEVICES": ",".join(gpus), "PYTHONSAFEPATH": "1"}
    quiet = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    return ours | own | quiet | spec.environment


def _guard() -> None:
    """Start the server of argv[3:], pass SIGTERM on to it, and stop it when argv[1] is gone.

    Runs as a program of its own from this source. It asks the kernel who its parent is: a pipe
    would be held open by whatever the parent has forked, and a parent-death signal reaches only the
    server itself, not its workers, and comes when the thread that started it ends. The server leads
    a process group, so that what outlives it is found. A second signal kills at once.
    """
    import math
    import os
    import signal
    import sys
    import time

    parent, grace_s, command = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]
    heard = {signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
    signal.pthread_sigmask(signal.SIG_BLOCK, heard)
    server = os.posix_spawn(command[0], command, os.environ, setpgroup=0, setsigmask=())
    deadline = math.inf
    while not (ended := os.waitpid(server, os.WNOHANG))[0]:
        if time.monotonic() >= deadline:
            os.killpg(server, signal.SIGKILL)
        came = signal.sigtimedwait(heard, 0.5)
        told = came is not None and came.si_signo != signal.SIGCHLD
        if deadline < math.inf:
            deadline = 0 if told else deadline
        elif told or os.getppid() != parent:
            os.kill(server, signal.SIGTERM)
            deadline = time.monotonic() + grace_s
    # Workers that a crashed server has left behind still hold its GPUs.
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server, number)
            until = time.monotonic() + 2
            while time.monotonic() < until:
                os.killpg(server, 0)
                time.sleep(0.05)
        except ProcessLookupError:
            break
    code = os.waitstatus_to_exitcode(ended[1])
    sys.exit(code if code >= 0 else 128 - code)


class VLLMServer:
    """One replica of a model; it runs from `start` to `stop`.

    name: the model's name in requests. gpus: as CUDA_VISIBLE_DEVICES names them. log: the file that
    takes what it prints, made anew. grace_s: how long it may take to stop before it is killed.
    """

    def __init__(
        self, spec: VLLMSpec, name: str, gpus: Sequence[str], log: Path, grace_s: float = 20.0
    ) -> None:
        self.log = log
        self._spec = spec
        self._name = name
        self._gpus = gpus
        self._grace_s = grace_s
        self._process: subprocess.Popen[bytes] | None = None
        self._held: socket.socket | None = None
        self._refusing: web.AppRunner | None = None
        self._port = 0
        self._log_start = 0
        self._up = asyncio.Event()
        self._ended_at: list[float] = []

    @property
    def url(self) -> str:
        """The address up to `/v1`; the same after a restart."""
        assert self._port, "a server has an address once it is started"
        return f"http://127.0.0.1:{self._port}/v1"

    async def start(self) -> None:
        """Start it and return when it answers; what fails to start is stopped.

        Raises InputError for a Python without vLLM and for arguments that it does not take, and
        EndpointError where it ends or `start_timeout_s` passes before it answers.
        """
        # The port stays bound here, never listened on: it is nobody else's while the server loads
        # or is started again. vLLM may bind it too, since both ask for that; we do so only after
        # binding, so that no two programs are given the same free port.
        self._held = socket.socket()
        try:
            self._held.bind(("127.0.0.1", 0))
            self._held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._port = self._held.getsockname()[1]
            self.log.parent.mkdir(parents=True, exist_ok=True)
            self.log.unlink(missing_ok=True)
            self._launch()
            if not await self._answers():
                raise self._failed("ended before it answered")
        except BaseException:
            await self.stop()
            raise

    async def watch(self) -> None:
        """Start it again whenever it ends, until cancelled or until `stop`.

        Raises EndpointError where it ends more than RESTARTS times within RESTARTS_WITHIN_S
        seconds, or comes back too slowly.
        """
        while self._process is not None:
            if self._process.poll() is None:
                await asyncio.sleep(_POLL_S)
                continue
            self._up.clear()
            now = time.monotonic()
            self._ended_at = [at for at in self._ended_at if at > now - RESTARTS_WITHIN_S] + [now]
            if len(self._ended_at) > RESTARTS:
                span = f"{len(self._ended_at)} times in {RESTARTS_WITHIN_S / 60:g} minutes"
                raise self._failed(f"ended {span}, the last time")
            self._launch()
            await self._answers()

    async def until_up(self) -> None:
        """Return when it answers: at once, unless it is being started again."""
        await self._up.wait()

    async def refuse(self, why: BaseException) -> None:
        """Stop it, and answer every request at its address with 404 until `stop`.

        Whoever asks it works in another thread or process, and would else wait for its return.
        """
        from aiohttp import web

        said = {"error": {"message": shorten(f"the server is given up: {why}", 500)}}

        async def refused(request: web.Request) -> web.Response:
            await request.read()
            return web.json_response(said, status=404)

        await self._end()
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", refused)
        self._refusing = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await self._refusing.setup()
        assert self._held is not None
        await web.SockSite(self._refusing, self._held).start()

    async def stop(self) -> None:
        """Stop it with all its processes; does nothing where it does not run.

        It is killed where it takes longer than the grace time, and at once when cancelled.
        """
        try:
            await self._end()
            if self._refusing is not None:
                await self._refusing.cleanup()
        finally:
            if self._held is not None:
                self._held.close()

    async def _end(self) -> None:
        """Stop its processes; its port stays ours."""
        process, self._process = self._process, None
        self._up.clear()
        try:
            if process is not None and process.poll() is None:
                process.terminate()
                await asyncio.to_thread(process.wait)
        finally:
            if process is not None and process.poll() is None:
                process.terminate()
                # One that hangs in a driver cannot be killed, and must not hang us.
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=_KILL_S)

    def _launch(self) -> None:
        command = server_command(self._spec, self._name, self._port)
        source = f"{inspect.getsource(_guard)}\n_guard()"
        guard = [sys.executable, "-I", "-S", "-c", source, str(os.getpid()), str(self._grace_s)]
        with self.log.open("ab") as log:
            self._log_start = log.tell()
            self._process = subprocess.Popen(
                guard + command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=server_environment(self._spec, self._gpus),
                # Ctrl-C is for us: we stop the server when we have stopped asking it.
                start_new_session=True,
            )

    async def _answers(self) -> bool:
        """Whether it answers (True) or has ended (False); EndpointError when the time is up."""
        import aiohttp

        url, process = self.url.removesuffix("/v1") + "/health", self._process
        until = time.monotonic() + self._spec.start_timeout_s
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as http:
            while process is not None and process.poll() is None:
                with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError):
                    async with http.get(url) as answer:
                        if answer.status == 200:
                            self._up.set()
                            return True
                if time.monotonic() > until:
                    waited = f"{self._spec.start_timeout_s:g} s (start_timeout_s)"
                    raise self._failed(f"did not answer within {waited}")
                await asyncio.sleep(_POLL_S)
        return False

    def _failed(self, what: str) -> DatakitError:
        """The error to raise, with the end of the log."""
        code = self._process.poll() if self._process is not None else None
        lines, model = self._last_lines(), f"model {self._spec.model!r}"
        if any("No module named 'vllm'" in line for line in lines):
            return InputError(
                f"there is no vLLM in the environment of {self._spec.python or sys.executable!r} "
                f"(python of {model}); `datakit doctor --install-vllm DIR` builds one, then set "
                "python: DIR/bin/python"
            )
        if code == 2 and lines and "error:" in lines[-1]:
            return InputError(f"vLLM does not take the args of {model}: {lines[-1]}")
        if code is not None:
            what += f" with exit code {code}"
            what += " (killed; was there enough memory?)" if code == 128 + signal.SIGKILL else ""
        shown = lines[-_TAIL_LINES:]
        said = f"the vLLM server of {model} {what}; {str(self.log)!r} ends:"
        # What vLLM calls invalid, a folder or an argument's value, will not heal by itself.
        wrong = code == 1 and any("ValidationError: " in line for line in shown)
        return (InputError if wrong else EndpointError)("\n  ".join([said, *shown]))

    def _last_lines(self) -> list[str]:
        """The end of the log since the last launch, without tracebacks' frames, safe to show."""
        with self.log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(self._log_start, size - _TAIL_BYTES))
            text = file.read().decode("utf-8", "replace")
        raw = (line for line in text.splitlines() if not _FRAME.match(line))
        return [line for one in raw if (line := shorten(one))]


@contextlib.asynccontextmanager
async def serving(
    specs: Mapping[str, VLLMSpec], names: Sequence[str], folder: Path
) -> AsyncGenerator[dict[str, list[VLLMServer]]]:
    """Start the servers of all roles at once, watch them, and stop them at the end.

    specs: the roles of one phase. names: the GPUs they may take. folder: of the logs, `ROLE-N.log`.
    Yields the replicas of each role, which take requests for `spec.model`. A server that is given
    up refuses all requests from then on. Raises what `start` and `assign` raise, and at the end the
    error of a server that was given up, instead of what it has led to.
    """
    places = assign(specs, names)
    made: dict[str, list[VLLMServer]] = {}
    for role, spec in specs.items():
        if server_key(spec) not in made:
            safe = re.sub(r"[^\w.-]", "_", role)
            made[server_key(spec)] = [
                VLLMServer(spec, spec.model, gpus, folder / f"{safe}-{number}.log")
                for number, gpus in enumerate(places[role])
            ]
    every = [server for replicas in made.values() for server in replicas]
    errors: list[Exception] = []

    async def watch(server: VLLMServer) -> None:
        try:
            await server.watch()
        except Exception as error:
            errors.append(error)
            await server.refuse(error)

    try:
        await gather([server.start() for server in every])
        watching = [asyncio.create_task(watch(server)) for server in every]
        try:
            yield {role: made[server_key(spec)] for role, spec in specs.items()}
        except OutsideError as error:
            raise (errors or [error])[0] from None
        finally:
            for task in watching:
                task.cancel()
            await asyncio.gather(*watching, return_exceptions=True)
        if errors:
            raise errors[0]
    finally:
        await asyncio.gather(*(server.stop() for server in every))
