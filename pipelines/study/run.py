"""Compares methods: every variant with every seed on the same budget, each run measured alike.

    plan -> [distil or resume -> measure checkpoints] for each run -> tables, plots

Killed and started again it goes on where it was: finished runs are not made again, a half-finished
one is resumed from its checkpoint, what was measured is remembered. A run that fails is a row that
says why; started again, the study tries it once more.
"""

import logging
import os
import platform
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cluster.errors import LeaseLostError, StorageError
from cluster.storage import read_json, write_json, write_text
from pipelines.config.recipe import DistillConfig, load_recipe
from pipelines.distillation.branching import states_of
from pipelines.distillation.position import differences
from pipelines.distillation.preflight import run_preflight
from pipelines.distillation.run import NOT_NEEDED, distill
from pipelines.planning.passes import expected_passes, pass_costs, units_by_role
from pipelines.run.folder import RunFolder
from pipelines.run.observer import RunObserver
from pipelines.run.opened_copy import copy_at, working_copy
from pipelines.run.outputs import require_output_folder
from pipelines.run.places import shared_place
from pipelines.run.publisher import publish_now, published_place
from pipelines.run.revision import git_revision, versions
from pipelines.run.stop_rule import StopRule
from pipelines.run.stopping import StopRequests, stop_requests
from pipelines.study.figures import write_plots
from pipelines.study.hypotheses import (
    Version,
    all_hypotheses,
    expectation_words,
    judge_hypotheses,
    power_words,
    write_down,
)
from pipelines.study.judging import (
    Figures,
    StudyEvaluator,
    require_measurable,
    study_captions,
)
from pipelines.study.measured_runs import Point, RunResult, place_of, times_of, units_of
from pipelines.study.plan import (
    RUNS,
    PlannedRun,
    StudyPlan,
    measured_iterations,
    plan_rows,
    plan_study,
)
from pipelines.study.recorded_costs import require_same_costs
from pipelines.study.results import StudyResult
from pipelines.study.speed import seconds_per_unit
from pipelines.study.tables import cost_csv, results_csv, results_markdown
from sgmd_core.errors import ConfigError, StopRequestedError
from workers.samplings import REFERENCE

_log = logging.getLogger(__name__)

RESULTS_FILE = "results.json"
WRITTEN = ("results.md", "results.csv", "cost.csv", RESULTS_FILE)
"""Files that a study rewrites after every run."""
_POINTS_FILE = "study.json"
FAILURE_FILE = "failure.txt"

OpenObserver = Callable[[StopRule, float], AbstractContextManager[RunObserver]]
"""Opens the observer of one run, given its stop rule and the training time spent before."""


def folder_of(config: DistillConfig) -> str:
    """Returns the path or address of a study."""
    return shared_place(plan_study(config).folder)


def dry_run_study(config: DistillConfig) -> dict[str, Any]:
    """Returns the runs of a study with their costs; makes nothing.

    Raises:
        SgmdError: What does not fit.
    """
    plan = plan_study(config)
    require_output_folder(plan.folder, "output")
    for run in plan.runs[: len(plan.variants)]:
        require_measurable(run.config)
        run_preflight(run.config)
    study_captions(config)
    with working_copy(plan.folder, NOT_NEEDED):
        speed, source = seconds_per_unit(plan)
    rows = plan_rows(plan, speed)
    seconds = [row["seconds"] for row in rows]
    total = sum(seconds) * len(config.study.seeds) if all(seconds) else None
    return {
        "folder": shared_place(plan.folder),
        "runs": len(plan.runs),
        "seeds": list(config.study.seeds),
        "budget": config.study.budget.model_dump(),
        "seconds_per_forward": speed,
        "seconds_per_forward_from": source,
        "training_seconds": total,
        "variants": rows,
        "hypotheses": {
            name: expectation_words(each) for name, each in config.study.hypotheses.items()
        },
        "power": power_words(len(config.study.hypotheses), len(config.study.seeds)),
    }


def study(
    config: DistillConfig,
    tell: Callable[[str], None],
    open_observer: OpenObserver,
) -> StudyResult:
    """Makes and measures every run that is still missing, and writes tables and plots.

    Args:
        config: The recipe; its study section says what is compared.
        tell: Called with lines about the progress.
        open_observer: Opens the observer of a run.

    Returns:
        Everything that was found, as results.json holds it.

    Raises:
        SgmdError: The study itself is wrong, or its folder holds runs of other settings. What goes
            wrong in a run is in its row.
        LeaseError: Another process runs the study.
    """
    plan = plan_study(config)
    require_output_folder(plan.folder, "output")
    for run in plan.runs[: len(plan.variants)]:
        require_measurable(run.config)
        run_preflight(run.config)
    with published_place(
        plan.folder,
        f"sgmd study {config.name}",
        config.recovery.storage_outage_s,
        lambda event: tell(event.in_words()),
        without=(RUNS,),
    ) as folder:
        return _study(config, plan, folder, tell, open_observer)


