"""Tables of an evaluation: two of all ways of sampling, one of the generator.

what the clips show | how far they are from the teacher's, and how fast | every measure, in full
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from pipelines.evaluation.result import (
    BUILT_IN_FEATURES,
    GENERATOR,
    ErrorBar,
    Evaluation,
    EvaluationRow,
    rounded,
    with_error,
)
from pipelines.reporting.names import title
from workers.samplings import FLOOR, REFERENCE, TEACHER_FEW

MOTION = "flow_top"
"""The measure of motion to lead with: the mean over all pixels hides small things that move."""


@dataclass(frozen=True, slots=True)
class TableColumn:
    """One column of the tables.

    Attributes:
        heading: Its heading.
        text: What it shows of a row; empty where there is nothing to show.
    """

    heading: str
    text: Callable[[EvaluationRow], str]


def table(evaluation: Evaluation) -> Group:
    """Returns headline tables, the generator's measures in full, and a legend."""
    tables = [_table(evaluation, columns) for columns in (READINGS, DISTANCES)]
    tables.append(_measures(evaluation))
    return Group(*(shown for shown in tables if shown is not None), Text(legend(evaluation)))


def legend(evaluation: Evaluation) -> str:
    """Lines below the table that say what its columns measure and how clips were sampled."""
    guidance = evaluation.row(REFERENCE).guidance_scale
    earlier = "; * timed earlier" if any(row.remembered for row in evaluation.rows) else ""
    lines = [
        f"{evaluation.num_captions} held-out captions ({evaluation.num_distinct_captions} "
        f"different), one clip each; guidance scale {guidance:g}",
        "motion: optical flow of the fastest 5 % of a frame, to the second row's clips",
        "distance: Frechet, to the first row's clips; of the second row, the floor, it is chance",
        "ratio: of the distance above the floor, to that of "
        f"{evaluation.row(TEACHER_FEW).label}; ±: standard error over captions",
        f"s/video: a clip at batch {evaluation.batch_size}, {evaluation.device}{earlier}",
        "ratio to teacher: to the second row's clips, of the same captions and noise; [95 %]",
        "speed, direction, count, texture distance: between sets, to the first row's clips",
    ]
    if evaluation.features != BUILT_IN_FEATURES:
        lines.append(f"distances and diversity by the features of {evaluation.features}")
    return "\n".join(lines)


def verdict_lines(evaluation: Evaluation) -> list[str]:
    """One line a criterion: whether it is met, what was asked, what was found."""
    words = {True: "met", False: "NOT MET", None: "unknown"}
    return [
        f"{words[verdict.passed]:<7}  {verdict.criterion}: {verdict.found}"
        for verdict in evaluation.verdicts
    ]


def _table(evaluation: Evaluation, columns: Sequence[TableColumn]) -> Table | None:
    # For captions of another world, for example, there are no shares of right answers.
    columns = [column for column in columns if any(map(column.text, evaluation.rows))]
    if not columns:
        return None
    shown = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    shown.add_column("sampled by", no_wrap=True)
    for column in columns:
        shown.add_column(column.heading, justify="right", no_wrap=True)
    for row in evaluation.rows:
        cells = [column.text(row) for column in columns]
        shown.add_row(row.label, *cells, style="bold" if row.name == GENERATOR else "")
    return shown


def _measures(evaluation: Evaluation) -> Table | None:
    """One row a measure: the generator, its teacher, and the teacher in as few steps."""
    generator, teacher = evaluation.row(GENERATOR), evaluation.row(FLOOR)
    few = evaluation.row(TEACHER_FEW)
    if not generator.measures:
        return None
    shown = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    shown.add_column("mean over clips", no_wrap=True)
    headings = ("generator", "teacher", "ratio to teacher")
    for heading in (*headings, f"its {few.num_steps} steps"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for name, measure in generator.measures.items():
        if name not in teacher.measures or name not in few.measures:
            continue
        other = few.measures[name].ratio
        shown.add_row(
            title(name),
            f"{measure.value:.3g}",
            f"{teacher.measures[name].value:.3g}",
            _with_interval(measure.ratio) if measure.ratio else "",
            f"{other.value:.2f}" if other else "",
        )
    return shown


def _with_interval(ratio: ErrorBar) -> str:
    return f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _speed(row: EvaluationRow) -> str:
    if row.mean_speed_px_per_frame is None:
        return ""
    ratio = "" if row.speed_ratio is None else f" ({row.speed_ratio:.0%})"
    return f"{row.mean_speed_px_per_frame:.2f}{ratio}"


def _distance(row: EvaluationRow) -> str:
    return "reference" if row.frechet is None else rounded(row.frechet)


def _above_floor(row: EvaluationRow) -> str:
    if row.name == FLOOR:
        return "floor"
    return "" if row.above_floor is None else with_error(row.above_floor)


def _ratio(row: EvaluationRow) -> str:
    if row.ratio is None or row.name == FLOOR:
        return ""
    return "1" if row.name == TEACHER_FEW else with_error(row.ratio)


def _motion(row: EvaluationRow) -> str:
    ratio = row.measures[MOTION].ratio if MOTION in row.measures else None
    return f"{ratio.value:.0%}" if ratio else ""


def _seconds(row: EvaluationRow) -> str:
    return f"{row.seconds_per_clip:.3g}{'*' if row.remembered else ''}"


READINGS = (
    TableColumn("colour", lambda row: _share(row.colour)),
    TableColumn("shape", lambda row: _share(row.shape)),
    TableColumn("direction", lambda row: _share(row.direction)),
    TableColumn("rank", lambda row: _share(row.speed_spearman)),
    TableColumn("px/frame", _speed),
    TableColumn("motion", _motion),
)
"""Readings of the clips: shares of right answers, speed, and motion beside the teacher's."""

DISTANCES = (
    TableColumn("distance", _distance),
    TableColumn("above floor", _above_floor),
    TableColumn("ratio", _ratio),
    TableColumn("s/video", _seconds),
)
"""Distance from the reference, and speed of sampling."""
