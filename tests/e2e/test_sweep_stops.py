"""A sweep that is stopped by a signal ends with that signal's exit code, and may go on."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.run.folder import read_jsonl
from pipelines.run.stopping import STOP_SIGNALS
from pipelines.sweeping.run import sweep
from sgmd_core.errors import StopRequestedError
from tests.e2e.conftest import MakeRecipe
from tests.e2e.test_sweep import states, wait_until


@pytest.fixture
def heard_signals() -> Iterator[None]:
    # What runs in the background of a shell, or below `nohup`, was started to ignore some.
    before = {number: signal.signal(number, signal.SIG_DFL) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def stop_once_a_trial_has_trained(folder: Path, number: signal.Signals) -> threading.Thread:
    """Sends this process a signal once a trial has made two more iterations."""

    def lines() -> int:
        return sum(len(read_jsonl(path)) for path in folder.glob("trials/*/metrics.jsonl"))

    before = lines()

    def stop() -> None:
        wait_until(lambda: lines() >= before + 2)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=stop)
    thread.start()
    return thread


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("heard_signals")
def test_a_signal_that_tune_would_take_stops_a_sweep_with_its_own_code(
    make_recipe: MakeRecipe, ray_cluster: None
) -> None:
    config = make_recipe(
        "sweep.grid={objective.lambda_nr: [0.05]}", "sweep.iterations=100000", "checkpoint.every=10"
    )
    folder = config.run_folder.parent / "small-sweep"
    answers = [signal.getsignal(number) for number in STOP_SIGNALS]
    stopper = stop_once_a_trial_has_trained(folder, signal.SIGUSR1)
    with pytest.raises(StopRequestedError) as caught:
        sweep(config)
    stopper.join()
    assert caught.value.exit_code == 128 + signal.SIGUSR1
    assert "interrupted by SIGUSR1 with 0 of 1 trials ended" in str(caught.value)
    assert "sgmd sweep RECIPE --resume" in str(caught.value)
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == answers
    assert states(folder) == ["running"]