def _study(
    config: DistillConfig,
    plan: StudyPlan,
    folder: Path,
    tell: Callable[[str], None],
    open_observer: OpenObserver,
) -> StudyResult:
    """Runs a checked study in a folder that this process holds."""
    for run in plan.runs:
        _require_same(run)
    require_same_costs(plan)
    finished = sum(_is_finished(run) for run in plan.runs)
    record = write_down(folder, config.study, finished)
    publish_now(folder)
    if warning := power_words(len(all_hypotheses(record)), len(config.study.seeds)):
        tell(warning)
    judge = StudyEvaluator(config.with_settings(dict(config.study.settings)), folder, tell)
    teacher = judge.teacher
    _require_figures(config, teacher[REFERENCE])
    results: list[RunResult] = []
    for number, run in enumerate(plan.runs, 1):
        known = ", finished before" if _is_finished(run) else ""
        tell(f"run {number}/{len(plan.runs)}: {run.config.name}{known}")
        results.append(_made(run, folder, judge, tell, open_observer))
        # After every run, so that a study under way can be looked at.
        _write(folder, _result(plan, judge, teacher, results, record))
        publish_now(folder)
    return _result(plan, judge, teacher, results, record)


def _require_same(run: PlannedRun) -> None:
    """Refuses to go on with a run of other settings, data or networks."""
    folder = RunFolder(run.folder)
    if not folder.config.exists():
        return
    found = differences(run.config, run_preflight(run.config), folder)
    if not found and load_recipe(str(folder.config)).digest != run.config.digest:
        found = ["other settings"]
    if found:
        raise ConfigError(
            f"going on with the study in {shared_place(run.folder.parent.parent)}",
            f"{run.config.name} was made with other settings, data or networks: {'; '.join(found)}",
            "the settings, data and model that the study was started with; its budget may grow",
            "Choose another name=..., or delete that run's folder",
        )


def _made(
    run: PlannedRun,
    study_folder: Path,
    judge: StudyEvaluator,
    tell: Callable[[str], None],
    open_observer: OpenObserver,
) -> RunResult:
    """A run at its end, measured; or why there is none."""
    error, folder = "", RunFolder(run.folder)
    try:
        with stop_requests(tell) as stops, stops.ending_in(lambda: _stopped(stops, run)):
            if not _is_finished(run):
                rule = StopRule(run.config.iterations, run.max_seconds, judge.num_measurements)
                with open_observer(rule, _seconds_spent(run)) as observer:
                    distill(
                        run.config,
                        resume=folder.config.exists(),
                        observer=observer,
                        stop_rule=rule,
                    )
            points = {} if stops.received else _measure(run, study_folder, judge)
        if stops.received:
            # A run that closes keeps its result, and what measures it may swallow the stop.
            raise _stopped(stops, run)
        _forget_failure(folder)
    except (StopRequestedError, LeaseLostError):
        raise
    # Whatever breaks one run, the others are still worth making.
    except Exception as failure:
        _write_failure(folder, study_folder, failure)
        story = shared_place(run.folder / FAILURE_FILE)
        error = f"{type(failure).__name__}: {failure} (all of it: {story})"
        tell(f"{run.config.name} failed. {error}")
        points = _remembered(run, judge)
    stage_seconds, iteration_s = times_of(run)
    ordered = tuple(points[iteration] for iteration in sorted(points))
    place = shared_place(run.folder)
    return RunResult(run.variant, run.seed, place, ordered, stage_seconds, iteration_s, error)


def _stopped(stops: StopRequests, run: PlannedRun) -> StopRequestedError:
    """The error of a study that was stopped while it made or measured a run."""
    return stops.error(
        f"making and measuring {run.config.name}",
        "what is saved of the run, and what was measured before, is kept",
        "The same command goes on",
    )


def _write_failure(folder: RunFolder, study_folder: Path, failure: Exception) -> None:
    """Keeps traceback and notes of what broke a run, beside it."""
    path = folder.root / FAILURE_FILE
    write_text(str(path), "".join(traceback.format_exception(failure)))
    publish_now(study_folder, [path])


