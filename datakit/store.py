"""Finished parts on disk, found by key. A part exists when its marker exists.

    outputs/parts/<2 hex>/<key>/<name>.parquet    rows, written first
    outputs/parts/<2 hex>/<key>/done.<n>.json     the marker, written last by exclusive create

The highest `n` counts. A complete part has one marker for ever; a part with rows that went
unanswered is `partial`, and the run that asks them again writes the next number. The loser of a
race finds the winner's marker and deletes its own files.
"""

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import polars as pl
from pydantic import ValidationError

from datakit.errors import OutsideError, Rejected
from datakit.step import DROPPED
from datakit.tables import pieces
from datakit.values import Value

PART_BYTES = 16_000_000
"""Text in a part, about: long rows make parts of fewer rows."""

_EVERY = pl.lit(True)

_RUN_ROWS = 2_500
_RUN_BYTES = 4_000_000
"""Of files that are read together: each read costs a millisecond, however little there is."""


class Chunk(Value):
    """One file of a part's kept rows: the unit that the next step takes."""

    key: str
    file: str
    rows: int
    digest: str


class Done(Value):
    """The marker of a part: what came out, and what was dropped why.

    failed: dropped rows that a model failed on, among them the unanswered ones. A `pending` part
    has no marker on disk: some of its rows cannot be finished now, and `reasons` says why.
    """

    key: str
    alias: str
    step: str
    kind: str
    status: Literal["complete", "partial", "pending"]
    rows_in: int
    chunks: tuple[Chunk, ...]
    dropped: str
    dropped_rows: int
    reasons: dict[str, int]
    failed: int
    unanswered: int

    @classmethod
    def pending(
        cls, key: str, alias: str, step: str, rows_in: int, reasons: Mapping[str, int]
    ) -> "Done":
        """A part that cannot be finished now."""
        return cls(
            key=key,
            alias=alias,
            step=step,
            kind="",
            status="pending",
            rows_in=rows_in,
            chunks=(),
            dropped="",
            dropped_rows=0,
            reasons=dict(reasons),
            failed=0,
            unanswered=0,
        )

    @property
    def rows(self) -> int:
        """Kept rows."""
        return sum(chunk.rows for chunk in self.chunks)


def frame_digest(frame: pl.DataFrame) -> str:
    """Hash of a frame's rows as JSON, in order; the bytes of files do not matter."""
    whole = hashlib.blake2b(digest_size=16)
    for piece in pieces(frame):
        whole.update(piece.write_ndjson().encode())
    return whole.hexdigest()


