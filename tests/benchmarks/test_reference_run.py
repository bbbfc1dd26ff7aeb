"""The record of a reference run: one's own run beside it, equal and otherwise."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from pipelines.config.recipe import load_recipe
from pipelines.run.folder import RunFolder, append_jsonl
from pipelines.run.records import ValidationRecord
from tests.helpers.records import iteration_record

ROOT = Path(__file__).parents[2]
MakeRun = Callable[..., Path]


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "reference_run", ROOT / "benchmarks" / "reference_run.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def make_run(tmp_path: Path, benchmark: ModuleType) -> MakeRun:
    """Writes what the benchmark reads of a run folder."""

    def make(name: str, *settings: str, seed: int = 0, late: float = 1.0) -> Path:
        run = RunFolder(tmp_path / name)
        run.root.mkdir()
        run.config.write_text(load_recipe("tiny", [f"seed={seed}", *settings]).to_yaml())
        for iteration in range(40):
            loss = (1.0 + 0.1 * seed + 0.01 * iteration) * (late if iteration >= 20 else 1.0)
            record = iteration_record(
                iteration,
                losses=dict.fromkeys(benchmark.LOSSES, loss),
                seconds_total=0.4,
                samples_seen=16,
                epoch=0.1,
                exit_steps=(0,),
            )
            append_jsonl(run.metrics, record.to_json())
        for iteration, distance in ((20, 0.3), (40, 0.2 * late)):
            figures = {"frechet": distance + 0.01 * seed, "colour": 1.0}
            validation = ValidationRecord(iteration, figures, 1.0, "sheet.png")
            append_jsonl(run.validation, validation.to_json())
        return run.root

    return make


@pytest.mark.slow
def test_a_run_is_told_from_the_record_by_settings_rounding_and_range(
    make_run: MakeRun, benchmark: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark.record([make_run(f"recorded-{seed}", seed=seed) for seed in range(3)], tmp_path)
    reference = tmp_path / benchmark.RECORD
    assert "seed 1: best 0.2100, end 0.2100, 1.00 of the best" in capsys.readouterr().out
    assert {path.name for path in tmp_path.glob("*.svg")} == {"tracking.svg", "frechet.svg"}

    again = make_run("again", "output=elsewhere", "topology.mode=local", seed=1)
    assert benchmark.compare(again, reference) == 0
    said = capsys.readouterr().out
    assert "at most 0.0e+00 off (rounding)" in said
    assert "other settings" not in said
    assert "0 out of range" in said

    # A seed that is not recorded has its range alone.
    assert benchmark.compare(make_run("other", seed=3), reference) == 0
    assert "seed 3 was not recorded (but 0, 1, 2)" in capsys.readouterr().out

    # Three losses of the second window and one figure.
    assert benchmark.compare(make_run("worse", seed=1, late=2.0), reference) == 4
    assert "OUT OF RANGE" in capsys.readouterr().out

    changed = make_run("changed", "objective.lambda_nr=0.5", seed=1)
    assert benchmark.compare(changed, reference) == 0
    assert "other settings than the record's: objective.lambda_nr" in capsys.readouterr().out


@pytest.mark.slow
def test_runs_of_different_settings_make_no_record(
    make_run: MakeRun, benchmark: ModuleType, tmp_path: Path
) -> None:
    runs = [make_run("one"), make_run("two", "objective.lambda_nr=0.5", seed=1)]
    with pytest.raises(SystemExit, match=r"two has other settings than .*objective\.lambda_nr"):
        benchmark.record(runs, tmp_path / "out")
    assert not (tmp_path / "out").exists()
