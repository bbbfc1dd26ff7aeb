"""The result of an evaluation: rows, verdicts, and how a terminal shows them.

One row a way of sampling. Distances are to the reference: the guided teacher at many steps. What a
verdict asks for is fixed here, beside the figures it is judged by, and is the same for every run.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from cluster.storage import write_json
from sgmd_core.errors import CheckpointError

MAX_DISTANCE_RATIO = 0.5
MIN_SHARE_RIGHT = 0.9
MAX_SPEED_CHANGE = 0.1

REFERENCE = "reference"
FLOOR = "floor"
TEACHER_FEW = "teacher_few"
TEACHER_FEW_GUIDED = "teacher_few_guided"
GENERATOR = "generator"


class Record(BaseModel):
    """Base of the records: frozen, and readable by older and newer versions."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Figure(Record):
    """An estimated figure and its standard error."""

    value: float
    error: float


class EvaluationRow(Record):
    """One way of sampling, measured.

    Attributes:
        name: Which one, as the constants of this module call it.
        label: The same for a reader.
        num_steps: Denoising steps.
        guidance_scale: s in `uncond + s * (cond - uncond)`.
        seed: Seed of the initial noise.
        colour: Share of clips with the caption's colour; None for captions of another world.
        shape: Share with the caption's shape.
        direction: Share with the caption's direction.
        speed_spearman: Rank correlation of measured and captioned speed.
        mean_speed_px_per_frame: Mean measured speed.
        speed_ratio: Mean speed over the reference's.
        frechet: Distance to the reference set; None for the reference itself.
        above_floor: Distance less the floor's.
        ratio: `above_floor` over that of the teacher's few unguided steps.
        seconds_per_clip: Median over batches, from caption to pixels.
        remembered: Whether the row was read from an earlier evaluation of this run.
    """

    name: str
    label: str
    num_steps: int
    guidance_scale: float
    seed: int
    colour: float | None = None
    shape: float | None = None
    direction: float | None = None
    speed_spearman: float | None = None
    mean_speed_px_per_frame: float | None = None
    speed_ratio: float | None = None
    frechet: Figure | None = None
    above_floor: Figure | None = None
    ratio: Figure | None = None
    seconds_per_clip: float
    remembered: bool


class Verdict(Record):
    """One criterion and how the generator stands to it."""

    criterion: str
    passed: bool
    found: str


class Evaluation(Record):
    """A whole evaluation, as evaluation.json holds it.

    Attributes:
        generator: Folder of the generator.
        teacher: Folder of the teacher.
        captions: Where the captions came from.
        num_captions: Clips in each set.
        num_distinct_captions: Different captions among them.
        batch_size: Clips sampled side by side; the seconds are per clip at this size.
        device: What the clips were sampled on.
        rows: Ways of sampling; the first one is the reference.
        verdicts: Criteria for the generator.
        sheet_png: Contact sheet, relative to the folder of evaluation.json.
        sheet_gif: The same, moving.
        versions: Packages that decide the figures.
    """

    generator: str
    teacher: str
    captions: str
    num_captions: int
    num_distinct_captions: int
    batch_size: int
    device: str
    rows: tuple[EvaluationRow, ...]
    verdicts: tuple[Verdict, ...]
    sheet_png: str
    sheet_gif: str
    versions: dict[str, str]

    def row(self, name: str) -> EvaluationRow:
        """The row of that name."""
        return next(row for row in self.rows if row.name == name)

    @property
    def passed(self) -> bool:
        """Whether every criterion is met."""
        return all(verdict.passed for verdict in self.verdicts)

    def save(self, path: Path) -> None:
        """Writes it as JSON."""
        write_json(str(path), self.model_dump(mode="json"))

    @classmethod
    def load(cls, path: Path) -> "Evaluation":
        """Reads it back.

        Raises:
            CheckpointError: The file is not an evaluation.
        """
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except ValidationError as error:
            raise CheckpointError(
                f"reading {path}",
                f"{error.error_count()} fields that are missing or wrong",
                "a file written by `sgmd evaluate`",
                "Evaluate the run again",
            ) from error


@dataclass(frozen=True, slots=True)
class Column:
    """One column of the tables.

    Attributes:
        heading: Its heading.
        text: What it shows of a row; empty where there is nothing to show.
    """

    heading: str
    text: Callable[[EvaluationRow], str]


def judge(rows: Sequence[EvaluationRow]) -> tuple[Verdict, ...]:
    """Judges the generator's row.

    Args:
        rows: All rows; those of the floor, of the few-step teacher and of the generator are there.

    Returns:
        One verdict a criterion; those on exact readings only where there are any.
    """
    by_name = {row.name: row for row in rows}
    generator = by_name[GENERATOR]
    verdicts = [_judge_distance(generator, by_name[TEACHER_FEW])]
    for quantity, share in (("colour", generator.colour), ("direction", generator.direction)):
        if share is not None:
            verdicts.append(
                Verdict(
                    criterion=f"{quantity} right in at least {MIN_SHARE_RIGHT:.0%} of the clips",
                    passed=share >= MIN_SHARE_RIGHT,
                    found=f"{share:.1%}",
                )
            )
    if generator.speed_ratio is not None:
        verdicts.append(
            Verdict(
                criterion=f"mean speed within {MAX_SPEED_CHANGE:.0%} of the guided teacher's",
                passed=abs(generator.speed_ratio - 1) <= MAX_SPEED_CHANGE,
                found=f"{generator.speed_ratio:.3f} of it",
            )
        )
    return tuple(verdicts)


