"""A sweep that is stopped by a signal ends with that signal's exit code, and may go on."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.run.folder import read_jsonl
from pipelines.run.stopping import STOP_SIGNALS, StopNow, StopRequests
from pipelines.sweeping.events import SearchEnding
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
    """Sends this process a signal once a trial has made four more iterations."""

    def lines() -> int:
        return sum(len(read_jsonl(path)) for path in folder.glob("trials/*/metrics.jsonl"))

    before = lines()

    def stop() -> None:
        wait_until(lambda: lines() >= before + 4)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=stop)
    thread.start()
    return thread


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("heard_signals")
def test_signals_stop_a_sweep_with_their_own_codes_and_it_goes_on(
    make_recipe: MakeRecipe, ray_cluster: None
) -> None:
    config = make_recipe(
        "sweep.grid={objective.lambda_nr: [0.05]}",
        "sweep.iterations=100000",
        # A trial ends at its next report; without one it trains on while Tune waits for it.
        "sweep.validate_every=10",
        "checkpoint.every=2",
    )
    folder = config.run_folder.parent / "small-sweep"
    answers = [signal.getsignal(number) for number in STOP_SIGNALS]
    # The one that schedulers send, and one that Tune takes for itself.
    for number, resume in ((signal.SIGTERM, False), (signal.SIGUSR1, True)):
        stopper = stop_once_a_trial_has_trained(folder, number)
        with pytest.raises(StopRequestedError) as caught:
            sweep(config, resume=resume)
        stopper.join()
        assert caught.value.exit_code == 128 + number
        assert f"interrupted by {number.name} with 0 of 1 trials ended" in str(caught.value)
        assert "sgmd sweep RECIPE --resume" in str(caught.value)
        assert [signal.getsignal(number) for number in STOP_SIGNALS] == answers
        assert states(folder) == ["running"]
        assert not list(folder.glob("trials/*/.lease"))
    (trial,) = folder.glob("trials/*")
    (restarted,) = [
        event for event in read_jsonl(trial / "events.jsonl") if event["kind"] == "restarted"
    ]
    assert restarted["iteration"] >= 2


def test_a_search_of_a_tune_that_takes_no_signals_is_broken_off() -> None:
    stops = StopRequests()
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    ending = SearchEnding(stops)
    ending.take_back()
    ending.end_if_asked()
    stops.received = "SIGTERM"
    with pytest.raises(StopNow):
        ending.end_if_asked()
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
