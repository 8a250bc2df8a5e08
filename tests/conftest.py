"""Every test has a state folder of its own, and no Hub; kits open what a step needs."""

import asyncio

import polars as pl
import pytest

from datakit.models.chat import HashingSpec
from datakit.records import Prompt, to_frame
from datakit.session import Session, Settings, Watch


@pytest.fixture(autouse=True)
def own_state(tmp_path, monkeypatch):
    """Ledger and vectors in a temporary folder, for this process and those that it starts."""
    monkeypatch.setenv("DATAKIT_STATE", str(tmp_path / "own-state"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def wait():
    """Runs coroutines to their end, all in one event loop."""
    with asyncio.Runner() as runner:
        yield runner.run


@pytest.fixture
def kit(tmp_path, wait):
    """Opens a Kit for a step and model specs by role; all kits of a test share one ledger."""
    sessions = []

    def opened(step, models, *, alias="step", seed=0, offline=False):
        settings = Settings(
            outputs=tmp_path / "outputs",
            state=tmp_path / "state",
            base=tmp_path,
            seed=seed,
            offline=offline,
            models=models,
        )
        sessions.append(Session(settings, [step], Watch()))
        return sessions[-1].kit(alias)

    yield opened
    for session in sessions:
        with session:
            wait(session.close_models())


@pytest.fixture
def decide(kit):
    """Applies a table step as the engine does, preparing ten rows at a time: (kept, dropped)."""

    def decided(step, rows, *, kind=Prompt, **settings):
        frame = to_frame(kind, rows)
        opened = kit(step, {"embedder": HashingSpec(kind="hashing")}, **settings)
        parts = list(frame.iter_slices(10)) or [frame]
        prepared = pl.concat([step.prepare(part, opened) for part in parts])
        assert prepared["id"].to_list() == frame["id"].to_list()
        table = pl.concat([frame.lazy(), prepared.lazy().drop("id")], how="horizontal")
        split = step.apply(table, opened)
        kept, dropped = split.kept.rows(named=True), split.dropped.rows(named=True)
        assert sorted(row["id"] for row in kept + dropped) == sorted(frame["id"])
        return kept, dropped

    return decided
