"""A study's tables: Markdown for readers, CSV for programs.

results   one row a variant (Markdown) or a run (CSV): cost, figures, what went wrong
cost      one row a variant and stage: seconds of an iteration, and the passes counted for it
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from pipelines.planning.passes import role_of
from pipelines.study.hypotheses import record_words, verdict_rows
from pipelines.study.results import SeedSpread, StudyResult
from workers.samplings import FLOOR, REFERENCE, TEACHER_FEW, TEACHER_FEW_GUIDED

TEACHER_LABELS = {
    REFERENCE: "teacher, many guided steps",
    FLOOR: "the same, other seeds",
    TEACHER_FEW: "teacher, few steps",
    TEACHER_FEW_GUIDED: "teacher, few guided steps",
}
_UNITS = {"iterations": "iterations", "seconds": "seconds of training", "forwards": "forwards"}


@dataclass(frozen=True, slots=True)
class Column:
    """A figure of the results table.

    Attributes:
        heading: Its heading.
        figure: Its name.
        over_teacher: Shown as a ratio to the reference's.
        decimals: After the point.
    """

    heading: str
    figure: str
    over_teacher: bool = False
    decimals: int = 2


COLUMNS = (
    Column("Fréchet", "frechet", decimals=4),
    Column("flow, top 5 %", "flow_top", over_teacher=True),
    Column("speed", "mean_speed_px_per_frame", over_teacher=True),
    Column("smoothness", "smoothness", over_teacher=True),
    Column("flicker", "flicker", over_teacher=True),
    Column("saturation", "saturation", over_teacher=True),
    Column("sharpness", "sharpness", over_teacher=True),
    Column("diversity", "diversity", over_teacher=True),
    Column("colour", "colour", decimals=3),
    Column("shape", "shape", decimals=3),
    Column("direction", "direction", decimals=3),
    Column("speed distance", "speed_distance", decimals=3),
    Column("direction distance", "direction_distance", decimals=3),
    Column("texture distance", "texture_distance", decimals=4),
)
"""Ratios are to the teacher's reference; colour, shape and direction are shares of right ones;
distances are between sets of clips, to the reference."""


def results_markdown(result: StudyResult) -> str:
    """The table of variants, and under it what went wrong."""
    head, *rows = results_rows(result)
    rows = [[f"**{row[0]}**" if row[0] in result.variants else row[0], *row[1:]] for row in rows]
    failed = [
        f"* **{run.variant}, seed {run.seed}** failed: {' '.join(run.error.split())}"
        for run in result.runs
        if run.error
    ]
    below = [*([result.note] if result.note else []), *failed]
    words = setting_words(result)
    table = markdown_table(head, rows)
    table = "\n".join([words, "", table, *([""] if below else []), *below]) + "\n"
    return table + _hypotheses_markdown(result)


def _hypotheses_markdown(result: StudyResult) -> str:
    """Expectations of the study with the date of their record and their outcomes."""
    if not result.verdicts:
        return ""
    head, *rows = verdict_rows(result.verdicts)
    table = markdown_table(head, rows, of_figures=False)
    return "\n".join(["", "## Hypotheses", "", record_words(result.record), "", table]) + "\n"


def markdown_table(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, of_figures: bool = True
) -> str:
    """A table in Markdown; figures after the first column stand to the right."""
    rule = ["---", *["---:" if of_figures else "---"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))


def results_rows(result: StudyResult) -> list[list[str]]:
    """Headings, then a row for each of the teacher's sets and for each variant."""
    columns = [column for column in COLUMNS if column.figure in result.teacher[REFERENCE]]
    head = ["sampled by", "runs", "iterations", "forwards", "seconds", "s / iteration"]
    rows = [[*head, *(column.heading for column in columns)]]
    for name, label in TEACHER_LABELS.items():
        cells = [_teacher_cell(result, name, column) for column in columns]
        rows.append([label, *[""] * (len(head) - 1), *cells])
    return rows + [_variant_row(result, variant, columns) for variant in result.variants]


def setting_words(result: StudyResult) -> str:
    """Budget, seeds and captions behind the table."""
    unit, amount = result.budget
    return (
        f"Budget of a run: {amount:g} {_UNITS[unit]}. Seeds {_listed(result.seeds)}; "
        f"{result.num_captions} held-out captions, one clip each. Figures are means over seeds ± "
        "standard deviation; all but Fréchet, distances between sets and shares of right answers "
        "are ratios to the teacher in many guided steps."
    )


def results_csv(result: StudyResult) -> str:
    """One row a measured point of a run, and one for a run that has none."""
    figures = sorted({name for run in result.runs for p in run.points for name in p.figures})
    head = ("variant", "seed", "iteration", "forwards", "seconds", "is_end", *figures, "error")
    rows: list[Sequence[object]] = [head]
    for run in result.runs:
        for point in run.points:
            place = (point.iteration, f"{point.units:g}", f"{point.seconds:.3f}")
            values = (point.figures.get(name, "") for name in figures)
            rows.append((run.variant, run.seed, *place, int(point is run.end), *values, run.error))
        if not run.points:
            rows.append((run.variant, run.seed, "", "", "", 0, *("" for _ in figures), run.error))
    return csv_table(rows)


def cost_csv(result: StudyResult) -> str:
    """Median busy seconds of an iteration by variant, role and stage."""
    rows: list[Sequence[object]] = [("variant", "role", "stage", "seconds")]
    for variant in result.variants:
        for name, seconds in stage_costs(result, variant).items():
            rows.append((variant, role_of(name), name.partition(".")[2], f"{seconds:.5f}"))
    return csv_table(rows)


def stage_costs(result: StudyResult, variant: str) -> dict[str, float]:
    """Busy seconds of an iteration by `role.stage`: medians over a variant's runs."""
    found: dict[str, list[float]] = {}
    for run in result.of(variant):
        for name, seconds in run.stage_seconds.items():
            found.setdefault(name, []).append(seconds)
    return {name: median(values) for name, values in found.items()}


def _variant_row(result: StudyResult, variant: str, columns: Sequence[Column]) -> list[str]:
    runs, ends = result.of(variant), result.ends(variant)
    times = [run.iteration_s for run in runs if run.iteration_s is not None]
    made = f"{len(ends)}" if len(ends) == len(runs) else f"{len(ends)} of {len(runs)}"
    cells = [variant, made]
    if ends:
        cells += [
            f"{median(point.iteration for point in ends):g}",
            f"{median(point.units for point in ends):,.0f}",
            f"{median(point.seconds for point in ends):.0f}",
        ]
    else:
        cells += ["", "", ""]
    cells.append(f"{median(times):.2f}" if times else "")
    for column in columns:
        found = result.at_end(variant, column.figure, over_teacher=column.over_teacher)
        cells.append("" if found is None else plus_minus(found, column.decimals))
    return cells


def plus_minus(found: SeedSpread, decimals: int) -> str:
    """A mean and its deviation over seeds, where there is one."""
    mean = f"{found.mean:.{decimals}f}"
    return mean if found.deviation is None else f"{mean} ± {found.deviation:.{decimals}f}"


def _teacher_cell(result: StudyResult, name: str, column: Column) -> str:
    value = result.teacher[name].get(column.figure)
    if value is None:
        return ""
    below = result.teacher[REFERENCE].get(column.figure) if column.over_teacher else 1.0
    return f"{value / below:.{column.decimals}f}" if below else ""


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(str(seed) for seed in seeds)


def csv_table(rows: Sequence[Sequence[object]]) -> str:
    """A table in CSV."""
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows(rows)
    return table.getvalue()
