"""A damaged run folder is read as far as it goes, or refused in words by every command."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.checkpoints import Checkpoints
from pipelines.cli import app
from pipelines.config.recipe import DistillConfig, load_recipe
from pipelines.distillation.guards import UpdateGuard
from pipelines.distillation.position import resume_position, with_draws_of
from pipelines.distillation.preflight import Preflight, run_preflight
from pipelines.distillation.run import distill
from pipelines.distillation.summary import summarise
from pipelines.evaluation.plan import EvaluationOptions, plan_evaluation
from pipelines.exporting.source import open_source
from pipelines.run.alarms import AlarmWatch
from pipelines.run.data_log import DataLog
from pipelines.run.folder import RunFolder, append_jsonl, read_jsonl
from pipelines.run.ranking import Contender, not_told_apart, ranked, scores_of
from pipelines.run.records import RunEvent
from pipelines.shapes import ClipSplit, captions, write_shards
from sgmd_core.errors import SgmdError
from tests.fuzz.mutations import NUM_CASES, mutate_json, mutate_text, time_limit
from tests.helpers import tiny_wan

FILES = (
    *("config.yaml", "identity.json", "metrics.jsonl", "validation.jsonl", "alarms.jsonl"),
    *("events.jsonl", "shards.jsonl", "summary.json", "ranking.json", "trace.json"),
    *("ledger/000000000.jsonl", "checkpoints/step-000002/manifest.json"),
    *("generator/sgmd.json", "evaluation.json"),
)
CASES = max(1, NUM_CASES // 4)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> DistillConfig:
    """Two iterations of two clips, in one process."""
    folder = tmp_path_factory.mktemp("world")
    write_shards(str(folder / "clips"), num_clips=8, shard_size=4, seed=0)
    words = {word for text in captions(ClipSplit.TRAIN) for word in text.split()}
    model = tiny_wan.write_tiny_wan(folder / "wan", sorted(words))
    recipe = folder / "small.yaml"
    recipe.write_text(
        f"""
name: small
output: {folder / "runs"}
iterations: 2
model: {{folder: {model}, text_length: {tiny_wan.TEXT_LENGTH}, encoder_dtype: fp32}}
video: {{num_frames: {tiny_wan.NUM_FRAMES}, height: {tiny_wan.HEIGHT}, width: {tiny_wan.WIDTH},
  fps: 8}}
data: {{train: {folder / "clips"}, validation: {folder / "clips"}, read_ahead: {{readers: 0}}}}
batch: {{size: 2, micro_batches: 1}}
schedule: {{shift: 3.0}}
validation: {{every: 1, num_captions: 4, teacher_steps: 2}}
checkpoint: {{every: 1, keep: 2, keep_best: 1}}
topology: {{mode: local}}
"""
    )
    return load_recipe(str(recipe))


@pytest.fixture(scope="module")
def written(settings: DistillConfig) -> Path:
    """A finished run that has raised an alarm and seen a failure."""
    distill(settings)
    folder = RunFolder(settings.run_folder)
    alarm = {"iteration": 1, "name": "over_saturation", "message": "m", "value": 2.0, "limit": 1.0}
    append_jsonl(folder.alarms, alarm)
    event = RunEvent(kind="worker_died", cause="killed", role="generator", rank=0, iteration=1)
    append_jsonl(folder.events, event.to_json())
    (folder.root / "evaluation.json").write_text('{"rows": [{"name": "reference"}]}')
    return folder.root


@pytest.fixture(scope="module")
def checked(settings: DistillConfig) -> Preflight:
    """Networks and data, which are whole."""
    return run_preflight(settings)


def damage(path: Path, whole: bytes, seed: int) -> None:
    if path.suffix == ".yaml":
        path.write_bytes(mutate_text(whole.decode(), seed).encode("utf-8", "surrogatepass"))
    else:
        path.write_bytes(mutate_json(whole, seed))


def works_or_is_refused(read: Callable[[], object]) -> bool:
    """True if something could be read; anything but an error in words fails the test."""
    with time_limit():
        try:
            read()
        except SgmdError:
            return False
    return True


def resume(settings: DistillConfig, checked: Preflight, run: RunFolder) -> None:
    """Reads what a resume reads, in its order, and what the end of the run reads."""
    config = with_draws_of(settings, run)
    checkpoints = Checkpoints(str(run.checkpoints))
    start = resume_position(config, checked, run, checkpoints, lambda text: None)
    data = DataLog(run)
    run.rewind(start.iteration)
    data.rewind(start.iteration)
    data.progress(start.cursor, start.rows)
    metrics, lines = read_jsonl(run.metrics), read_jsonl(run.validation)
    AlarmWatch(config.alarms).replay(metrics, lines)
    UpdateGuard(config.guards, {}, 1.0, metrics)
    score = config.checkpoint.score
    ranking = ranked(scores_of(lines, score), config.checkpoint.mode)
    scored = (line for line in lines if score in line["figures"])
    contenders = [Contender.of_validation("one", line, score) for line in scored]
    not_told_apart(contenders, "checkpoints", score)
    summarise(config, run, data.counts(), ranking)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_commands_show_a_damaged_run_or_refuse_it_in_words(
    name: str, written: Path, tmp_path: Path
):
    run = Path(shutil.copytree(written, tmp_path / "run"))
    whole = (run / name).read_bytes()
    commands = (("report",), ("ledger",), ("ledger", "--json"), ("report", "--json"))
    for seed in range(CASES):
        damage(run / name, whole, seed)
        command, *options = commands[seed % len(commands)]
        with time_limit():
            done = CliRunner().invoke(app, [command, str(run), *options])
        assert done.exit_code in (0, 1, 2), (seed, done.output, done.exception)
        for sign in ("Traceback", "not a failure that sgmd knows"):
            assert sign not in done.output, (seed, done.output)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_run_is_gone_on_with_or_refused_in_words(
    name: str, settings: DistillConfig, checked: Preflight, written: Path, tmp_path: Path
):
    whole = RunFolder(shutil.copytree(written, tmp_path / "whole"))
    # What is refused below is refused for its damage.
    assert works_or_is_refused(lambda: resume(settings, checked, whole))
    for seed in range(CASES):
        run = RunFolder(shutil.copytree(written, tmp_path / "run"))
        damage(run.root / name, (run.root / name).read_bytes(), seed)
        works_or_is_refused(lambda run=run: resume(settings, checked, run))
        shutil.rmtree(run.root)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_results_of_a_damaged_run_are_taken_or_refused_in_words(
    name: str, written: Path, tmp_path: Path
):
    run = Path(shutil.copytree(written, tmp_path / "run"))
    whole = (run / name).read_bytes()
    options = EvaluationOptions(num_captions=2)
    reads = (
        lambda: plan_evaluation(run, None, None, None, None, options),
        partial(open_source, run, "best"),
        partial(open_source, run, "last"),
    )
    # What is refused below is refused for its damage.
    assert all(map(works_or_is_refused, reads))
    for seed in range(CASES):
        damage(run / name, whole, seed)
        for read in (reads[0], reads[1 + seed % 2]):
            works_or_is_refused(read)
