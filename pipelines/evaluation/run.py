"""Evaluates a few-step generator against its teacher, with floor and error.

    plan -> sets of clips -> readings, measures, distances, seconds -> rows -> verdicts -> files

`pipelines.evaluation.plan` states what is compared. Nothing here can be tuned towards a
verdict: what is measured is the same for every run.

Whatever comes from the teacher is kept as numbers in the plan's cache and sampled only once. Many
generators of one teacher, evaluated with the same options and one `cache` folder, therefore cost a
few steps a clip each:

    for run in runs:
        evaluate(run, cache=folder, options=EvaluationOptions(num_captions=64))
"""

import hashlib
import math
import platform
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from pipelines.evaluation.plan import EvaluationOptions, EvaluationPlan, plan_evaluation
from pipelines.evaluation.result import (
    BUILT_IN_FEATURES,
    GENERATOR,
    ErrorBar,
    Evaluation,
    EvaluationRow,
    Figure,
    MeasuredFigure,
    evaluate_criteria,
)
from pipelines.evaluation.set_distances import SetDistance, set_distances
from pipelines.evaluation.teacher_sets import TEACHER_SETS, NamedExtractor, TeacherSets
from pipelines.media.contact_sheet import SheetGroup, write_contact_sheet
from pipelines.run.opened_copy import hold_place, run_copy, working_copy
from pipelines.run.outputs import require_inside, require_lasting_folder
from pipelines.run.revision import versions
from sgmd_core.metrics.bootstrap import (
    median_interval,
    median_ratio_interval,
    resampled_rows,
)
from sgmd_core.metrics.comparison import Compared, compare_sets
from sgmd_core.metrics.frechet import Features
from sgmd_core.worlds.readings import WorldScores, motion_of, score_reading, world_of
from sgmd_core.worlds.shapes import ClipScores
from workers.clip_sets import ClipRequest, ClipSet, sample_clip_set
from workers.evaluator import Evaluator
from workers.feature_network import FeatureNetwork
from workers.models.content import fingerprint
from workers.samplings import FLOOR, REFERENCE, TEACHER_FEW
from workers.set_measures import compare_motions

OnProgress = Callable[[str, int, int], None]
EVALUATION_FILE = "evaluation.json"
_SHEET_FOLDER, _SHEET_NAME = "samples", "evaluation"


def evaluate(
    run_or_model: str | Path,
    *,
    teacher: str | Path | None = None,
    captions: str | None = None,
    output: str | Path | None = None,
    cache: str | Path | None = None,
    options: EvaluationOptions | None = None,
    on_progress: OnProgress = lambda label, done, total: None,
) -> Evaluation:
    """Samples, measures and judges; writes evaluation.json and the contact sheet.

    Args:
        run_or_model: A finished run, or a diffusers folder: a path or an address.
        teacher: Diffusers folder of the teacher; a run knows its own.
        captions: Folder of shards, or file, with held-out captions; a run knows its own.
        output: Where the results go; a run's are put into its folder, others into `evaluation/`.
        cache: Folder that keeps what was measured of the teacher, shared by as many evaluations
            as one likes; None takes `evaluation-cache/` beside the results. Entries are named by
            all that decides them: the teacher's content, captions, options and measuring code.
        options: How much is sampled; None takes the defaults.
        on_progress: Called after every batch with (what is sampled, clips done, clips in all).

    Returns:
        The evaluation, as evaluation.json holds it.

    Raises:
        ConfigError: Something is missing or out of range.
        ModelFolderError: A folder is missing, incomplete or of no known family, or the teacher of
            the run has changed since.
        ShapeError: The clips do not fit the networks.
        DataError: The captions cannot be read.
        LeaseError: Another process evaluates into the same folder.
    """
    options = options or EvaluationOptions()
    for folder, option in ((output, "--output"), (cache, "--cache")):
        if folder:
            require_lasting_folder(folder, option)
    with (
        run_copy(run_or_model) as run,
        working_copy(output) if output else nullcontext() as results,
        working_copy(cache) if cache else nullcontext() as kept,
    ):
        plan = plan_evaluation(run, teacher, captions, results, kept, options)
        # Not the folder itself: a run may train on while its last generator is evaluated.
        _require_no_way_out(plan.output, None if cache else plan.cache)
        with hold_place(plan.output / _SHEET_FOLDER, "sgmd evaluate"):
            return _evaluate(plan, options, on_progress)


