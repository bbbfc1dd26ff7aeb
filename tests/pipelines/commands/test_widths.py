"""Every table at the widths of real terminals: no line is longer, no cell is cut to nothing."""

from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.commands.comparing import result_words
from pipelines.commands.evaluation_table import table
from pipelines.commands.output import pairs
from pipelines.commands.results import ledger_table
from pipelines.commands.run_summary import summary_words
from pipelines.commands.sweeping import sweep_words
from pipelines.config.figures import HEADLINE_FIGURES
from pipelines.data.stream.plan import Cursor
from pipelines.data.stream.reconciliation import EpochReconciliation
from pipelines.distillation.audit import Audit
from pipelines.study.measured_runs import Point, RunResult
from pipelines.study.results import StudyResult
from pipelines.sweeping.results import SweepResult
from pipelines.sweeping.trials import Trial
from tests.helpers.runs import evaluation
from tests.pipelines.commands.rendering import rendered

FIGURES = {name: 0.123456 for name in HEADLINE_FIGURES}


def sweep_result(folder: Path) -> SweepResult:
    trials = [
        Trial(
            {"objective.lambda_nr": nr, "generator.optimizer.lr": 1e-5},
            FIGURES | {"frechet": 0.1234 + nr},
            1234.5,
            "run",
            "",
            {"frechet": (0.1, 0.3)},
        )
        for nr in (0.05, 0.1)
    ]
    error = "DataError: While reading shard-0.parquet: a torn file. Download it again"
    failed = Trial({"objective.lambda_nr": 9.0, "generator.optimizer.lr": 1e-5}, {}, 0, "r", error)
    failed = replace(failed, state="failed")
    best = folder / "best.yaml"
    return SweepResult("frechet", (*trials, failed), folder, best, {"frechet": "min"})


def study_result() -> StudyResult:
    figures = {
        "frechet": 0.1234,
        **dict.fromkeys(("flow_top", "smoothness", "flicker", "saturation", "sharpness"), 1.0),
        **dict.fromkeys(("diversity", "colour", "shape", "direction"), 0.9),
    }
    runs = tuple(
        RunResult(variant, seed, "run", (Point(4000, 48000.0, 3600.0, figures),), {}, 0.9)
        for variant in ("sgmd-shared-released", "sgmd-fresh-paper")
        for seed in (0, 1)
    )
    sets = ("reference", "floor", "teacher_few", "teacher_few_guided")
    return StudyResult(
        "tiny",
        ("forwards", 48000),
        (0, 1),
        128,
        dict.fromkeys(sets, figures),
        ("sgmd-shared-released", "sgmd-fresh-paper"),
        {},
        runs,
        {},
    )


def ledger() -> Audit:
    epoch = EpochReconciliation(3, 1234567, 1234560, 4, 1, 2, 0, ["part-0.parquet:17"] * 5)
    return Audit(1000, 1234560, Cursor(), (epoch,), {}, True, 0, has_metrics=True)


def results(folder: Path) -> dict[str, list]:
    return {
        "sweep": sweep_words(sweep_result(folder)),
        "study": result_words(study_result(), "runs/study", ("results.md", "results.csv")),
        "evaluate": [table(evaluation())],
        "ledger": [ledger_table(ledger())],
        "pairs": [pairs({"clips": 12345678, "rejected": {"bad": 3}, "seconds": 0.1234567})],
    }


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("name", ["sweep", "study", "evaluate", "ledger", "pairs"])
def test_no_line_is_longer_than_the_terminal_and_no_cell_is_cut(
    tmp_path: Path, name: str, columns: int
) -> None:
    text = rendered(results(tmp_path)[name], columns)
    lines = text.splitlines()
    assert max(map(len, lines)) <= columns
    assert "…" not in text
    for fragment in {
        "sweep": ("0.1734", "1234.5", "generator.optimizer.lr", "failed"),
        "study": ("sgmd-shared-released", "0.1234 ± 0.0000", "Fréchet"),
        "evaluate": ("distance", "s/video", "ratio to teacher"),
        "ledger": ("quarantined", "used once", "1234560"),
        "pairs": ("12345678", "rejected.bad", "0.1235"),
    }[name]:
        # Whole, in one line.
        assert any(fragment in line for line in lines), fragment


def test_values_are_shown_without_brackets_quotes_and_names_of_python() -> None:
    values = {"latent_shape": (16, 2, 3), "words": [], "limit": None, "whole": True, "name": "[x]"}
    text = rendered([pairs({"encoding": values})], 80)
    found = dict(line.split(maxsplit=1) for line in text.splitlines() if line.strip())
    assert {name: words.strip() for name, words in found.items()} == {
        "encoding.latent_shape": "16, 2, 3",
        "encoding.words": "none",
        "encoding.limit": "none",
        "encoding.whole": "yes",
        "encoding.name": "[x]",
    }


def test_a_sweep_names_figures_without_room_the_error_itself_and_the_next_step_last(
    tmp_path: Path,
) -> None:
    words = sweep_words(sweep_result(tmp_path))
    narrow, wide = (rendered(words, columns) for columns in (80, 400))
    # A long path is broken where a line ends.
    assert f"alsoin{tmp_path}/sweep.csv:" in "".join(narrow.split())
    assert "also in" not in wide
    assert (
        "failed, objective.lambda_nr=9, generator.optimizer.lr=1e-05, seed 0: DataError: While"
        in wide
    )
    assert "trials (objective.lambda_nr=0.05, generator.optimizer.lr=1e-05)" in wide
    assert wide.splitlines()[-1] == f"next: sgmd distill {tmp_path}/best.yaml"


def test_the_summary_of_a_run_is_short_with_the_next_step_on_top() -> None:
    summary = {
        "name": "demo",
        "iterations": 400,
        "seconds": 3600.0,
        "samples_seen": 6400,
        "run_folder": "runs/demo",
        "generator": "runs/demo/generator",
        "validation": FIGURES,
        "best": [{"iteration": 300, "score": 0.1}],
        "ranking_note": "checkpoints 300 and 200 are not told apart by these clips: ...",
        "quarantined": {"empty_caption": 3, "broken_video": 2},
        "alarms": 2,
        "validation_problem": "The validation of iteration 300 failed, and no other one is made.",
    }
    for columns in (80, 120):
        lines = rendered(summary_words(summary), columns).splitlines()
        assert len(lines) <= 16
        assert max(map(len, lines)) <= columns
        assert lines[1].startswith("next: sgmd evaluate runs/demo")
        assert not any(mark in "\n".join(lines) for mark in ("{", "}", "None", "PosixPath"))
    # An evaluation of a generator that cannot make clips would be refused.
    lines = rendered(summary_words(summary | {"left_out": ["vae"]}), 120).splitlines()
    assert lines[1] == "next: sgmd report runs/demo"
    assert lines[2].strip() == "sgmd evaluate runs/demo, once runs/demo/generator has its vae"
