"""The result of an evaluation: rows and verdicts, as evaluation.json holds them.

One row a way of sampling. Distances are to the reference: the guided teacher at many steps. What a
verdict asks for is fixed here, beside the figures it is judged by, and is the same for every run.
How a terminal shows it all stands in `pipelines.commands.evaluation_table`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster.storage import write_json
from sgmd_core.errors import CheckpointError
from workers.samplings import TEACHER_FEW

MAX_DISTANCE_RATIO = 0.5
MIN_SHARE_RIGHT = 0.9
MAX_SPEED_CHANGE = 0.1

GENERATOR = "generator"

BUILT_IN_FEATURES = "built-in"


class Record(BaseModel):
    """Base of the records: frozen, and readable by older and newer versions."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Figure(Record):
    """An estimated figure and its standard error."""

    value: float
    error: float


class ErrorBar(Record):
    """A figure with its 95 % confidence interval."""

    value: float
    low: float
    high: float


class MeasuredFigure(ErrorBar):
    """A mean over clips, and its ratio to the teacher.

    Attributes:
        ratio: Over the same mean of the teacher's clips of many guided steps, which show the same
            captions from the same noise; None for those clips themselves, and where that is 0.
            Of a distance between sets: over that of the teacher's clips of other seeds.
    """

    ratio: ErrorBar | None = None


class EvaluationRow(Record):
    """One way of sampling, measured.

    Attributes:
        name: Which one: a name of `workers.samplings`, or `GENERATOR`.
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
        measures: Every figure that is a mean over clips, by name: motion and looks
            (`workers.measures`), `diversity` (distance of the features of two clips of a
            caption), `seconds_per_clip` (here a median over batches), and for captions of the world
            `shapes` the first three above and the speed once more, with intervals and ratios.
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
    measures: Mapping[str, MeasuredFigure] = Field(default_factory=dict)


class CriterionResult(Record):
    """One criterion and how the generator stands to it.

    Attributes:
        criterion: What is asked.
        passed: Whether it is met; None: these clips cannot tell.
        found: The figures.
    """

    criterion: str
    passed: bool | None
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
        features: What describes clips for distances and diversity: `built-in`, or the file of a
            network.
    """

    generator: str
    teacher: str
    captions: str
    num_captions: int
    num_distinct_captions: int
    batch_size: int
    device: str
    rows: tuple[EvaluationRow, ...]
    verdicts: tuple[CriterionResult, ...]
    sheet_png: str
    sheet_gif: str
    versions: dict[str, str]
    features: str = BUILT_IN_FEATURES

    def row(self, name: str) -> EvaluationRow:
        """The row of that name."""
        return next(row for row in self.rows if row.name == name)

    @property
    def passed(self) -> bool | None:
        """True if every criterion is met, False if one is not; None: one cannot be decided."""
        passed = [verdict.passed for verdict in self.verdicts]
        if False in passed:
            return False
        return None if None in passed else True

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


def evaluate_criteria(rows: Sequence[EvaluationRow]) -> tuple[CriterionResult, ...]:
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
                CriterionResult(
                    criterion=f"{quantity} right in at least {MIN_SHARE_RIGHT:.0%} of the clips",
                    passed=share >= MIN_SHARE_RIGHT,
                    found=f"{share:.1%}",
                )
            )
    if generator.speed_ratio is not None:
        verdicts.append(
            CriterionResult(
                criterion=f"mean speed within {MAX_SPEED_CHANGE:.0%} of the guided teacher's",
                passed=abs(generator.speed_ratio - 1) <= MAX_SPEED_CHANGE,
                found=f"{generator.speed_ratio:.3f} of it",
            )
        )
    return tuple(verdicts)


def _judge_distance(generator: EvaluationRow, baseline: EvaluationRow) -> CriterionResult:
    criterion = (
        f"distance above the floor at most {MAX_DISTANCE_RATIO:g} of the teacher's own in "
        f"{baseline.num_steps} unguided steps"
    )
    own, theirs, ratio = generator.above_floor, baseline.above_floor, generator.ratio
    assert own is not None, "the generator has a distance"
    assert theirs is not None, "the few-step teacher has a distance"
    assert ratio is not None, "the generator has a ratio"
    if theirs.value < 2 * theirs.error:
        found = f"the teacher's own is {with_error(theirs)}: too few clips to tell"
        return CriterionResult(criterion=criterion, passed=None, found=found)
    return CriterionResult(
        criterion=criterion,
        passed=ratio.value <= MAX_DISTANCE_RATIO,
        found=f"{with_error(own)} against {with_error(theirs)}, that is {with_error(ratio)} of it",
    )


def with_error(figure: Figure) -> str:
    """A figure and its standard error, with as many decimals as that allows."""
    return f"{rounded(figure)} ± {figure.error:.{decimals_for(figure.error)}f}"


def rounded(figure: Figure) -> str:
    """A figure with as many decimals as its error allows."""
    return f"{figure.value:.{decimals_for(figure.error)}f}"


def decimals_for(error: float) -> int:
    """As many decimals as give the error one figure, or two where the first is 1 or 2."""
    decimals = 2
    while decimals < 6 and 0 < error < 3 * 10.0**-decimals:
        decimals += 1
    return decimals