class Store:
    """Parts under `outputs/parts`; safe for many processes."""

    def __init__(self, outputs: Path) -> None:
        self.outputs = outputs
        self._parts = outputs / "parts"

    def find(self, key: str) -> Done | None:
        """The newest marker of a part, or None.

        A marker that this release cannot read is of another one, and one whose files are gone says
        nothing: the part is made again.
        """
        for marker in sorted(self._folder(key).glob("done.*.json"), key=_number, reverse=True):
            with contextlib.suppress(ValidationError):
                done = Done.model_validate_json(marker.read_text())
                if all(self.path(chunk).exists() for chunk in done.chunks):
                    return done
        return None

    def save(
        self,
        key: str,
        alias: str,
        step: str,
        kind: str,
        rows_in: int | None,
        kept: Iterable[pl.DataFrame],
        dropped: Sequence[pl.DataFrame],
        hashed: bool = True,
    ) -> Done:
        """Write a part and return the marker that stands (ours, or that of whoever was first).

        `dropped` is looked at after `kept` is used up, so that both may come from one pass.
        rows_in: None where it is what comes out, as for a source.
        """
        folder = self._folder(key)
        written: list[Path] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            chunks: list[Chunk] = []
            for frame in kept:
                if frame.height:
                    path = folder / f"{uuid.uuid4().hex}.parquet"
                    written.append(path)
                    frame.write_parquet(path)
                    found = frame_digest(frame) if hashed else ""
                    chunks.append(Chunk(key=key, file=path.name, rows=frame.height, digest=found))
            path = folder / f"{uuid.uuid4().hex}.dropped.parquet"
            written.append(path)
            lost = pl.concat([pl.DataFrame(schema=DROPPED), *dropped])
            lost.write_parquet(path)
            if rows_in is None:
                rows_in = sum(chunk.rows for chunk in chunks) + lost.height
            done = Done(
                key=key,
                alias=alias,
                step=step,
                kind=kind,
                status="partial" if lost["transient"].any() else "complete",
                rows_in=rows_in,
                chunks=tuple(chunks),
                dropped=path.name,
                dropped_rows=lost.height,
                failed=int((lost["kind"] != Rejected.kind).sum()),
                unanswered=int(lost["transient"].sum()),
                reasons=dict(lost["reason"].value_counts().sort("reason").iter_rows()),
            )
            return self._mark(folder, done, written)
        except OSError as error:
            for path in written:
                path.unlink(missing_ok=True)
            raise OutsideError(f"cannot write part {str(folder)!r}: {error}") from error

    def _mark(self, folder: Path, done: Done, written: Sequence[Path]) -> Done:
        """Create the next marker, unless a complete one or an equal race winner stands."""
        draft = folder / f"{uuid.uuid4().hex}.draft"
        draft.write_text(done.model_dump_json())
        try:
            while True:
                # Counted first: a marker that comes while we look makes the link fail.
                numbers = [_number(path) for path in folder.glob("done.*.json")]
                standing = self.find(done.key)
                if standing is not None and standing.status == "complete":
                    for path in written:
                        path.unlink()
                    return standing
                try:
                    os.link(draft, folder / f"done.{max(numbers, default=-1) + 1}.json")
                    return done
                except FileExistsError:
                    continue
        finally:
            draft.unlink()

    def read(self, chunk: Chunk) -> pl.DataFrame:
        """The rows of one chunk."""
        return pl.read_parquet(self.path(chunk))

    def runs(
        self,
        chunks: Iterable[Chunk],
        columns: Sequence[str],
        where: pl.Expr = _EVERY,
    ) -> Iterator[pl.DataFrame]:
        """The rows of chunks in order, as many small ones at a time as memory hardly feels."""
        run: list[Path] = []
        rows = size = 0
        for chunk in chunks:
            run.append(self.path(chunk))
            rows += chunk.rows
            size += run[-1].stat().st_size
            if rows >= _RUN_ROWS or size >= _RUN_BYTES:
                yield pl.scan_parquet(run).filter(where).select(columns).collect()
                run, rows, size = [], 0, 0
        if run:
            yield pl.scan_parquet(run).filter(where).select(columns).collect()

    def path(self, chunk: Chunk) -> Path:
        """The file of one chunk."""
        return self._folder(chunk.key) / chunk.file

    def scan(self, chunks: Sequence[Chunk], schema: pl.Schema) -> pl.LazyFrame:
        """The rows of many chunks in order, lazily."""
        if not chunks:
            return pl.LazyFrame(schema=schema)
        return pl.scan_parquet([self.path(chunk) for chunk in chunks])

    def dropped(self, done: Done) -> pl.DataFrame:
        """The dropped rows of a part."""
        if not done.dropped_rows:
            return pl.DataFrame(schema=DROPPED)
        return pl.read_parquet(self._folder(done.key) / done.dropped)

    def _folder(self, key: str) -> Path:
        return self._parts / key[:2] / key


def _number(marker: Path) -> int:
    return int(marker.name.split(".")[1])


def cut(frames: Iterable[pl.DataFrame], rows_per_part: int) -> Iterator[pl.DataFrame]:
    """A table, given piece by piece, in parts of about `rows_per_part` or PART_BYTES.

    Borders belong to the data: a part ends after a row whose id says so (one in `rows_per_part`
    does, and of long rows more), at the latest at twice that size, so that a row more or less
    moves one border and not all that follow, and how the pieces came does not matter.
    """
    waiting: list[pl.DataFrame] = []
    rows = size = 0
    for frame in frames:
        start = 0
        numbers = frame["id"].str.slice(-8).str.to_integer(base=16).to_list()
        lengths = frame.select(_text_bytes(frame.schema)).to_series().to_list()
        for position, (number, length) in enumerate(zip(numbers, lengths, strict=True), start=1):
            rows += 1
            size += length
            ends_here = number % rows_per_part == 0 or number * PART_BYTES < length << 32
            if ends_here or rows == 2 * rows_per_part or size >= 2 * PART_BYTES:
                waiting.append(frame.slice(start, position - start))
                yield pl.concat(waiting)
                waiting, rows, size, start = [], 0, 0, position
        if start < frame.height:
            waiting.append(frame.slice(start))
    if waiting:
        yield pl.concat(waiting)


def _text_bytes(schema: pl.Schema) -> pl.Expr:
    """How many bytes of text each row holds, in columns of texts and lists of structs of texts."""
    found: list[pl.Expr] = [pl.lit(0, pl.Int64())]
    for name, kind in schema.items():
        if isinstance(kind, pl.List):
            one = _element_bytes(kind.inner)
            if one is not None:
                found.append(pl.col(name).list.eval(one).list.sum())
        elif kind == pl.String():
            found.append(pl.col(name).str.len_bytes())
    return pl.sum_horizontal(found).cast(pl.Int64())


def _element_bytes(kind: object) -> pl.Expr | None:
    if kind == pl.String():
        return pl.element().str.len_bytes()
    if isinstance(kind, pl.Struct):
        names = [field.name for field in kind.fields if field.dtype == pl.String()]
        fields = [pl.element().struct.field(name).str.len_bytes() for name in names]
        return pl.sum_horizontal(fields) if fields else None
    return None


def write_json(path: Path, value: object) -> None:
    """Write readable JSON in one step: a reader sees the old file or the new one."""
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    draft.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    draft.replace(path)
