"""What all tests of pretraining have in common."""

import pytest


@pytest.fixture(autouse=True)
def unwatched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has Ray Train start no process for each stage that looks for machines about to leave."""
    monkeypatch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
