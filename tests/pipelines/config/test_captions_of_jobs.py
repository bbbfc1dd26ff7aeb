"""Files of captions that went along with a job are found beside the run, and nowhere else."""

import shutil
from pathlib import Path

import pytest

from pipelines.config.captions_of_jobs import (
    keep_captions,
    kept_captions,
    require_kept_captions,
)
from pipelines.config.recipe import load_recipe
from pipelines.sweeping.run import sweep
from sgmd_core.errors import ConfigError

TRAIN, HELD_OUT = "submitted/data.train/prompts.txt", "submitted/data.validation/held_out.txt"


@pytest.mark.slow
def test_a_run_finds_the_captions_of_its_job_in_its_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package, run, elsewhere = (tmp_path / name for name in ("package", "run", "elsewhere"))
    elsewhere.mkdir()
    for url in (TRAIN, HELD_OUT):
        (package / url).parent.mkdir(parents=True)
        (package / url).write_text(f"a circle of {url}\n")
    also = f"data.also=[{{source: {HELD_OUT}, weight: 2}}]"
    given = [f"data.train={TRAIN}", f"data.validation={HELD_OUT}", also]
    monkeypatch.chdir(package)
    config = load_recipe("tiny", given)
    assert config.data.train == TRAIN
    keep_captions(config.data, run)
    keep_captions(load_recipe("tiny", ["data.train=data/train"]).data, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    recipe = run / "config.yaml"
    recipe.write_text(config.to_yaml())
    # The job itself, and its later attempts, read what went along with it.
    assert load_recipe(str(recipe)).data == config.data
    # In another job's package, the same name is of other captions.
    (package / TRAIN).write_text("a square\n")
    assert load_recipe(str(recipe)).data.train == str(run / TRAIN)
    monkeypatch.chdir(elsewhere)
    found = load_recipe(str(recipe)).data
    assert found.train == str(run / TRAIN)
    assert found.validation == found.also[0].source == str(run / HELD_OUT)
    assert found.also[0].weight == 2
    assert Path(found.train).read_text() == f"a circle of {TRAIN}\n"
    assert load_recipe(str(recipe), ["data.train=mine.txt"]).data.train == "mine.txt"
    (run / TRAIN).unlink()
    assert load_recipe(str(recipe)).data.train == TRAIN


def test_trials_and_the_best_recipe_of_a_sweep_name_its_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package, sweep = tmp_path / "package", tmp_path / "sweep"
    (package / TRAIN).parent.mkdir(parents=True)
    (package / TRAIN).write_text("a circle\n")
    monkeypatch.chdir(package)
    also = f"data.also=[{{source: {TRAIN}, weight: 2}}, {{source: /sets/more}}]"
    config = load_recipe("tiny", [f"data.train={TRAIN}", "data.validation=data/held_out", also])
    assert kept_captions(config.data, sweep, str(sweep)) == {}
    keep_captions(config.data, sweep)
    shutil.rmtree(package)
    for place in (str(sweep), "s3://bucket/sweep"):
        found = config.with_settings(kept_captions(config.data, sweep, place)).data
        assert found.train == found.also[0].source == f"{place}/{TRAIN}"
        assert (found.validation, found.also[1].source) == ("data/held_out", "/sets/more")
        assert [one.weight for one in found.also] == [2, 1]


def test_a_sweep_goes_on_with_the_captions_that_it_has_kept_and_refuses_others_of_their_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / TRAIN).parent.mkdir(parents=True)
    (tmp_path / TRAIN).write_text("a circle\n")
    monkeypatch.chdir(tmp_path)
    given = ["data.validation=data/held_out", f"data.train={TRAIN}"]
    config = load_recipe("tiny", [*given, "name=search", f"output={tmp_path / 'out'}"])
    folder = tmp_path / "out" / "search-sweep"
    keep_captions(config.data, folder)
    require_kept_captions(config.data, folder, str(folder))
    (tmp_path / TRAIN).write_text("a square\n")
    words = f"other captions in {TRAIN} than when it began. Expected those .* {folder}/{TRAIN}"
    with pytest.raises(ConfigError, match=words):
        sweep(config, resume=True)
    # Elsewhere than in a job there is nothing to compare.
    (tmp_path / TRAIN).unlink()
    require_kept_captions(config.data, folder, str(folder))
