"""Which model a local folder holds: a hash of its weights, configuration and tokenizer.

Never its path, so an overwritten checkpoint is another model and a moved one is the same.
"""

import hashlib
import json
import os
from functools import cache
from pathlib import Path

_PARTS = (".safetensors", ".bin", ".pt", ".gguf", ".json", ".txt", ".model", ".jinja", ".py")


def default_state() -> Path:
    """`$DATAKIT_STATE`, else `datakit` in the user's state folder."""
    named = os.environ.get("DATAKIT_STATE")
    if named:
        return Path(named)
    home = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(home) / "datakit"


def folder_identity(folder: Path) -> str:
    """`sha:<hex>` over the names and bytes of the folder's model files."""
    files = sorted(p for p in folder.rglob("*") if p.suffix in _PARTS and p.is_file())
    whole = hashlib.blake2b(digest_size=16)
    for path in files:
        stat = path.stat()
        name = path.relative_to(folder).as_posix()
        file_hash = _file_hash(str(path.resolve()), stat.st_size, stat.st_mtime_ns)
        whole.update(f"{name}\0{file_hash}\n".encode())
    return f"sha:{whole.hexdigest()}"


@cache
def _file_hash(path: str, size: int, mtime_ns: int) -> str:
    """Hash of a file's bytes, remembered on disk for as long as size and time stand."""
    note = default_state() / "file_hashes.json"
    try:
        known: dict[str, list[object]] = json.loads(note.read_text())
    except (OSError, ValueError):
        known = {}
    if known.get(path, [])[:2] == [size, mtime_ns]:
        return str(known[path][2])
    with Path(path).open("rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    known[path] = [size, mtime_ns, found]
    note.parent.mkdir(parents=True, exist_ok=True)
    draft = note.with_suffix(f".{os.getpid()}")
    draft.write_text(json.dumps(known))
    draft.replace(note)
    return found