def _evaluate(
    plan: EvaluationPlan, options: EvaluationOptions, on_progress: OnProgress
) -> Evaluation:
    """Carries out a checked evaluation in a folder that this process holds."""
    features = _features(options)
    shown = _first_different(plan.captions, options.num_shown)
    request = ClipRequest(
        captions=plan.captions,
        sampling=plan.samplings[REFERENCE],
        batch_size=options.batch_size,
        fps=plan.generator.video.fps,
        world=world_of(plan.captions),
        shown=shown,
    )
    sets, twins, side_by_side = _sample_sets(plan, request, features, on_progress)
    rows = _rows(plan, sets, twins)
    png, gif = _draw(plan, sets, [plan.captions[index] for index in shown])
    evaluation = Evaluation(
        generator=plan.generator_place,
        teacher=str(plan.teacher.folder),
        captions=plan.captions_from,
        num_captions=len(plan.captions),
        num_distinct_captions=len(set(plan.captions)),
        batch_size=side_by_side,
        device=_device_name(options),
        rows=rows,
        verdicts=evaluate_criteria(rows),
        sheet_png=str(png.relative_to(plan.output)),
        sheet_gif=str(gif.relative_to(plan.output)),
        versions=versions(),
        features=BUILT_IN_FEATURES if options.features is None else str(options.features),
    )
    evaluation.save(plan.output / EVALUATION_FILE)
    return evaluation


def _first_different(captions: Sequence[str], count: int) -> tuple[int, ...]:
    """Indices of the first captions that have not come before."""
    first = {caption: index for index, caption in reversed(list(enumerate(captions)))}
    return tuple(sorted(first.values())[:count])


def _features(options: EvaluationOptions) -> NamedExtractor:
    if options.features is None:
        return NamedExtractor()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = FeatureNetwork(options.features, device)  # says what is wrong with the file
    with options.features.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return NamedExtractor(network, digest)


def _teacher_sets(
    plan: EvaluationPlan, request: ClipRequest, features: NamedExtractor, on_progress: OnProgress
) -> TeacherSets:
    """The teacher's sets, from an earlier evaluation where they are the same."""
    on_progress("reading the teacher", 0, 1)
    digest = fingerprint(plan.teacher.folder)
    on_progress("reading the teacher", 1, 1)

    @cache
    def open_evaluator() -> Evaluator:
        return plan.teacher.evaluator(plan.options)

    return TeacherSets(
        cache=plan.cache,
        digest=digest,
        facts=plan.teacher.facts,
        samplings=plan.samplings,
        request=request,
        open_evaluator=open_evaluator,
        features=features,
        on_progress=lambda name, is_twin, done, total: on_progress(
            _label(plan, name, is_twin=is_twin), done, total
        ),
    )


def _sample_sets(
    plan: EvaluationPlan, request: ClipRequest, features: NamedExtractor, on_progress: OnProgress
) -> tuple[dict[str, ClipSet], dict[str, Features], int]:
    """All sets by name, features of their twins from the other seed, and clips side by side."""
    # The teacher's networks end with that call: a GPU has room for one model.
    sets, twins = _sample_teacher(plan, request, features, on_progress)
    evaluator = plan.generator.evaluator(plan.options)
    own = request.sampled(plan.samplings[GENERATOR])
    sets[GENERATOR], twin = (
        sample_clip_set(
            evaluator,
            wanted,
            partial(on_progress, _label(plan, GENERATOR, is_twin=wanted is not own)),
            features.extract,
        )
        for wanted in (own, own.twin(plan.samplings[REFERENCE].seed))
    )
    return sets, twins | {GENERATOR: twin.clips.features}, evaluator.chunk_clips


def _sample_teacher(
    plan: EvaluationPlan, request: ClipRequest, features: NamedExtractor, on_progress: OnProgress
) -> tuple[dict[str, ClipSet], dict[str, Features]]:
    """The teacher's sets by name, and features of their twins."""
    teacher = _teacher_sets(plan, request, features, on_progress)
    sets = {name: teacher.set(name) for name in TEACHER_SETS}
    return sets, {name: teacher.twin(name).clips.features for name in TEACHER_SETS}


def _label(plan: EvaluationPlan, name: str, *, is_twin: bool) -> str:
    return plan.label(name) + (", other seeds" if is_twin else "")


def _rows(
    plan: EvaluationPlan, sets: dict[str, ClipSet], twins: dict[str, Features]
) -> tuple[EvaluationRow, ...]:
    distances = set_distances(
        sets[REFERENCE].clips.features,
        {name: sets[name].clips.features for name in sets if name != REFERENCE},
        floor=FLOOR,
        baseline=TEACHER_FEW,
        num_bootstraps=plan.options.num_bootstraps,
        seed=plan.options.seed,
    )
    scores = {name: _scores(sets[name], plan.captions) for name in sets}
    return tuple(
        _row(
            name, plan, sets[name], scores[name], scores[REFERENCE], distances.get(name)
        ).model_copy(update={"measures": _measures(name, plan, sets, twins)})
        for name in sets
    )


