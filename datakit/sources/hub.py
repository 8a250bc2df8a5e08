"""Rows of a dataset on the Hugging Face Hub.

Source: `dataset` (`org/name`) at a pinned `revision`. Use the commit sha: it names the same rows
    for ever and needs no look-up; a tag or a branch is resolved to its commit at each run. A
    private dataset needs HF_TOKEN in the environment or a login; no field takes a token.
Takes: nothing.
Gives: the kind that `kind` names, a row for each row; with `group_by` one Candidates for each
    group of rows.
Measures: `<alias>.<column>` for each column mapped by `measures`, as the source states it; in a
    Pair a column of one side ends in `.chosen` or `.rejected`.
Drops: rows that are no valid record, as `null_value`, `wrong_type`, `empty_text`, `unknown_role`,
    `prefix_mismatch` or `invalid_row`; each with dataset, row and column.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from pydantic import Field

from datakit.errors import InputError, OutsideError
from datakit.kit import Kit
from datakit.records import Record
from datakit.sources._arrow import schema_types, table_rows
from datakit.sources._table import ROWS_PER_RANGE, Numbered, TabularSource
from datakit.step import Range, Reject
from datakit.text import digest, shorten

_COMMIT = re.compile(r"[0-9a-f]{40}")


class Hub(TabularSource):
    """Reads one split of one config of a dataset on the Hub."""

    dataset: str = Field(pattern=r"^[\w.-]+/[\w.-]+$")
    config: str | None = None
    split: str = "train"
    revision: str = Field(min_length=1)

    def ranges(self, kit: Kit) -> Iterator[Range]:
        """Runs of rows; with `group_by` everything at once, since a group may be anywhere."""
        del kit
        commit = self._commit()
        rows = len(self._load(commit))
        size = ROWS_PER_RANGE if self.group_by is None else max(rows, 1)
        fingerprint = digest([self.dataset, self.config, self.split, commit])
        for start in range(0, rows, size):
            yield Range(
                name=commit,
                start=start,
                stop=min(start + size, rows),
                first_row=start + 1,
                fingerprint=fingerprint,
            )

    async def read(self, part: Range, kit: Kit) -> Iterable[Record | Reject]:
        return self.converted(self._rows(part, kit))

    def _rows(self, part: Range, kit: Kit) -> Iterator[Numbered]:
        table = self._load(part.name).with_format("arrow")[part.start : part.stop]
        name = f"{self.dataset}:{self.split}"
        layout = self.layout(name, self.dataset, "row", schema_types(table.schema), kit)
        rows = table_rows(layout, part.first_row, table)
        for number, row in enumerate(rows, start=part.first_row):
            yield layout, number, row

    def _commit(self) -> str:
        """The commit behind `revision`."""
        if _COMMIT.fullmatch(self.revision):
            return self.revision
        from huggingface_hub import HfApi

        try:
            found = HfApi().dataset_info(self.dataset, revision=self.revision).sha
        except Exception as error:
            raise self._unreachable(error) from error
        if found is None:
            raise OutsideError(f"the Hub names no commit of {self.dataset!r} @ {self.revision!r}")
        return found

    def _load(self, commit: str) -> Any:
        """The split as a `datasets.Dataset`, from the local cache where it is there."""
        from datasets import load_dataset, load_dataset_builder

        # The only failures that are the recipe's own are a config and a split that do not exist,
        # which `datasets` reports as ValueError; everything else happens outside.
        try:
            load_dataset_builder(self.dataset, self.config, revision=commit)
        except ValueError as error:
            raise self._refused("config", self.config, error) from error
        except Exception as error:
            raise self._unreachable(error) from error
        try:
            return load_dataset(self.dataset, self.config, split=self.split, revision=commit)
        except ValueError as error:
            raise self._refused("split", self.split, error) from error
        except Exception as error:
            raise self._unreachable(error) from error

    def _refused(self, what: str, value: str | None, error: Exception) -> InputError:
        return InputError(
            f"dataset {self.dataset!r} cannot be read with {what} {value!r}: "
            f"{shorten(str(error), 300)}"
        )

    def _unreachable(self, error: Exception) -> OutsideError:
        said = shorten(str(error), 300).rstrip(".")
        return OutsideError(
            f"cannot read {self.dataset!r} @ {self.revision!r} from the Hub: "
            f"{type(error).__name__}: {said}; check the name, "
            "the revision, the network and, for a private dataset, HF_TOKEN"
        )
