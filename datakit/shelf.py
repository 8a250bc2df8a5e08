"""Putting versions in their place: drafts, renames, and the pointer to the newest.

A folder appears whole under its number or not at all; what a killed run left is swept away later.
"""

import contextlib
import errno
import json
import shutil
import time
import uuid
from pathlib import Path

from datakit.store import write_json
from datakit.versions import dataset_folder, partial_numbers, version_numbers

DRAFT_LIFE_S = 86_400.0
"""A draft that is older than a day belongs to no run."""


def move(folder: Path, target: Path) -> None:
    """Rename a folder; one that is taken is FileExistsError, whatever the system calls it."""
    try:
        folder.rename(target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise FileExistsError(error.errno, "taken", str(folder), None, str(target)) from error
        raise


def replace(folder: Path, target: Path) -> None:
    """Put a folder where another may be; of two that do so at once, the last one stays."""
    target.parent.mkdir(exist_ok=True)
    while True:
        aside = folder.with_name(f".draft-{uuid.uuid4().hex}")
        with contextlib.suppress(FileNotFoundError):
            target.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)
        with contextlib.suppress(FileExistsError):
            move(folder, target)
            return


def next_partial(outputs: Path, name: str, version: str) -> str:
    """The number of the next pre-release of a version."""
    numbers = [
        int(one.rpartition(".")[2])
        for one in partial_numbers(outputs, name)
        if one.startswith(f"{version}-")
    ]
    return f"{version}-partial.{max(numbers, default=0) + 1}"


def sweep(home: Path) -> None:
    """Remove drafts that a killed run left behind a day ago or longer."""
    for draft in home.glob(".draft-*"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - draft.stat().st_mtime > DRAFT_LIFE_S:
                shutil.rmtree(draft, ignore_errors=True)


def point_to_latest(outputs: Path, name: str) -> None:
    """Make `latest.json` name the newest version, also where another run publishes meanwhile."""
    path = dataset_folder(outputs, name) / "latest.json"
    while known := version_numbers(outputs, name):
        wanted = {"version": known[-1]}
        if path.is_file() and json.loads(path.read_text()) == wanted:
            return
        write_json(path, wanted)