def _forget_failure(folder: RunFolder) -> None:
    path = folder.root / FAILURE_FILE
    if copy := copy_at(folder.root):
        copy.discard(path)
    path.unlink(missing_ok=True)


def _seconds_spent(run: PlannedRun) -> float:
    """Training time up to a run's last state."""
    start = states_of(RunFolder(run.folder)).latest()
    return place_of(run, start)[1] if start else 0.0


def _is_finished(run: PlannedRun) -> bool:
    folder = RunFolder(run.folder)
    if not folder.summary.exists():
        return False
    try:
        done = int(read_json(str(folder.summary))["iterations"])
    except (StorageError, KeyError, TypeError, ValueError) as error:
        _log.warning("%s is broken (%s): the run is resumed to write it", folder.summary, error)
        return False
    if run.max_seconds is None:
        return done >= run.config.iterations
    return place_of(run, done)[1] >= run.max_seconds


def _measure(run: PlannedRun, study_folder: Path, judge: StudyEvaluator) -> dict[int, Point]:
    """Points of a finished run by iteration; each is written down as soon as it is measured."""
    points = _remembered(run, judge)
    path = RunFolder(run.folder).root / _POINTS_FILE
    checkpoints = states_of(RunFolder(run.folder))
    role = "ema" if run.config.generator.ema_decay > 0 else "generator"
    schedule = run.config.schedule
    for iteration in measured_iterations(checkpoints.steps(), judge.num_measurements):
        if iteration not in points:
            label = f"{run.config.name} at iteration {iteration}"
            figures = judge.generator(
                run.config.schedule, checkpoints.folder(iteration), role, label
            )
            points[iteration] = Point(iteration, *place_of(run, iteration), figures)
            entries = [asdict(point) for point in points.values()]
            write_json(str(path), {"judge": judge.key(schedule), "points": entries})
            publish_now(study_folder, [path])
    # The last one stays: a budget may grow.
    checkpoints.prune(1)
    return points


def _remembered(run: PlannedRun, judge: StudyEvaluator) -> dict[int, Point]:
    """Returns what was measured before in the same way."""
    path = RunFolder(run.folder).root / _POINTS_FILE
    if not path.exists():
        return {}
    try:
        stored = read_json(str(path))
        if stored["judge"] != judge.key(run.config.schedule):
            return {}
        # Units are counted again: an earlier version may have counted otherwise.
        return {
            entry["iteration"]: Point(**entry | {"units": units_of(run, entry["iteration"])})
            for entry in stored["points"]
        }
    except (StorageError, KeyError, TypeError) as error:
        _log.warning("%s is broken (%s): its points are measured again", path, error)
        return {}


def _require_figures(config: DistillConfig, measured: Figures) -> None:
    """Refuses hypotheses about figures that these clips do not have."""
    for name, expected in config.study.hypotheses.items():
        if expected.figure not in measured:
            raise ConfigError(
                f"testing the hypothesis {name} of the study of {config.name}",
                f"{expected.figure}, which cannot be measured on clips of {config.data.validation}",
                f"one of {', '.join(sorted(measured))}",
                f"Change study.hypotheses.{name}.figure",
            )


def _result(
    plan: StudyPlan,
    judge: StudyEvaluator,
    teacher: dict[str, Figures],
    runs: list[RunResult],
    record: tuple[Version, ...],
) -> StudyResult:
    study = plan.config.study
    first = {run.variant: run.config for run in reversed(plan.runs)}
    configs = {variant: first[variant] for variant in plan.variants}
    return StudyResult(
        name=plan.config.name,
        budget=(study.budget.unit, study.budget.amount),
        seeds=tuple(study.seeds),
        num_captions=len(judge.captions),
        teacher=teacher,
        variants=plan.variants,
        units_per_iteration={
            variant: units_by_role(expected_passes(config), pass_costs(config))
            for variant, config in configs.items()
        },
        runs=tuple(runs),
        facts={
            "topology": configs[plan.variants[0]].topology.mode,
            "threads_per_rank": configs[plan.variants[0]].topology.threads_per_rank,
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "git_revision": git_revision(),
            "versions": versions(),
            "date": datetime.now(UTC).date().isoformat(),
        },
        verdicts=judge_hypotheses(all_hypotheses(record), runs, teacher[REFERENCE]),
        record=record,
    )


def _write(folder: Path, result: StudyResult) -> None:
    write_text(str(folder / "results.md"), results_markdown(result))
    write_text(str(folder / "results.csv"), results_csv(result))
    write_text(str(folder / "cost.csv"), cost_csv(result))
    write_json(str(folder / RESULTS_FILE), result.to_json())
    write_plots(folder, result)
