"""Rows of a version that another recipe made.

Source: the versions of this project, under `outputs/datasets`.
Takes: nothing.
Gives: the kind that `kind` names, which must be the kind of that config. Rows keep their id,
    origin, roots and measures; a row without a split of its own gets that of the file it stands
    in, so that a test row stays one.
Measures: those of the version, under the names that they have there.
Drops: nothing.
"""

from collections.abc import Iterable, Iterator
from typing import Literal

import polars as pl
from pydantic import Field

from datakit.errors import InputError
from datakit.kit import Kit
from datakit.records import KINDS, Record
from datakit.step import Range, Reject, SourceStep
from datakit.tables import each_record
from datakit.text import near_miss
from datakit.versions import Version, find_version, unflatten

ROWS_PER_RANGE = 20_000


class Dataset(SourceStep[Record]):
    """Reads a published version.

    dataset: `name` (its latest version, looked up when the recipe runs), `name@x.y.z`, or the
    folder of a version; config and split: which rows of it, every split where none is named.
    """

    dataset: str = Field(min_length=1)
    config: str = "default"
    split: str | None = None
    kind: Literal["Prompt", "Conversation", "Edit", "Candidates", "Judged", "Pair", "Label"]

    def gives(self, taken: type[Record] | None) -> type[Record]:
        del taken
        return KINDS[self.kind]

    def is_private(self, kit: Kit) -> bool:
        return self.private or self._version(kit).manifest.private

    def fingerprint(self, kit: Kit) -> str:
        return self._version(kit).manifest.digest

    def ranges(self, kit: Kit) -> Iterator[Range]:
        version = self._version(kit)
        for file in version.manifest.files:
            if file.config == self.config and self.split in (None, file.split):
                for start in range(0, file.rows, ROWS_PER_RANGE):
                    stop = min(start + ROWS_PER_RANGE, file.rows)
                    yield Range(
                        name=file.path,
                        start=start,
                        stop=stop,
                        first_row=start + 1,
                        fingerprint=file.sha256,
                    )

    async def read(self, part: Range, kit: Kit) -> Iterable[Record | Reject]:
        version = self._version(kit)
        split = next(file.split for file in version.manifest.files if file.path == part.name)
        path = version.folder / part.name
        try:
            table = pl.scan_parquet(path).slice(part.start, part.stop - part.start).collect()
        except (pl.exceptions.PolarsError, OSError) as error:
            raise InputError(f"{version.address}: cannot read {str(path)!r}: {error}") from error
        kind = KINDS[self.kind]
        frame = unflatten(kind, table).with_columns(
            pl.when(pl.col("split") == "").then(pl.lit(split)).otherwise("split").alias("split")
        )
        return each_record(kind, frame)

    def _version(self, kit: Kit) -> Version:
        """The version, which must have the config and the split, of the kind that is asked for."""
        # A folder is seen from the recipe, like every other path in it.
        address = str(kit.path(self.dataset)) if "/" in self.dataset else self.dataset
        version = find_version(kit.outputs, address)
        manifest = version.manifest
        if self.config not in manifest.configs:
            raise InputError(
                f"{version.address} has no config {self.config!r}"
                f"{near_miss(self.config, manifest.configs)}"
            )
        kind = manifest.configs[self.config]
        if kind != self.kind:
            raise InputError(
                f"{version.address} holds {kind} rows in config {self.config!r}, "
                f"but the recipe reads them as {self.kind}; write `kind: {kind}`"
            )
        splits = {file.split for file in manifest.files if file.config == self.config}
        if self.split is not None and self.split not in splits:
            raise InputError(
                f"{version.address} has no split {self.split!r} in config {self.config!r}"
                f"{near_miss(self.split, splits)}"
            )
        return version
