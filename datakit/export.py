"""Published configs: from record tables to Parquet files that any reader takes.

`default` is the recipe's last kind; for pairs that is TRL's explicit conversational form (prompt,
chosen and rejected as lists of role and content). `ratings` holds all candidates with their
verdicts. Files are written by pyarrow, with page index and content-defined chunks and without
notes of another library, so that old readers and the Hub's viewer take them.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
from numpy.typing import NDArray

from datakit.ids import ID_BYTES
from datakit.records import Pair, Record
from datakit.tables import each_record, pieces
from datakit.versions import PublishedFile, Version, flatten

if TYPE_CHECKING:
    import pyarrow.parquet as pq

ROW_GROUP = 10_000

HASHED = np.dtype([("id", f"S{ID_BYTES}"), ("hash", "S16")])
"""A published row: its id and the hash of all that stands in it."""

Hashes = NDArray[np.void]

_WIDTH = 2 * HASHED.itemsize


def published(
    kind: type[Record], frame: pl.DataFrame, measures: list[str], labels: list[str]
) -> pl.DataFrame:
    """A record table as one config publishes it: the row's own fields first."""
    flat = flatten(kind, frame, measures, labels)
    first = ["id", *kind.own]
    if kind is Pair:
        keys = [row.pair_key for row in each_record(Pair, frame)]
        flat = flat.with_columns(pl.Series("pair_key", keys, dtype=pl.String()))
        first = ["id", "pair_key", *kind.own]
    return flat.select(*first, pl.exclude(first))


def row_hashes(frame: pl.DataFrame) -> Hashes:
    """The packed id and the hash of every row: blake2b over its JSON, columns in name order."""
    names = sorted(frame.columns)
    found: list[bytes] = []
    for piece in pieces(frame.select(names)):
        lines = piece.write_ndjson().encode().splitlines()
        for row_id, line in zip(piece["id"].to_list(), lines, strict=True):
            found += [bytes.fromhex(row_id), hashlib.blake2b(line, digest_size=16).digest()]
    return np.frombuffer(b"".join(found), HASHED)


def config_hashes(version: Version, config: str) -> Hashes:
    """`row_hashes` of a published config, read some rows at a time."""
    files = [file for file in version.manifest.files if file.config == config]
    frames = (
        pl.scan_parquet(version.folder / file.path).slice(start, ROW_GROUP).collect()
        for file in files
        for start in range(0, file.rows, ROW_GROUP)
    )
    return np.concatenate([np.zeros(0, HASHED), *map(row_hashes, frames)])


class ConfigWriter:
    """Writes one config into `<folder>/<config>/<split>-00000-of-00001.parquet`, batch by batch."""

    def __init__(self, folder: Path, config: str) -> None:
        self._folder = folder
        self._config = config
        self._writers: dict[str, pq.ParquetWriter] = {}
        self._rows: dict[str, int] = {}
        self._hashes = [np.zeros(0, HASHED)]

    def write(self, frame: pl.DataFrame) -> None:
        """Rows in order; each goes to the file of its column `split`."""
        import pyarrow.parquet as pq
        from pyarrow import default_memory_pool

        self._hashes.append(row_hashes(frame))
        for (split,), part in frame.group_by("split", maintain_order=True):
            table = part.to_arrow()
            name = str(split)
            if name not in self._writers:
                path = self._folder / self._config / f"{name}-00000-of-00001.parquet"
                path.parent.mkdir(parents=True, exist_ok=True)
                self._writers[name] = pq.ParquetWriter(
                    path,
                    table.schema,
                    # What Parquet itself says of the columns: not every reader knows Arrow's
                    # `large_` types, which polars has.
                    store_schema=False,
                    compression="zstd",
                    write_page_index=True,
                    use_content_defined_chunking=True,
                )
            self._writers[name].write_table(table, row_group_size=ROW_GROUP)
            self._rows[name] = self._rows.get(name, 0) + part.height
        # The pool keeps what it once had, as if the next batch were as large.
        default_memory_pool().release_unused()

    def close(self) -> tuple[list[PublishedFile], Hashes]:
        """The files, and the hashes of all rows written."""
        files: list[PublishedFile] = []
        for split, writer in sorted(self._writers.items()):
            writer.close()
            name = f"{self._config}/{split}-00000-of-00001.parquet"
            files.append(described(self._folder, name, self._config, split, self._rows[split]))
        return files, np.concatenate(self._hashes)


def write_frames(path: Path, frames: Iterable[pl.DataFrame]) -> None:
    """Write frames of one schema, at least one of them, into one file as they come."""
    import pyarrow.parquet as pq

    writer: pq.ParquetWriter | None = None
    for frame in frames:
        table = frame.to_arrow()
        writer = writer or pq.ParquetWriter(
            path, table.schema, store_schema=False, compression="zstd"
        )
        writer.write_table(table)
    assert writer is not None
    writer.close()


def described(folder: Path, name: str, config: str, split: str, rows: int) -> PublishedFile:
    """The manifest's line for a file that is written."""
    path = folder / name
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return PublishedFile(
        path=name, config=config, split=split, rows=rows, bytes=path.stat().st_size, sha256=sha256
    )


def dataset_digest(hashes: Iterable[tuple[str, Hashes]]) -> str:
    """Hash over every published column of every config in id order; files do not matter."""
    whole = hashlib.blake2b(digest_size=16)
    for config, found in sorted(hashes, key=lambda one: one[0]):
        whole.update(f"{config}\n".encode())
        ordered = in_order(found)
        for start in range(0, len(ordered), ROW_GROUP):
            text = ordered[start : start + ROW_GROUP].tobytes().hex()
            for at in range(0, len(text), _WIDTH):
                end = at + 2 * ID_BYTES
                row_id, row_hash = text[at:end], text[end : at + _WIDTH]
                whole.update(f"{row_id} {row_hash}\n".encode())
    return whole.hexdigest()


def in_order(hashes: Hashes) -> NDArray[np.bytes_]:
    """Ids with their hashes as one text each, sorted."""
    return np.sort(hashes.view(f"S{HASHED.itemsize}"))
