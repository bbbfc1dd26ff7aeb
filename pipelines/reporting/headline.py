"""The headline: tiles, and figures with their ratios to the teacher and their intervals.

One run:        figure | generator | to the teacher | (drawn) | teacher | in few steps | ...
Several runs:   figure | generator of run A | of run B | ... | teacher
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.media.charts import number
from pipelines.reporting.curves import LabelledRun
from pipelines.reporting.figures import SamplingRow, SamplingRows, ShownFigure, read_rows
from pipelines.reporting.names import about, in_order, title
from pipelines.run.ranking import Contender, not_told_apart
from workers.samplings import TEACHER_FEW

_PLOT_W, _PLOT_H = 110, 18
_PLOT_LOW, _PLOT_HIGH = 0.5, 1.5
# Small things that move are lost in the mean over all pixels.
_MOTION = "flow_top"
_SPEED, _SECONDS, _DISTANCE_RATIO = "mean_speed_px_per_frame", "seconds_per_clip", "ratio"
_DISTANCE = "above_floor"


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of the table; each part may be empty.

    Attributes:
        text: The figure.
        spread: Its interval or standard error.
        ratio: Its ratio to the teacher, in words.
        plot: The ratio as a picture, an `<svg>` element.
    """

    text: str = ""
    spread: str = ""
    ratio: str = ""
    plot: str = ""


@dataclass(frozen=True, slots=True)
class FigureRow:
    """One figure in every column."""

    title: str
    about: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True, slots=True)
class FigureTable:
    """The table.

    Attributes:
        headings: Of the columns after the first one.
        strong: Indices of the columns that this page is about.
        rows: Figures.
    """

    headings: tuple[str, ...]
    strong: tuple[int, ...]
    rows: tuple[FigureRow, ...]


@dataclass(frozen=True, slots=True)
class Tile:
    """One number to remember.

    Attributes:
        big: The number.
        spread: Its interval or standard error; may be empty.
        small: What it is.
    """

    big: str
    spread: str
    small: str


@dataclass(frozen=True, slots=True)
class CriterionLine:
    """One criterion and how the generator stands to it; None: its clips cannot tell."""

    criterion: str
    passed: bool | None
    found: str

    @property
    def style(self) -> str:
        """Class of the page's style."""
        return {True: "met", False: "unmet", None: "unknown"}[self.passed]


@dataclass(frozen=True, slots=True)
class Criterion:
    """One criterion and how each run's generator stands to it; None where it was not judged."""

    name: str
    verdicts: tuple[CriterionLine | None, ...]


def figure_table(runs: Sequence[LabelledRun]) -> FigureTable | None:
    """Figures of one evaluation, or of several side by side; None where there are none."""
    found = [(run.label, read_rows(run.records.evaluation)) for run in runs]
    if not any(rows.figure_names for _, rows in found):
        return None
    return _of_one(found[0][1]) if len(runs) == 1 else _of_several(found)


def comparison_note(runs: Sequence[LabelledRun]) -> str:
    """Names the runs that may be as close to their teacher as the closest one; may be empty."""
    found = [(run.label, read_rows(run.records.evaluation).generator) for run in runs]
    contenders = [
        Contender(label, figure.value, figure.ends)
        for label, generator in found
        if generator and (figure := generator.figures.get(_DISTANCE))
    ]
    contenders.sort(key=lambda contender: contender.value)
    return not_told_apart(contenders, "runs", title(_DISTANCE), "sgmd evaluate --num-captions")


def tiles(evaluation: Mapping[str, Any]) -> list[Tile]:
    """Returns the result of a generator in a few numbers, as far as they were measured."""
    rows = read_rows(evaluation)
    generator, reference = rows.generator, rows.reference
    if generator is None or reference is None:
        return []
    found: list[Tile] = []
    if "num_steps" in generator.facts and "num_steps" in reference.facts:
        guided = " guided" if reference.facts.get("guidance_scale", 1) != 1 else ""
        steps = f"steps, where the teacher takes {reference.facts['num_steps']:g}{guided}"
        found.append(Tile(f"{generator.facts['num_steps']:g}", "", steps))
    if _SECONDS in generator.ratios and generator.ratios[_SECONDS].value > 0:
        faster = 1 / generator.ratios[_SECONDS].value
        found.append(Tile(f"{number(faster)}×", "", "faster a video, decoding included"))
    if _DISTANCE_RATIO in generator.figures:
        few = rows.named(TEACHER_FEW)
        steps = f" in {few.facts['num_steps']:g} unguided steps" if few else " in as few steps"
        value = generator.figures[_DISTANCE_RATIO]
        found.append(Tile(value.text, value.spread, f"of the teacher's distance{steps}"))
    for name in _motion(generator):
        kept = generator.ratios[name]
        what = f"of the teacher's {title(name).partition(',')[0]}"
        found.append(Tile(f"{kept.value:.0%}", _percents(kept), what))
    for name, what in (("colour", "colours"), ("direction", "directions")):
        if name in generator.figures:
            share = generator.figures[name]
            found.append(Tile(f"{share.value:.0%}", _percents(share), f"of the {what} right"))
    return found


