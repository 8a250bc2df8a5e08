"""One source step through the whole engine, as a run would do it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from datakit.engine import execute
from datakit.recipe import load_recipe
from datakit.records import KINDS, Record
from datakit.session import Settings
from datakit.store import Store
from datakit.tables import from_frame
from datakit.work import perform


@dataclass(frozen=True)
class Outcome:
    kept: list[Record]
    dropped: list[dict[str, Any]]
    keys: list[str]
    rows_in: int


class Runner:
    """Runs a recipe of one step; `outputs` is kept from run to run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.outputs = folder / "outputs"

    def __call__(self, step: str, **fields: Any) -> Outcome:
        limit = fields.pop("limit", None)
        recipe = load_recipe({"name": "test", "steps": [{"step": step, "as": "src", **fields}]})
        assert load_recipe(recipe.plain()).plain() == recipe.plain()
        settings = Settings(
            outputs=self.outputs, state=self.folder / "state", base=self.folder, limit=limit
        )
        [dones] = execute(recipe, settings, lambda works: [perform(work) for work in works])
        store = Store(self.outputs)
        kept = [
            row
            for done in dones
            for chunk in done.chunks
            for row in from_frame(KINDS[done.kind], store.read(chunk))
        ]
        dropped = [row for done in dones for row in store.dropped(done).iter_rows(named=True)]
        assert len(kept) + len(dropped) == sum(done.rows_in for done in dones)
        return Outcome(
            kept, dropped, [done.key for done in dones], sum(done.rows_in for done in dones)
        )


@pytest.fixture
def run(tmp_path: Path) -> Runner:
    return Runner(tmp_path)
