"""Words of Tune: a sweep leaves out a few sentences, and those alone, while it runs."""

import logging
import warnings
from pathlib import Path

import pytest

from pipelines.config.recipe import load_recipe
from pipelines.sweeping import run
from pipelines.sweeping.run import sweep

TUNE = logging.getLogger("ray.tune.tune")


class MetError(Exception):
    """Ends the sweep where the test looks."""


def test_what_tune_says_is_left_out_within_a_sweep_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    def say(*_: object, **__: object) -> None:
        TUNE.error("Trials did not complete: %s", ["a"])
        TUNE.warning("Stop signal received (e.g. via SIGINT/Ctrl+C), ending Ray Tune run. ")
        TUNE.warning("Experiment has been interrupted, but the most recent state was saved.")
        TUNE.error("Experiment state snapshotting failed:")
        raise MetError

    monkeypatch.setattr(run, "checked_sweep", say)
    config = load_recipe("tiny", [f"output={tmp_path}", "sweep.grid={seed: [0]}"])
    # Another test may have left Ray's loggers less talkative.
    level = TUNE.level
    TUNE.setLevel(logging.INFO)
    before = (TUNE.level, list(TUNE.filters), list(warnings.filters))
    ear = Ear()
    TUNE.addHandler(ear)
    try:
        with pytest.raises(MetError):
            sweep(config)
        assert heard == ["Experiment state snapshotting failed:"]
        with pytest.raises(MetError):
            say()
    finally:
        TUNE.removeHandler(ear)
        after = (TUNE.level, list(TUNE.filters), list(warnings.filters))
        TUNE.setLevel(level)
    assert len(heard) == 5
    assert after == before
