"""A trial whose folder another process holds."""

import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest

from cluster.errors import LeaseError
from cluster.lease import hold
from cluster.storage import read_json, write_json
from cluster.stores import store_address
from pipelines.config.recipe import load_recipe
from pipelines.run.folder import RunFolder
from pipelines.run.opened_copy import working_copy
from pipelines.sweeping.trial import (
    ERROR_FILE,
    CommonToTrials,
    TrialError,
    once_free,
    run_in_folder,
)
from sgmd_core.errors import SgmdError


def test_a_folder_that_a_lost_process_holds_is_waited_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pipelines.sweeping.trial._AGAIN_S", 0.01)
    done: list[str] = []

    def work() -> None:
        done.append("work")
        if len(done) < 4:
            raise LeaseError("writing", "it is held", "nobody", "Wait")

    def look_again() -> None:
        done.append("look again")

    once_free(work, look_again, patience_s=60.0)
    assert done == ["work", "look again", "work", "look again", "work"]
    done.clear()
    with pytest.raises(LeaseError):
        once_free(work, look_again, patience_s=0.0)
    assert done == ["work"]


@pytest.mark.slow
def test_a_trial_that_has_waited_decides_by_what_the_holder_has_left(
    shapes_recipe: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
):
    fsspec.filesystem("memory").store.clear()
    settings = (*shapes_recipe, "topology.mode=local", "output=memory://sweeps/x/trials")
    config = load_recipe("tiny", [*settings, "name=held"])
    store = ExitStack()
    place = store_address(config.run_folder)
    store.enter_context(hold(place, "the trial before"))

    def ends(seconds: float) -> None:
        # While the next one sleeps, the holder fails, says so, and lets go.
        write_json(f"{place}/{ERROR_FILE}", {"error": "the first one's"})
        store.close()

    clock = SimpleNamespace(monotonic=time.monotonic, sleep=ends)
    monkeypatch.setattr("pipelines.sweeping.trial.time", clock)
    common = CommonToTrials(config)
    with working_copy(place), pytest.raises(TrialError, match="the first one's"):
        run_in_folder(common, config, None, {}, "held")
    assert read_json(f"{place}/{ERROR_FILE}") == {"error": "the first one's"}


def test_a_trial_that_could_not_be_measured_says_why(tmp_path: Path):
    config = load_recipe("tiny", [f"output={tmp_path}", "name=blind", "topology.mode=local"])
    run = RunFolder(config.run_folder)
    run.create(config.to_yaml())
    write_json(str(run.summary), {"validation_problem": "The validation of iteration 2 failed."})
    with pytest.raises(SgmdError, match=r"is missing\. The validation of iteration 2 failed\."):
        run_in_folder(CommonToTrials(config), config, None, {}, "blind")
    assert "iteration 2 failed" in read_json(f"{run}/{ERROR_FILE}")["error"]
