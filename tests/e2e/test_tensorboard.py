"""A whole run, stopped and resumed, as TensorBoard shows it."""

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipelines.distillation.run import distill
from pipelines.run.folder import RunFolder, read_jsonl
from tests.e2e.conftest import MakeRecipe


@pytest.mark.slow
def test_a_resumed_run_shows_the_figures_of_its_metrics_once(make_recipe: MakeRecipe):
    settings = ("tracker.tensorboard=true", "checkpoint.every=2", "validation.every=2")
    distill(make_recipe(*settings, "iterations=2"))
    config = make_recipe(*settings, "iterations=4")
    distill(config, resume=True)
    folder = RunFolder(config.run_folder)
    found = EventAccumulator(str(folder.root / "tensorboard"))
    found.Reload()
    records = read_jsonl(folder.metrics)
    for name in records[0]["losses"]:
        shown = [(one.step, one.value) for one in found.Scalars(f"losses/{name}")]
        expected = [(one["iteration"] + 1, one["losses"][name]) for one in records]
        assert [step for step, _ in shown] == [1, 2, 3, 4] == [step for step, _ in expected]
        values = [value for _, value in expected]
        assert [value for _, value in shown] == pytest.approx(values, rel=1e-6)
    assert [one.step for one in found.Images("validation/sheet")] == [2, 4]
