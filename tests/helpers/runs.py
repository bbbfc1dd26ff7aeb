"""Run folders as far as one likes: started, finished, evaluated, with clips of real video."""

import json
import math
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipelines.config.recipe import load_recipe
from pipelines.evaluation.result import (
    GENERATOR,
    ErrorBar,
    Evaluation,
    EvaluationRow,
    Figure,
    MeasuredFigure,
    evaluate_criteria,
)
from pipelines.media.clip_files import SheetGroup
from pipelines.media.contact_sheet import write_contact_sheet
from pipelines.run.folder import RunFolder, append_jsonl
from pipelines.run.records import ValidationRecord
from pipelines.shapes import FPS, ClipSplit, render_batch
from tests.helpers.records import iteration_record
from workers.samplings import FLOOR, REFERENCE, TEACHER_FEW

NUM_ITERATIONS = 60


def write_sheet(folder: Path, name: str, *, generator_seed: int = 1) -> None:
    """A contact sheet of two captions, the clips rendered as the data set renders them."""
    for file, content in _sheet(name, generator_seed).items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(content)


@cache
def _sheet(name: str, generator_seed: int) -> dict[str, bytes]:
    """Files of a sheet, drawn once: clips take the longest of all that a run has."""
    reference, captions = render_batch(0, [1, 2], ClipSplit.TRAIN)
    own, _ = render_batch(generator_seed, [1, 2], ClipSplit.TRAIN)
    groups = [
        SheetGroup("teacher, 30 steps", "guidance 2", list(reference)),
        SheetGroup("teacher, 4 steps", "unguided", list(reference[::-1])),
        SheetGroup("generator, 4 steps", "unguided", list(own)),
    ]
    with TemporaryDirectory() as place:
        folder = Path(place)
        png, gif = folder / f"{name}.png", folder / f"{name}.gif"
        write_contact_sheet(png, gif, groups, [str(caption) for caption in captions], fps=FPS)
        files = (path for path in folder.rglob("*") if path.is_file())
        return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def start_run(
    folder: Path,
    num_iterations: int = NUM_ITERATIONS,
    *,
    name: str = "demo",
    overrides: tuple[str, ...] = (),
) -> Path:
    """A run as far as its last recorded iteration."""
    run = RunFolder(folder)
    settings = [f"iterations={NUM_ITERATIONS}", f"name={name}", *overrides]
    run.create(load_recipe("tiny", settings).to_yaml())
    for iteration in range(num_iterations):
        record = iteration_record(
            iteration,
            losses={"fisher": 1 / (iteration + 1), "residual_contraction": 0.5, "own_term": 3.0},
            grad_norms={"generator": 0.1 + iteration, "fake_score": math.exp(-iteration / 9)},
            seconds={"generator.rollout": 0.2, "fake_score.signal": 0.3},
            seconds_total=0.4,
            data_wait_s=0.01,
            samples_seen=16 * (iteration + 1),
            epoch=0.1,
            exit_steps=(0, 3),
        )
        append_jsonl(run.metrics, record.to_json())
    return folder


def evaluation(*, generator_colour: float = 0.9) -> Evaluation:
    """An evaluation of four ways of sampling."""
    facts: dict[str, Any] = {"num_steps": 4, "guidance_scale": 1.0, "seed": 1, "remembered": False}
    read = {"colour": 0.9, "shape": 0.9, "direction": 0.8, "speed_spearman": 0.9}
    read |= {"mean_speed_px_per_frame": 1.0, "speed_ratio": 1.0, "seconds_per_clip": 0.5}
    far: dict[str, Any] = {
        "frechet": Figure(value=3, error=0.1),
        "above_floor": Figure(value=2, error=0.1),
    }
    reference = {**facts, **read, "num_steps": 30, "seconds_per_clip": 2.0}
    rows = [EvaluationRow(name=REFERENCE, label="teacher, 30 guided steps", **reference)]
    rows += [
        EvaluationRow(
            name=name,
            label=name,
            **{**facts, **read, "colour": generator_colour if name == GENERATOR else 0.9},
            **far,
            ratio=Figure(value=0.2, error=0.1),
        )
        for name in (FLOOR, TEACHER_FEW, GENERATOR)
    ]
    measure = MeasuredFigure(
        value=0.9, low=0.8, high=1.0, ratio=ErrorBar(value=0.75, low=0.7, high=0.8)
    )
    measures = {"flow": measure, "flow_top": measure, "saturation": measure, "diversity": measure}
    rows = [
        row if row.name == REFERENCE else row.model_copy(update={"measures": measures})
        for row in rows
    ]
    return Evaluation(
        generator="generator",
        teacher="teacher",
        captions="captions",
        num_captions=256,
        num_distinct_captions=36,
        batch_size=16,
        device="cpu",
        rows=tuple(rows),
        verdicts=evaluate_criteria(rows),
        sheet_png="samples/evaluation.png",
        sheet_gif="samples/evaluation.gif",
        versions={"torch": "2"},
    )


def finish_run(
    folder: Path,
    *,
    name: str = "demo",
    overrides: tuple[str, ...] = (),
    generator_seed: int = 1,
    generator_colour: float = 0.9,
) -> Path:
    """Everything that a finished and evaluated run has."""
    run = RunFolder(start_run(folder, name=name, overrides=overrides))
    for iteration in (20, 40, 60):
        sheet = f"validation-{iteration:06d}"
        write_sheet(run.samples, sheet)
        figures = {"frechet": 1 / iteration, "colour": 0.9, "flow_top": 1.0, "flow_top_ratio": 0.9}
        append_jsonl(
            run.validation, ValidationRecord(iteration, figures, 3.0, f"{sheet}.png").to_json()
        )
    states = [
        {"iteration": at, "score": 1 / at, "checkpoint": "step" if at > 20 else None}
        for at in (60, 40, 20)
    ]
    run.ranking.write_text(json.dumps({"score": "frechet", "mode": "min", "states": states}))
    summary = {"seed": 0, "config_digest": "abc123", "versions": {"torch": "2.13.0"}}
    run.summary.write_text(json.dumps(summary))
    write_sheet(run.samples, "evaluation", generator_seed=generator_seed)
    evaluation(generator_colour=generator_colour).save(folder / "evaluation.json")
    return folder


def write_alarms(folder: Path, *alarms: dict[str, object]) -> None:
    """alarms.jsonl, one line each."""
    for alarm in alarms:
        append_jsonl(folder / "alarms.jsonl", alarm)
