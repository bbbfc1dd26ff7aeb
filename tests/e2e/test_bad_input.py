"""What goes wrong is said before anything starts, and what was reached is kept."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

from pipelines.distillation.run import distill, dry_run
from pipelines.run.folder import RunFolder, read_jsonl
from pipelines.run.observer import RunObserver
from pipelines.run.records import IterationRecord
from pipelines.run.stop_rule import StopRule
from sgmd_core.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    ModelFolderError,
    NonFiniteError,
    ShapeError,
)
from tests.e2e.conftest import MakeRecipe


class Warned(RunObserver):
    """Keeps what the run warns of."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def warning(self, text: str) -> None:
        self.texts.append(text)


def test_a_dry_run_says_what_the_run_comes_to_and_writes_nothing(make_recipe: MakeRecipe) -> None:
    config = make_recipe()
    plan = dry_run(config)
    assert plan["latent_shape"] == [4, 3, 4, 4]
    assert plan["training_rows"] == 48
    assert not config.run_folder.exists()


def test_clips_that_do_not_divide_are_refused(make_recipe: MakeRecipe) -> None:
    with pytest.raises(ShapeError, match=r"10 frames.*1 \+ a multiple of 4"):
        dry_run(make_recipe("video.num_frames=10"))


def test_a_missing_model_folder_is_refused(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match=r"nowhere"):
        dry_run(make_recipe(f"model.folder={tmp_path / 'nowhere'}"))


def test_a_torn_weight_file_is_named(
    make_recipe: MakeRecipe, wan_folder: Path, tmp_path: Path
) -> None:
    import shutil

    torn = tmp_path / "torn"
    shutil.copytree(wan_folder, torn)
    weights = next((torn / "transformer").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelFolderError, match=rf"{weights.name}"):
        dry_run(make_recipe(f"model.folder={torn}"))


def test_a_missing_data_folder_is_refused(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere.*sgmd shapes"):
        dry_run(make_recipe(f"data.train={tmp_path / 'nowhere'}"))


@pytest.mark.parametrize("size", ["video.num_frames=1", "video.height=8"])
def test_clips_that_no_motion_can_be_measured_of_are_not_validated(
    make_recipe: MakeRecipe, size: str
) -> None:
    with pytest.raises(ConfigError, match=r"at least 3 frames of 12 x 12 .*validation\.every"):
        dry_run(make_recipe("validation.every=1", size))
    dry_run(make_recipe(size))


def test_too_few_held_out_captions_are_refused(make_recipe: MakeRecipe) -> None:
    with pytest.raises(ConfigError, match=r"16 rows"):
        dry_run(make_recipe("validation.every=1", "validation.num_captions=17"))


@pytest.mark.slow
def test_a_run_that_exists_is_not_overwritten(make_recipe: MakeRecipe) -> None:
    distill(make_recipe("iterations=1"))
    with pytest.raises(ConfigError, match=r"already there"):
        distill(make_recipe("iterations=1"))


@pytest.mark.slow
def test_resuming_under_other_settings_is_refused(make_recipe: MakeRecipe) -> None:
    distill(make_recipe("iterations=1"))
    with pytest.raises(CheckpointError, match=r"lambda_nr is 0.2, and was 0.1") as caught:
        distill(make_recipe("iterations=2", "objective.lambda_nr=0.2"), resume=True)
    assert "docs/runs.md" in caught.value.remedy
    warned = Warned()
    assert distill(make_recipe("iterations=1"), resume=True, observer=warned)["iterations"] == 1
    assert any("has made 1 iterations, and iterations=1" in told for told in warned.texts)


@pytest.mark.slow
def test_resuming_with_other_columns_is_refused_with_both_values(
    make_recipe: MakeRecipe, world: Path, tmp_path: Path
) -> None:
    """The two columns hold the same captions, so that only the mapping differs."""
    for shard in (world / "train").glob("*.parquet"):
        table = pq.read_table(shard)
        names = ["short" if name == "caption" else name for name in table.column_names]
        table = table.rename_columns(names).append_column("long", table.column("caption"))
        pq.write_table(table, tmp_path / shard.name)
    settings = (f"data.train={tmp_path}", "data.validation_columns.caption=caption")
    distill(make_recipe("iterations=1", *settings, "data.columns.caption=short"))
    again = make_recipe("iterations=2", *settings, "data.columns.caption=long")
    with pytest.raises(CheckpointError, match=r"data\.columns\.caption is .*long.*was .*short"):
        distill(again, resume=True)
    distill(make_recipe("iterations=2", *settings, "data.columns.caption=short"), resume=True)


@pytest.mark.slow
def test_a_run_that_blows_up_stops_with_its_last_good_state_on_disk(
    make_recipe: MakeRecipe,
) -> None:
    config = make_recipe("generator.optimizer.lr=1e30", "checkpoint.every=0")
    with pytest.raises(NonFiniteError, match=r"iteration \d") as caught:
        distill(config)
    folder = RunFolder(config.run_folder)
    good = len(read_jsonl(folder.metrics))
    assert 0 < good < config.iterations
    assert any(f"step-{good:06d}" in note for note in caught.value.__notes__)
    saved = folder.checkpoints / f"step-{good:06d}" / "generator" / "weights.safetensors"
    assert all(value.isfinite().all() for value in load_file(saved).values())


class _Blocking(RunObserver):
    """Leaves no room for the checkpoint of the iteration that has just ended."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder

    def iteration(self, record: IterationRecord) -> None:
        (self._folder.checkpoints / f"step-{record.iteration + 1:06d}").touch()


@pytest.mark.slow
def test_a_save_that_fails_after_a_run_has_blown_up_is_told_beside_it(
    make_recipe: MakeRecipe,
) -> None:
    config = make_recipe("generator.optimizer.lr=1e30", "checkpoint.every=0")
    with pytest.raises(NonFiniteError) as caught:
        distill(config, observer=_Blocking(RunFolder(config.run_folder)))
    (told,) = [note for note in caught.value.__notes__ if "Saving the state" in note]
    assert "No state was saved" in told


@pytest.mark.slow
def test_a_time_limit_ends_iterations_that_overlap(make_recipe: MakeRecipe) -> None:
    config = make_recipe("iterations=12", "checkpoint.every=0")
    # Roles of one process take turns, so a recipe refuses this; what may overlap is the same.
    topology = config.topology.model_copy(update={"max_staleness_iterations": 1})
    config = config.model_copy(update={"topology": topology})
    distill(config, stop_rule=StopRule(config.iterations, max_seconds=1e-3))
    assert len(read_jsonl(RunFolder(config.run_folder).metrics)) == 10
