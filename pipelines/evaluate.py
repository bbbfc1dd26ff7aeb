"""What a distillation has reached: a few-step generator against its teacher, with floor and error.

    plan -> sets of clips -> exact readings, distances, seconds -> rows -> verdicts -> files

What is compared is told in `pipelines.evaluation_plan`. Nothing here can be tuned towards a
verdict: what is measured is the same for every run.
"""

import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from pipelines.clip_sets import (
    ClipRequest,
    ClipSet,
    folder_digest,
    load_clip_set,
    sample_clip_set,
    save_clip_set,
    set_name,
)
from pipelines.contact_sheet import SheetGroup, write_contact_sheet
from pipelines.evaluation import (
    FLOOR,
    GENERATOR,
    REFERENCE,
    TEACHER_FEW,
    TEACHER_FEW_GUIDED,
    Evaluation,
    EvaluationRow,
    Figure,
    judge,
)
from pipelines.evaluation_plan import EvaluationOptions, EvaluationPlan, plan_evaluation
from pipelines.run_folder import versions
from pipelines.set_distances import Estimate, SetDistance, set_distances
from pipelines.validation import reads_shapes
from sgmd_core.metrics.shapes import ClipScores, labels_from_captions, score_clips
from workers.evaluator import Evaluator

OnProgress = Callable[[str, int, int], None]
EVALUATION_FILE = "evaluation.json"
_CACHE_FOLDER = "evaluation-cache"
_SHEET_NAME = "evaluation"


def evaluate(
    run_or_model: str | Path,
    *,
    teacher: str | Path | None = None,
    captions: str | None = None,
    output: str | Path | None = None,
    options: EvaluationOptions | None = None,
    on_progress: OnProgress = lambda label, done, total: None,
) -> Evaluation:
    """Samples, measures and judges; writes evaluation.json and the contact sheet.

    Args:
        run_or_model: A finished run, or a diffusers folder.
        teacher: Diffusers folder of the teacher; a run knows its own.
        captions: Folder of shards with held-out captions; a run knows its own.
        output: Where the results go; a run's are put into its folder, others into `evaluation/`.
        options: How much is sampled; None takes the defaults.
        on_progress: Called after every batch with (what is sampled, clips done, clips in all).

    Returns:
        The evaluation, as evaluation.json holds it.

    Raises:
        ConfigError: Something is missing or out of range.
        ModelFolderError: A folder is missing, incomplete or not Wan's.
        ShapeError: The clips do not fit the networks.
        DataError: The captions cannot be read.
    """
    options = options or EvaluationOptions()
    plan = plan_evaluation(run_or_model, teacher, captions, output, options)
    shown = _first_different(plan.captions, options.num_shown)
    request = ClipRequest(
        captions=plan.captions,
        sampling=plan.samplings[REFERENCE],
        batch_size=options.batch_size,
        reads_shapes=reads_shapes(plan.captions),
        shown=shown,
    )
    sets = _teacher_sets(plan, request, on_progress)
    sets[GENERATOR] = sample_clip_set(
        plan.generator.evaluator(options),
        replace(request, sampling=plan.samplings[GENERATOR]),
        lambda done, total: on_progress(plan.label(GENERATOR), done, total),
    )
    rows = _rows(plan, sets)
    png, gif = _draw(plan, sets, [plan.captions[index] for index in shown])
    evaluation = Evaluation(
        generator=str(plan.generator.folder),
        teacher=str(plan.teacher.folder),
        captions=plan.captions_from,
        num_captions=len(plan.captions),
        num_distinct_captions=len(set(plan.captions)),
        batch_size=options.batch_size,
        device=_device_name(options),
        rows=rows,
        verdicts=judge(rows),
        sheet_png=str(png.relative_to(plan.output)),
        sheet_gif=str(gif.relative_to(plan.output)),
        versions=versions(),
    )
    evaluation.save(plan.output / EVALUATION_FILE)
    return evaluation


def _first_different(captions: Sequence[str], count: int) -> tuple[int, ...]:
    """Indices of the first captions that have not come before."""
    first = {caption: index for index, caption in reversed(list(enumerate(captions)))}
    return tuple(sorted(first.values())[:count])


