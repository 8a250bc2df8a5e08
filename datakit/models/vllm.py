"""Local vLLM servers: which run together, on which GPUs; started, watched and stopped.

vLLM lives in an environment of its own and is spoken to over HTTP. Between us and each server
stands a guard, a process of a few megabytes: however we end, kill -9 included, it stops the server
with all of its worker processes, so that no GPU stays taken.
"""

import asyncio
import contextlib
import inspect
import itertools
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

from pydantic import JsonValue

from datakit.errors import DatakitError, EndpointError, InputError
from datakit.loop import gather
from datakit.models.specs import VLLMSpec
from datakit.text import canonical_json, shorten

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
_ARGUMENT = re.compile("[A-Za-z][A-Za-z0-9_-]*")
_OURS = re.compile("model|revision|tensor-parallel-size|served-model-name|host|port|uds|api-key")


def gpu_names() -> tuple[str, ...]:
    """The GPUs that servers may take, as CUDA_VISIBLE_DEVICES names them.

    Those that CUDA_VISIBLE_DEVICES lists, else all that nvidia-smi finds; of these the first
    `$DATAKIT_GPUS`, where that is set. Where none are listed, `$DATAKIT_GPUS` is believed: it is
    how a machine without nvidia-smi says what it has room for. Raises InputError where it is not a
    number, or larger than the list.
    """
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    # CUDA reads the list up to the first name that is none.
    given = (name.strip() for name in (listed or "").split(","))
    visible = tuple(itertools.takewhile(lambda name: name not in ("", "-1", "NoDevFiles"), given))
    room = os.environ.get("DATAKIT_GPUS", "")
    if not room:
        count = _nvidia_gpus() if listed is None else 0
        return visible or tuple(str(number) for number in range(count))
    if not re.fullmatch("[0-9]{1,4}", room):
        raise InputError(f"DATAKIT_GPUS is {shorten(room)!r}; give a number of GPUs, 0 or more")
    if visible and int(room) > len(visible):
        raise InputError(
            f"DATAKIT_GPUS is {room}, and CUDA_VISIBLE_DEVICES lists {len(visible)} "
            f"({shorten(listed or '')!r}); lower the one or lengthen the other"
        )
    return (visible or tuple(str(number) for number in range(int(room))))[: int(room)]


def visible_gpus() -> int:
    """How many GPUs servers may take; see `gpu_names`."""
    return len(gpu_names())


