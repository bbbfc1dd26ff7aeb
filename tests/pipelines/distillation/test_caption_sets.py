"""A run that draws from two sets: its ledgers, its resumption to the bit, and what it refuses."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.config.recipe import DistillConfig, load_recipe
from pipelines.data.stream.ledger import Ledger
from pipelines.data.stream.mixing import drawn_sets
from pipelines.distillation.audit import audit
from pipelines.distillation.run import distill, dry_run
from pipelines.run.folder import RunFolder, read_jsonl
from sgmd_core.errors import CheckpointError, ConfigError
from tests.e2e.test_equivalence import state
from tests.helpers.moves import assert_moves
from workers.role_state import load_role

pytestmark = pytest.mark.slow

RED = [f"a red {shape} moves {way}" for shape in ("circle", "square") for way in ("left", "right")]
BLUE = ["a blue circle moves left", "a blue square moves right", "a blue circle moves right"]
ITERATIONS, SIZE = 6, 4


@pytest.fixture
def recipe(tmp_path: Path):
    (tmp_path / "red.txt").write_text("\n".join(RED))
    (tmp_path / "blue.txt").write_text("\n".join(BLUE))

    def make(name: str, *settings: str) -> DistillConfig:
        return load_recipe(
            "tiny",
            [
                f"name={name}",
                f"data.train={tmp_path / 'red.txt'}",
                f"data.also=[{{source: {tmp_path / 'blue.txt'}, weight: 0.5}}]",
                f"output={tmp_path}",
                "validation.every=0",
                "checkpoint.keep_best=0",
                f"iterations={ITERATIONS}",
                f"batch={{size: {SIZE}, micro_batches: 2}}",
                "topology.mode=local",
                *settings,
            ],
        )

    return make


def used(config: DistillConfig, number: int) -> list[tuple[str, ...]]:
    folder = RunFolder(config.run_folder).of_set(number)
    return [entry.sample_ids for entry in Ledger(folder.ledger).entries()]


def test_a_run_of_two_sets_keeps_books_of_both_and_resumes_to_the_bit(recipe):
    whole, parted = recipe("whole"), recipe("parted")
    planned = dry_run(whole)
    assert [one["rows"] for one in planned["further_sets"]] == [3]
    assert planned["epochs"] == pytest.approx(ITERATIONS * SIZE * (2 / 3) / 4)
    summary = distill(whole)
    assert summary["samples_seen"] == ITERATIONS * SIZE
    sets = drawn_sets(whole.seed, 0, ITERATIONS * SIZE, (1.0, 0.5))
    assert 0 < sets.sum() < len(sets)
    for number in (0, 1):
        assert len(used(whole, number)) == ITERATIONS
        assert sum(map(len, used(whole, number))) == (sets == number).sum()
    found = audit(whole.run_folder)
    assert found.is_clean
    assert (found.samples, found.samples_of_all) == ((sets == 0).sum(), ITERATIONS * SIZE)
    told = CliRunner().invoke(app, ["ledger", str(whole.run_folder)])
    assert told.exit_code == 0
    assert "data.also[0]" in told.output

    distill(recipe("parted", "iterations=3"))
    distill(parted, resume=True)
    for number in (0, 1):
        assert used(parted, number) == used(whole, number)
    assert state(parted, ITERATIONS) == state(whole, ITERATIONS)
    assert audit(parted.run_folder).is_clean
    # Without the second set other captions come, and other weights.
    alone = recipe("alone", "data.also=[]")
    distill(alone)
    weights = [
        load_role(str(RunFolder(one.run_folder).checkpoints / "step-000006"), "generator").weights
        for one in (whole, alone)
    ]
    assert_moves(weights[0], weights[1])


def test_what_does_not_go_with_the_sets_of_a_run_is_refused_by_name(recipe, tmp_path):
    config = recipe("run", "iterations=2")
    distill(config)
    with pytest.raises(CheckpointError, match=r"data\.also"):
        distill(recipe("run", "data.also=[]"), resume=True)
    with pytest.raises(CheckpointError, match=r"data\.weight"):
        distill(recipe("run", "data.weight=2"), resume=True)
    (tmp_path / "blue.txt").write_text("\n".join([*BLUE[:2], "a green circle moves left"]))
    with pytest.raises(CheckpointError, match=r"data\.also\[0\]|captions"):
        distill(recipe("run"), resume=True)
    (tmp_path / "blue.txt").write_text("\n".join(BLUE))
    (path,) = RunFolder(config.run_folder).of_set(1).ledger.iterdir()
    path.write_text(path.read_text().splitlines(keepends=True)[0])
    with pytest.raises(CheckpointError, match="its ledger ends at iteration 0"):
        distill(recipe("run"), resume=True)
    with pytest.raises(ConfigError, match=r"also.*weight"):
        recipe("other", "data.also=[{source: x.txt, weight: 0}]")


def test_a_set_that_lost_a_sample_is_told_of_by_the_ledger(recipe):
    config = recipe("lost")
    distill(config)
    (path,) = RunFolder(config.run_folder).of_set(1).ledger.iterdir()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    place = next(line for line in lines if line["ids"])
    place["ids"], place["epochs"] = place["ids"][1:], [[0, len(place["ids"]) - 1]]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert not audit(config.run_folder).is_clean
    assert read_jsonl(RunFolder(config.run_folder).of_set(1).shards)