def _measures(
    name: str, plan: EvaluationPlan, sets: dict[str, ClipSet], twins: dict[str, Features]
) -> dict[str, MeasuredFigure]:
    """Figures of a row's clips beside those of the floor's, which start from the same noise."""

    def figures(of: str) -> dict[str, Tensor]:
        return sets[of].clips.figures(plan.captions, twins[of])

    compares = name not in (REFERENCE, FLOOR)
    compared = compare_sets(figures(name), figures(FLOOR) if compares else None, plan.options.seed)
    own, teachers = sets[name].seconds, sets[FLOOR].seconds
    rows, their_rows = (resampled_rows(len(part), plan.options.seed) for part in (own, teachers))
    # What was remembered was timed by another command, perhaps on another machine.
    together = not (sets[name].remembered or sets[FLOOR].remembered)
    seconds = Compared(
        median_interval(own, rows),
        median_ratio_interval(own, teachers, rows, their_rows) if compares and together else None,
    )
    return {
        figure: MeasuredFigure(
            **asdict(found.value), ratio=ErrorBar(**asdict(found.ratio)) if found.ratio else None
        )
        for figure, found in {
            **compared,
            **_distributions(sets, name),
            "seconds_per_clip": seconds,
        }.items()
    }


def _distributions(sets: dict[str, ClipSet], name: str) -> dict[str, Compared]:
    """Distances of what the clips do as a whole, beside those of the floor."""
    readings = {each: sets[each].clips.reading for each in (name, REFERENCE, FLOOR)}
    if name == REFERENCE or None in readings.values():
        return {}
    motions = {each: motion_of(reading) for each, reading in readings.items() if reading}
    floor = None if name == FLOOR else motions[FLOOR]
    return compare_motions(motions[name], motions[REFERENCE], floor)


def _row(
    name: str,
    plan: EvaluationPlan,
    clips: ClipSet,
    scores: WorldScores | None,
    reference: WorldScores | None,
    distance: SetDistance | None,
) -> EvaluationRow:
    how = plan.samplings[name]
    row = EvaluationRow(
        name=name,
        label=plan.label(name),
        num_steps=how.num_steps,
        guidance_scale=how.guidance_scale,
        seed=how.seed,
        seconds_per_clip=float(clips.seconds.median()),
        remembered=clips.remembered,
    )
    figures: dict[str, float | Figure | None] = {}
    if scores is not None and reference is not None:
        figures |= {
            "colour": scores.colour,
            "shape": scores.shape,
            "direction": _known(scores.direction),
            "speed_spearman": scores.speed_spearman if isinstance(scores, ClipScores) else None,
            "mean_speed_px_per_frame": scores.mean_speed_px_per_frame,
            "speed_ratio": _over(scores.mean_speed_px_per_frame, reference.mean_speed_px_per_frame),
        }
    if distance is not None:
        figures |= {
            "frechet": distance.distance,
            "above_floor": distance.above_floor,
            "ratio": distance.ratio,
        }
    return row.model_copy(update=figures)


def _scores(clips: ClipSet, captions: Sequence[str]) -> WorldScores | None:
    reading = clips.clips.reading
    return None if reading is None else score_reading(reading, captions)


def _known(share: float) -> float | None:
    """A share, where it is of any clips: captions may all leave it open."""
    return None if math.isnan(share) else share


def _over(value: float, reference: float) -> float | None:
    """A ratio, where there is something to divide by: clips may stand still."""
    return value / reference if reference > 0 else None


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
    folder = plan.output / _SHEET_FOLDER
    png, gif = folder / f"{_SHEET_NAME}.png", folder / f"{_SHEET_NAME}.gif"
    write_contact_sheet(png, gif, groups, prompts, plan.generator.video.fps)
    return png, gif


def _require_no_way_out(output: Path, own_cache: Path | None) -> None:
    """Checks that nothing in the folder of the results is written through a link out of it.

    Args:
        output: The folder.
        own_cache: The cache in it; None for one that the caller has named.
    """
    earlier = sorted((output / _SHEET_FOLDER).glob(f"{_SHEET_NAME}*"))
    sheets = [f"{_SHEET_FOLDER}/{path.name}" for path in earlier]
    require_inside(output, EVALUATION_FILE, _SHEET_FOLDER, *sheets)
    if own_cache is not None:
        sets = [path.relative_to(output) for path in own_cache.glob("*")]
        require_inside(output, own_cache.name, *map(str, sets), option="--cache")


def _device_name(options: EvaluationOptions) -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {options.threads} threads"
