"""Which local models are up together, and on which GPUs."""

import itertools
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence

from datakit.errors import InputError
from datakit.models.specs import VLLMSpec
from datakit.text import canonical_json, shorten


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
        need, server = spec.gpus_each * spec.replicas, server_key(spec)
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
        server, each = server_key(spec), spec.gpus_each
        if server in taken:
            continue
        if each * spec.replicas > len(left):
            raise InputError(_too_many(role, spec, len(left)))
        taken[server] = [tuple(left[n * each : (n + 1) * each]) for n in range(spec.replicas)]
        del left[: each * spec.replicas]
    return {role: taken[server_key(spec)] for role, spec in specs.items()}


def server_key(spec: VLLMSpec) -> str:
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
