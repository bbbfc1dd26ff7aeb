"""What a disk has broken is found before a run goes on from it, and an older state is taken."""

import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from pipelines.config.recipe import DistillConfig, load_recipe
from pipelines.distillation.run import distill
from pipelines.reporting.page import write_report
from pipelines.run.folder import RunFolder, read_jsonl
from pipelines.run.observer import RunObserver
from pipelines.run.records import RunEvent
from sgmd_core.errors import CheckpointError
from tests.e2e.conftest import MakeRecipe
from tests.helpers.moves import assert_moves

Damage = Callable[[RunFolder], None]
END = 4
LAST = "step-000003"


class Hearing(RunObserver):
    """Keeps what the run warns of, and its events."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.events: list[RunEvent] = []

    def warning(self, text: str) -> None:
        self.warnings.append(text)

    def event(self, event: RunEvent) -> None:
        self.events.append(event)


@pytest.fixture(scope="module")
def stopped(module_recipe: MakeRecipe) -> DistillConfig:
    """A run of three iterations, each with its checkpoint."""
    config = module_recipe("name=stopped", "iterations=3", "checkpoint={every: 1, keep: 9}")
    distill(config)
    return config


@pytest.fixture(scope="module")
def whole(module_recipe: MakeRecipe) -> DistillConfig:
    """The same run, one iteration longer and never stopped."""
    config = module_recipe("name=whole", f"iterations={END}", "checkpoint={every: 1, keep: 9}")
    distill(config)
    return config


def losses_of(run: RunFolder) -> list[dict[str, float]]:
    """The losses of every iteration, which differ by far more than rounding."""
    losses = [line["losses"] for line in read_jsonl(run.metrics)]
    for one, other in pairwise(losses):
        assert_moves(one, other)
    return losses


def resumed(stopped: DistillConfig, folder: Path, damage: Damage) -> tuple[RunFolder, Hearing]:
    """Damages a copy of the run and goes on with it; the copy, and what was heard."""
    shutil.copytree(stopped.run_folder, folder)
    run, hearing = RunFolder(folder), Hearing()
    damage(run)
    config = load_recipe(str(run.config), [f"iterations={END}"]).in_folder(folder)
    distill(config, resume=True, observer=hearing)
    return run, hearing


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def flip_weights(run: RunFolder) -> None:
    flip(run.checkpoints / LAST / "fake_score" / "weights.safetensors")


def swap_roles(run: RunFolder) -> None:
    parts = run.checkpoints / LAST
    shutil.copy(parts / "fake_score" / "weights.safetensors", parts / "generator")


def swap_steps(run: RunFolder) -> None:
    shutil.rmtree(run.checkpoints / LAST)
    shutil.copytree(run.checkpoints / "step-000002", run.checkpoints / LAST)


def empty_parts(run: RunFolder) -> None:
    for path in (run.checkpoints / LAST).rglob("*.safetensors"):
        path.write_bytes(b"")


def manifest_of(content: str) -> Damage:
    def damage(run: RunFolder) -> None:
        (run.checkpoints / LAST / "manifest.json").write_text(content)

    return damage


def without(name: str) -> Damage:
    def damage(run: RunFolder) -> None:
        path = run.checkpoints / LAST / "manifest.json"
        content = json.loads(path.read_text())
        del content[name]
        path.write_text(json.dumps(content))

    return damage


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (flip_weights, "fake_score/weights.safetensors is not what was written"),
        (swap_roles, "generator/weights.safetensors is not what was written"),
        (swap_steps, "manifest.json is that of step 2"),
        (empty_parts, "is 0 bytes"),
        (manifest_of('{"iteration": 3, "fi'), "manifest.json: no JSON"),
        (manifest_of("{}"), "manifest.json: it names no parts"),
        (manifest_of('{"files": "all"}'), "manifest.json: files does not give"),
        (without("rows"), "manifest.json does not say where the run stood"),
        (without("cursor"), "manifest.json does not say where the run stood"),
    ],
)
def test_a_broken_checkpoint_is_named_and_the_one_before_it_makes_the_same_run(
    stopped: DistillConfig, whole: DistillConfig, tmp_path: Path, damage: Damage, why: str
) -> None:
    run, heard = resumed(stopped, tmp_path / "run", damage)
    fallback, restarted = heard.events
    assert (fallback.kind, fallback.iteration) == ("checkpoint_fallback", 2)
    assert fallback.cause.startswith("checkpoint 3 is broken (")
    assert why in fallback.cause
    assert fallback.action.endswith("went back to checkpoint 2")
    assert (restarted.kind, restarted.iteration) == ("restarted", 2)
    assert [line["kind"] for line in read_jsonl(run.events)] == ["checkpoint_fallback", "restarted"]
    assert heard.warnings == []
    assert losses_of(run) == losses_of(RunFolder(whole.run_folder))


@pytest.mark.slow
def test_without_a_whole_checkpoint_nothing_is_thrown_away(
    stopped: DistillConfig, tmp_path: Path
) -> None:
    def damage(run: RunFolder) -> None:
        for path in run.checkpoints.rglob("manifest.json"):
            path.write_text("{}")

    with pytest.raises(CheckpointError, match=r"checkpoint 3 is broken.*checkpoint 1 is broken"):
        resumed(stopped, tmp_path / "run", damage)
    assert len(read_jsonl(RunFolder(tmp_path / "run").metrics)) == 3


@pytest.mark.slow
@pytest.mark.parametrize("left", ["checkpoints", "nothing"])
def test_a_run_at_its_end_whose_checkpoints_are_gone_does_not_start_again(
    stopped: DistillConfig, tmp_path: Path, left: str
) -> None:
    def damage(run: RunFolder) -> None:
        shutil.rmtree(run.checkpoints)
        if left == "checkpoints":
            run.checkpoints.mkdir()

    with pytest.raises(CheckpointError, match=r"has come to its end.*Bring them back"):
        resumed(stopped, tmp_path / "run", damage)
    assert len(read_jsonl(RunFolder(tmp_path / "run").metrics)) == 3


@pytest.mark.slow
def test_a_checkpoint_of_an_older_version_is_loaded_with_a_note(
    stopped: DistillConfig, whole: DistillConfig, tmp_path: Path
) -> None:
    def damage(run: RunFolder) -> None:
        without("sha256")(run)
        without("step")(run)
        for path in (run.checkpoints / LAST).rglob("role.json"):
            counters = json.loads(path.read_text())
            kept = {name: counters[name] for name in ("updates", "has_optimizer")}
            old = json.dumps(kept).ljust(path.stat().st_size)
            path.write_text(old)

    run, heard = resumed(stopped, tmp_path / "run", damage)
    assert heard.warnings == [
        "checkpoint 3 has no digests: only the sizes of its parts were checked"
    ]
    assert losses_of(run) == losses_of(RunFolder(whole.run_folder))


@pytest.mark.slow
@pytest.mark.parametrize("broken", [b"\0" * 50, b'{"iteration": 1, "lo', b"{}", b"[]"])
def test_a_broken_line_of_a_log_is_named_and_the_run_goes_on(
    stopped: DistillConfig, whole: DistillConfig, tmp_path: Path, broken: bytes
) -> None:
    def damage(run: RunFolder) -> None:
        for path in (run.metrics, next(run.ledger.iterdir())):
            lines = path.read_bytes().splitlines()
            path.write_bytes(b"\n".join([lines[0], broken, *lines[2:], b""]))
        run.validation.write_bytes(broken + b"\n")
        run.ranking.write_bytes(broken)
        run.summary.write_bytes(broken)

    run, heard = resumed(stopped, tmp_path / "run", damage)
    (gap,) = [text for text in heard.warnings if "no line of 1 of the 3 iterations" in text]
    assert "the first is 1" in gap
    others = [text for text in heard.warnings if text != gap]
    assert sorted(text.partition(": ")[2].partition(":")[0] for text in others) == [
        "1 broken line(s) left out (line 1",
        "1 broken line(s) left out (line 2",
        "1 broken line(s) left out (line 2",
    ]
    assert [line["iteration"] for line in read_jsonl(run.metrics)] == [0, 2, 3]
    assert losses_of(run)[-1] == losses_of(RunFolder(whole.run_folder))[-1]
    assert json.loads(run.summary.read_text())["iterations"] == END
    write_report([run.root], tmp_path / "report.html")


@pytest.mark.slow
def test_a_quarantine_that_cannot_be_read_says_what_to_do(
    stopped: DistillConfig, tmp_path: Path
) -> None:
    def damage(run: RunFolder) -> None:
        run.quarantine.write_bytes(b"x")

    with pytest.raises(CheckpointError, match=r"quarantine\.parquet.*Move the file away"):
        resumed(stopped, tmp_path / "run", damage)
    assert len(read_jsonl(RunFolder(tmp_path / "run").metrics)) == 3