def _nvidia_gpus() -> int:
    """How many GPUs nvidia-smi lists; none where it is absent or finds no driver."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return 0
    try:
        done = subprocess.run([program, "-L"], capture_output=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    lines = done.stdout.decode("utf-8", "replace").splitlines()
    return sum(line.startswith("GPU ") for line in lines) if done.returncode == 0 else 0


def phases(specs: Mapping[str, VLLMSpec], gpus: int) -> list[list[str]]:
    """The roles that run together, phase after phase; each role is in one.

    specs: by role, in the order of first use. A model joins the first phase that has room for all
    of its replicas; one that takes no GPU joins the newest phase, and roles that one server can
    serve share it. Raises InputError for a model that needs more than `gpus`.
    """
    packed: list[list[str]] = []
    free: list[int] = []
    known: dict[str, int] = {}
    for role, spec in specs.items():
        need, server = spec.gpus_each * spec.replicas, _server_key(spec)
        if need > gpus:
            raise InputError(_too_many(role, spec, gpus))
        if server in known:
            phase, need = known[server], 0
        elif need == 0:
            phase = max(len(packed) - 1, 0)
        else:
            fits = (number for number, left in enumerate(free) if need <= left)
            phase = next(fits, len(packed))
        if phase == len(packed):
            packed.append([])
            free.append(gpus)
        packed[phase].append(role)
        free[phase] -= need
        known[server] = phase
    return packed


def assign(specs: Mapping[str, VLLMSpec], names: Sequence[str]) -> dict[str, list[tuple[str, ...]]]:
    """The GPUs of each replica of each role of one phase; roles that share a server share them.

    Raises InputError where they need more GPUs than there are names.
    """
    left = list(names)
    taken: dict[str, list[tuple[str, ...]]] = {}
    for role, spec in specs.items():
        server, each = _server_key(spec), spec.gpus_each
        if server in taken:
            continue
        if each * spec.replicas > len(left):
            raise InputError(_too_many(role, spec, len(left)))
        taken[server] = [tuple(left[n * each : (n + 1) * each]) for n in range(spec.replicas)]
        del left[: each * spec.replicas]
    return {role: taken[_server_key(spec)] for role, spec in specs.items()}


def _server_key(spec: VLLMSpec) -> str:
    """Equal for specs that the same servers can serve: sampling and the like are not theirs."""
    fields = {"model", "revision", "python", "tensor_parallel", "replicas", "args", "environment"}
    return canonical_json(spec.model_dump(mode="json", include=fields) | {"gpus": spec.gpus_each})


def _too_many(role: str, spec: VLLMSpec, gpus: int) -> str:
    each, fitting = spec.gpus_each, gpus // spec.gpus_each
    said = (
        f"models.{role} needs {each * spec.replicas} GPUs (replicas {spec.replicas} × {each}), "
        f"and there are {gpus}"
    )
    if fitting:
        return f"{said}; set models.{role}.replicas to {fitting} or less"
    field = "tensor_parallel" if spec.gpus is None else "gpus"
    return (
        f"{said}; lower models.{role}.{field}, or say with DATAKIT_GPUS how many there are; "
        "a vLLM for CPUs takes gpus: 0"
    )


def server_command(spec: VLLMSpec, name: str, port: int) -> list[str]:
    """The command line of one server.

    Raises InputError where there is no such Python or folder, and for arguments that cannot be.
    Of `args`, True is a bare flag, False `--no-flag`, a list several values, a mapping JSON, and
    None left out.
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
        flag = key.replace("_", "-")
        if not _ARGUMENT.fullmatch(key):
            raise InputError(
                f"args of model {spec.model!r}: {key!r} is not the name of an engine argument; "
                "write it as max_model_len, without dashes before it"
            )
        if _OURS.fullmatch(flag):
            raise InputError(
                f"args of model {spec.model!r}: leave out {key!r}; datakit sets it, from the "
                "fields model, revision and tensor_parallel"
            )
        command += _rendered(flag, value)
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
        """Return when it answers: at once, unless it is being started again.

        For callers that would else use up their retries while a large model loads.
        """
        await self._up.wait()

    async def stop(self) -> None:
        """Stop it with all its processes; does nothing where it does not run.

        It is killed where it takes longer than the grace time, and at once when cancelled.
        """
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
            if self._held is not None:
                self._held.close()

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
    Yields the replicas of each role, which take requests for `spec.model`. Raises what `start` and
    `assign` raise; a server that is given up cancels the body and raises its EndpointError.
    """
    places = assign(specs, names)
    made: dict[str, list[VLLMServer]] = {}
    for role, spec in specs.items():
        if _server_key(spec) not in made:
            safe = re.sub(r"[^\w.-]", "_", role)
            made[_server_key(spec)] = [
                VLLMServer(spec, spec.model, gpus, folder / f"{safe}-{number}.log")
                for number, gpus in enumerate(places[role])
            ]
    every = [server for replicas in made.values() for server in replicas]
    try:
        await gather([server.start() for server in every])
        async with asyncio.TaskGroup() as group:
            watching = [group.create_task(server.watch()) for server in every]
            yield {role: made[_server_key(spec)] for role, spec in specs.items()}
            for task in watching:
                task.cancel()
    except BaseExceptionGroup as errors:
        first: BaseException = errors
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise first from None
    finally:
        await asyncio.gather(*(server.stop() for server in every))