def _teacher_sets(
    plan: EvaluationPlan, request: ClipRequest, on_progress: OnProgress
) -> dict[str, ClipSet]:
    """The teacher's sets, from an earlier evaluation where they are the same."""
    on_progress("reading the teacher", 0, 1)
    digest = folder_digest(plan.teacher.folder)
    on_progress("reading the teacher", 1, 1)
    evaluator: Evaluator | None = None
    sets: dict[str, ClipSet] = {}
    for name in (REFERENCE, FLOOR, TEACHER_FEW, TEACHER_FEW_GUIDED):
        wanted = replace(request, sampling=plan.samplings[name])
        subject = plan.teacher
        key = set_name(digest, wanted, subject.facts)
        path = plan.output / _CACHE_FOLDER / f"{key}.npz"
        if path.exists():
            sets[name] = load_clip_set(path)
            continue
        evaluator = evaluator or subject.evaluator(plan.options)
        label = plan.label(name)
        sets[name] = sample_clip_set(
            evaluator, wanted, lambda done, total, label=label: on_progress(label, done, total)
        )
        save_clip_set(path, sets[name])
    return sets


def _rows(plan: EvaluationPlan, sets: dict[str, ClipSet]) -> tuple[EvaluationRow, ...]:
    distances = set_distances(
        sets[REFERENCE].features,
        {name: clips.features for name, clips in sets.items() if name != REFERENCE},
        floor=FLOOR,
        baseline=TEACHER_FEW,
        num_bootstraps=plan.options.num_bootstraps,
        seed=plan.options.seed,
    )
    scores = {name: _scores(clips, plan.captions) for name, clips in sets.items()}
    return tuple(
        _row(name, plan, clips, scores[name], scores[REFERENCE], distances.get(name))
        for name, clips in sets.items()
    )


def _row(
    name: str,
    plan: EvaluationPlan,
    clips: ClipSet,
    scores: ClipScores | None,
    reference: ClipScores | None,
    distance: SetDistance | None,
) -> EvaluationRow:
    how = plan.samplings[name]
    row = EvaluationRow(
        name=name,
        label=plan.label(name),
        num_steps=how.num_steps,
        guidance_scale=how.guidance_scale,
        seed=how.seed,
        seconds_per_clip=clips.seconds_per_clip,
        remembered=clips.remembered,
    )
    figures: dict[str, float | Figure | None] = {}
    if scores is not None and reference is not None:
        figures |= {
            "colour": scores.colour,
            "shape": scores.shape,
            "direction": scores.direction,
            "speed_spearman": scores.speed_spearman,
            "mean_speed_px_per_frame": scores.mean_speed_px_per_frame,
            "speed_ratio": _over(scores.mean_speed_px_per_frame, reference.mean_speed_px_per_frame),
        }
    if distance is not None:
        figures |= {
            "frechet": _figure(distance.distance),
            "above_floor": _figure(distance.above_floor),
            "ratio": _figure(distance.ratio),
        }
    return row.model_copy(update=figures)


def _scores(clips: ClipSet, captions: Sequence[str]) -> ClipScores | None:
    if clips.reading is None:
        return None
    return score_clips(clips.reading, labels_from_captions(captions))


def _over(value: float, reference: float) -> float | None:
    """A ratio, where there is something to divide by: clips may stand still."""
    return value / reference if reference > 0 else None


def _figure(estimate: Estimate) -> Figure:
    return Figure(value=estimate.value, error=estimate.error)


def _draw(
    plan: EvaluationPlan, sets: dict[str, ClipSet], prompts: Sequence[str]
) -> tuple[Path, Path]:
    """The sheet; its groups are sets of one seed, so each row starts from the same noise."""
    groups: list[SheetGroup] = []
    for name in (FLOOR, TEACHER_FEW, GENERATOR):
        how = plan.samplings[name]
        who = "generator" if name == GENERATOR else "teacher"
        note = "unguided" if how.guidance_scale == 1 else f"guidance {how.guidance_scale:g}"
        groups.append(SheetGroup(f"{who}, {how.num_steps} steps", note, sets[name].shown))
    folder = plan.output / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    png, gif = folder / f"{_SHEET_NAME}.png", folder / f"{_SHEET_NAME}.gif"
    write_contact_sheet(png, gif, groups, prompts, plan.generator.video.fps)
    return png, gif


def _device_name(options: EvaluationOptions) -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    threads = options.num_threads or os.cpu_count() or 1
    return f"{platform.machine()} CPU, {threads} threads"