def _judge_distance(generator: EvaluationRow, baseline: EvaluationRow) -> Verdict:
    criterion = (
        f"distance above the floor at most {MAX_DISTANCE_RATIO:g} of the teacher's own in "
        f"{baseline.num_steps} unguided steps"
    )
    own, theirs, ratio = generator.above_floor, baseline.above_floor, generator.ratio
    assert own is not None, "the generator has a distance"
    assert theirs is not None, "the few-step teacher has a distance"
    assert ratio is not None, "the generator has a ratio"
    if theirs.value < 2 * theirs.error:
        found = f"the teacher's own is {_pm(theirs)}: too few clips to tell"
        return Verdict(criterion=criterion, passed=False, found=found)
    return Verdict(
        criterion=criterion,
        passed=ratio.value <= MAX_DISTANCE_RATIO,
        found=f"{_pm(own)} against {_pm(theirs)}, that is {_pm(ratio)} of it",
    )


def table(evaluation: Evaluation) -> Group:
    """What rich prints: a table of what the clips show, one of distances, and a legend."""
    tables = [_table(evaluation, columns) for columns in (READINGS, DISTANCES)]
    return Group(*(shown for shown in tables if shown is not None), Text(legend(evaluation)))


def columns_shown(evaluation: Evaluation) -> list[Column]:
    """All columns that have something to show."""
    exact = evaluation.rows[0].colour is not None
    return [*(READINGS if exact else ()), *DISTANCES]


def legend(evaluation: Evaluation) -> str:
    """What the columns mean."""
    guidance = evaluation.row(REFERENCE).guidance_scale
    earlier = "; * timed earlier" if any(row.remembered for row in evaluation.rows) else ""
    return "\n".join(
        [
            f"{evaluation.num_captions} held-out captions ({evaluation.num_distinct_captions} "
            f"different), one clip each; guidance scale {guidance:g}",
            "distance: Frechet, to the clips of the first row; the second row, the floor, is what "
            "chance makes of it",
            "ratio: of the distance above the floor, to that of "
            f"{evaluation.row(TEACHER_FEW).label}; ±: standard error over captions",
            f"s/video: a clip at batch {evaluation.batch_size}, {evaluation.device}{earlier}",
        ]
    )


def verdict_lines(evaluation: Evaluation) -> list[str]:
    """One line a criterion: whether it is met, what was asked, what was found."""
    return [
        f"{'met    ' if verdict.passed else 'NOT MET'}  {verdict.criterion}: {verdict.found}"
        for verdict in evaluation.verdicts
    ]


def _table(evaluation: Evaluation, columns: Sequence[Column]) -> Table | None:
    if not any(column.text(row) for column in columns for row in evaluation.rows):
        return None
    shown = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    shown.add_column("sampled by", no_wrap=True)
    for column in columns:
        shown.add_column(column.heading, justify="right", no_wrap=True)
    for row in evaluation.rows:
        cells = [column.text(row) for column in columns]
        shown.add_row(row.label, *cells, style="bold" if row.name == GENERATOR else "")
    return shown


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _speed(row: EvaluationRow) -> str:
    if row.mean_speed_px_per_frame is None:
        return ""
    ratio = "" if row.speed_ratio is None else f" ({row.speed_ratio:.0%})"
    return f"{row.mean_speed_px_per_frame:.2f}{ratio}"


def _distance(row: EvaluationRow) -> str:
    return "reference" if row.frechet is None else _value(row.frechet)


def _above_floor(row: EvaluationRow) -> str:
    if row.name == FLOOR:
        return "floor"
    return "" if row.above_floor is None else _pm(row.above_floor)


def _ratio(row: EvaluationRow) -> str:
    if row.ratio is None or row.name == FLOOR:
        return ""
    return "1" if row.name == TEACHER_FEW else _pm(row.ratio)


def _seconds(row: EvaluationRow) -> str:
    return f"{row.seconds_per_clip:.3g}{'*' if row.remembered else ''}"


def _pm(figure: Figure) -> str:
    return f"{_value(figure)} ± {figure.error:.{_decimals(figure)}f}"


def _value(figure: Figure) -> str:
    return f"{figure.value:.{_decimals(figure)}f}"


def _decimals(figure: Figure) -> int:
    """As many decimals as give the error one figure, or two where the first is 1 or 2."""
    decimals = 2
    while decimals < 6 and 0 < figure.error < 3 * 10.0**-decimals:
        decimals += 1
    return decimals


READINGS = (
    Column("colour", lambda row: _share(row.colour)),
    Column("shape", lambda row: _share(row.shape)),
    Column("direction", lambda row: _share(row.direction)),
    Column("speed rank", lambda row: _share(row.speed_spearman)),
    Column("px/frame", _speed),
)
"""What the clips show: shares of right answers, and the speed."""

DISTANCES = (
    Column("distance", _distance),
    Column("above floor", _above_floor),
    Column("ratio", _ratio),
    Column("s/video", _seconds),
)
"""How far from the reference, and how fast."""