def verdicts(evaluation: Mapping[str, Any]) -> list[CriterionLine]:
    """The criteria that were judged when the run was evaluated."""
    entries = evaluation.get("verdicts")
    return [
        CriterionLine(
            str(entry["criterion"]),
            None if entry["passed"] is None else entry["passed"] is True,
            str(entry.get("found", "")),
        )
        for entry in (entries if isinstance(entries, list) else [])
        if isinstance(entry, Mapping) and {"criterion", "passed"} <= entry.keys()
    ]


def criteria(runs: Sequence[LabelledRun]) -> list[Criterion]:
    """All criteria that some run was judged by."""
    by_run = [{v.criterion: v for v in verdicts(run.records.evaluation)} for run in runs]
    names = dict.fromkeys(name for found in by_run for name in found)
    return [Criterion(name, tuple(found.get(name) for found in by_run)) for name in names]


def ratio_plot(figure: ShownFigure, other: ShownFigure | None) -> str:
    """A ratio on a line with the teacher, 1, in its middle; its interval; and a second ratio."""
    middle = _PLOT_H / 2
    parts = [
        f'<svg class="ratio" viewBox="0 0 {_PLOT_W} {_PLOT_H}" width="{_PLOT_W}" '
        f'height="{_PLOT_H}" aria-hidden="true">',
        f'<line class="grid" x1="0" x2="{_PLOT_W}" y1="{middle}" y2="{middle}"/>',
        f'<line class="one" x1="{_at(1)}" x2="{_at(1)}" y1="2" y2="{_PLOT_H - 2}"/>',
    ]
    if figure.ends is not None:
        low, high = figure.ends
        parts.append(
            f'<line class="interval" x1="{_at(low)}" x2="{_at(high)}" y1="{middle}" y2="{middle}"/>'
        )
    if other is not None:
        parts.append(f'<circle class="other" cx="{_at(other.value)}" cy="{middle}" r="3.5"/>')
    parts.append(f'<circle class="own" cx="{_at(figure.value)}" cy="{middle}" r="4"/></svg>')
    return "".join(parts)


def _of_one(rows: SamplingRows) -> FigureTable:
    generator, few = rows.generator, rows.named(TEACHER_FEW)
    others = rows.others
    own = [generator.label, "ratio to teacher", ""] if generator else []
    table = [
        FigureRow(
            title(name),
            about(name),
            (
                *(_own_cells(generator, few, name) if generator else ()),
                *(_cell(row, name) for row in others),
            ),
        )
        for name in in_order([dict.fromkeys(rows.figure_names)])
    ]
    headings = (*own, *(row.label for row in others))
    return FigureTable(headings, (0, 1, 2) if generator else (), tuple(table))


def _of_several(found: Sequence[tuple[str, SamplingRows]]) -> FigureTable:
    teacher = next((rows.reference for _, rows in found if rows.reference), None)
    names = in_order(dict.fromkeys(rows.figure_names) for _, rows in found)
    table = [
        FigureRow(
            title(name),
            about(name),
            (
                *(_cell(rows.generator, name, with_ratio=True) for _, rows in found),
                *([_cell(teacher, name)] if teacher else []),
            ),
        )
        for name in names
        if any(rows.generator and name in rows.generator.figures for _, rows in found)
    ]
    headings = [label for label, _ in found] + ([teacher.label] if teacher else [])
    return FigureTable(tuple(headings), tuple(range(len(found))), tuple(table))


def _cell(row: SamplingRow | None, name: str, *, with_ratio: bool = False) -> Cell:
    if row is None or name not in row.figures:
        return Cell()
    figure, ratio = row.figures[name], row.ratios.get(name)
    shown = f"ratio {_words(ratio)}" if with_ratio and ratio else ""
    return Cell(text=figure.text, spread=figure.spread, ratio=shown)


def _own_cells(
    generator: SamplingRow, few: SamplingRow | None, name: str
) -> tuple[Cell, Cell, Cell]:
    """The generator's figure, its ratio, and the ratio drawn."""
    ratio = generator.ratios.get(name)
    if ratio is None:
        return _cell(generator, name), Cell(), Cell()
    plot = ratio_plot(ratio, few.ratios.get(name) if few else None)
    return _cell(generator, name), Cell(ratio.text, ratio.spread), Cell(plot=plot)


def _percents(figure: ShownFigure) -> str:
    if figure.low is None or figure.high is None or figure.low == figure.high:
        return ""
    return f"[{figure.low:.0%}, {figure.high:.0%}]"


def _words(figure: ShownFigure) -> str:
    return f"{figure.text} {figure.spread}".strip()


def _motion(generator: SamplingRow) -> list[str]:
    """The one figure of motion to lead with: optical flow where it was measured, or the speed."""
    flows = sorted((name for name in generator.ratios if "flow" in name), key=_MOTION.__ne__)
    return [*flows, *([_SPEED] if _SPEED in generator.ratios else [])][:1]


def _at(ratio: float) -> float:
    """Returns the place of a ratio on the line, bounded by its ends."""
    inside = min(max(ratio, _PLOT_LOW), _PLOT_HIGH)
    return round(5 + (inside - _PLOT_LOW) / (_PLOT_HIGH - _PLOT_LOW) * (_PLOT_W - 10), 1)
