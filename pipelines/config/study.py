"""The section `study:` of a recipe: what is compared, on which budget, and how it is measured."""

from functools import partial
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, JsonValue, model_validator

from pipelines.config.figures import known_figure
from pipelines.config.section import Section
from workers.measures import MEASURES

VariantName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


SHARE_SLACK = 0.98
"""Of a share of a budget: a third, written as 0.33, reaches the first of three points."""

_OF_STUDIES = tuple(
    each.name for each in MEASURES if each.name not in ("frechet_floor", "seconds_per_clip")
)


class Hypothesis(Section):
    """An expectation of a study, written down before its runs are made: who beats whom, in what."""

    variant: VariantName
    """The variant that is expected to be better."""
    baseline: VariantName
    """The one it is compared with, seed by seed."""
    figure: Annotated[str, AfterValidator(partial(known_figure, _OF_STUDIES, "study"))]
    """Figure that is compared, as `results.csv` names it."""
    better: Literal["lower", "higher", "nearer"] = "lower"
    """Direction of the better value; `nearer`: the one that differs less from the teacher's."""
    by: float = Field(default=0.0, allow_inf_nan=False)
    """Least difference, in the figure's unit. Below 0: not worse by more than that."""
    of_budget: float = Field(default=1.0, gt=0, le=1)
    """Share of the budget after which the variant is measured; the baseline always has all of it.
    For claims of the kind "a third of the cost"."""


class BudgetSettings(Section):
    """Budget of every run of a study."""

    unit: Literal["iterations", "seconds", "forwards"] = "iterations"
    """`iterations`: updates of the generator. `seconds`: of training, by the clock. `forwards`:
    passes of the networks over one batch, a backward pass counted by what it costs; see
    `pipelines.planning.passes`."""
    amount: float = Field(default=100.0, gt=0)
    """Size of the budget, in its unit."""


class StudySettings(Section):
    """Comparison of `sgmd study`: every variant with every seed, each on the same budget."""

    variants: dict[VariantName, dict[str, JsonValue]] = Field(default_factory=dict)
    """Settings in which each variant differs from the recipe, by its name and by dotted key."""
    seeds: list[Annotated[int, Field(ge=0)]] = Field(default_factory=lambda: [0, 1, 2])
    """Each variant is run once with each."""
    budget: BudgetSettings = BudgetSettings()
    """The same for every run."""
    settings: dict[str, JsonValue] = Field(default_factory=dict)
    """Settings in which every run differs from the recipe, by dotted key."""
    measurements: int = Field(default=3, ge=1)
    """Points of a run that are measured, the last one its end. Each one costs a checkpoint."""
    num_captions: int = Field(default=128, ge=2)
    """Held-out captions that are measured with, one clip each."""
    hypotheses: dict[VariantName, Hypothesis] = Field(default_factory=dict)
    """By name, what is expected. Each is tested over the seeds, all of them corrected together."""

    @model_validator(mode="after")
    def _compares_what_is_run(self) -> "StudySettings":
        for name, expected in self.hypotheses.items():
            sides = (expected.variant, expected.baseline)
            for side in sides:
                if side not in self.variants:
                    raise ValueError(
                        f"hypotheses.{name} names {side}, which is not one of the variants"
                        f" {', '.join(self.variants) or '(none)'}"
                    )
            if sides[0] == sides[1] and expected.of_budget == 1:
                raise ValueError(f"hypotheses.{name} compares {sides[0]} with itself")
            if expected.of_budget * self.measurements < SHARE_SLACK:
                raise ValueError(
                    f"hypotheses.{name} looks at {expected.of_budget:g} of the budget, and"
                    f" {self.measurements} measurements have their first point after"
                    f" 1/{self.measurements} of it: raise measurements"
                )
        return self
