"""Every test has a state folder of its own, and no Hub."""

import pytest


@pytest.fixture(autouse=True)
def own_state(tmp_path, monkeypatch):
    """Ledger and vectors in a temporary folder, for this process and those that it starts."""
    monkeypatch.setenv("DATAKIT_STATE", str(tmp_path / "own-state"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
