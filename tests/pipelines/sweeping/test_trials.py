"""The book of trials: what a killed sweep knows again, and what it has to give up."""

from pathlib import Path

from pipelines.sweeping.trials import Trial, TrialBook


def test_trials_that_tune_does_not_know_are_given_up_by_name_and_stay_so(tmp_path: Path) -> None:
    killed = TrialBook(tmp_path / "trials.json")
    for name in ("first", "second"):
        killed.begin(Trial({"seed": 1}, {}, 0.0, f"trials/{name}", "", name=name, state="running"))
    again = TrialBook(tmp_path / "trials.json")
    assert [trial.name for trial in again.trials] == ["first", "second"]
    notes: list[str] = []
    again.keep({"first"}, notes.append)
    (note,) = notes
    assert note.startswith("second: began just before the sweep was killed")
    assert note.endswith("Its folder may be deleted: trials/second")
    assert [trial.name for trial in TrialBook(tmp_path / "trials.json").trials] == ["first"]
