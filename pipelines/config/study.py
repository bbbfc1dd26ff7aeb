"""The section `study:` of a recipe: what is compared, on which budget, and how it is measured."""

from typing import Annotated, Literal

from pydantic import Field, JsonValue

from pipelines.config.section import Section

VariantName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class BudgetSettings(Section):
    """Budget of every run of a study."""

    unit: Literal["iterations", "seconds", "forwards"] = "iterations"
    """`iterations`: updates of the generator. `seconds`: of training, by the clock. `forwards`:
    passes of the networks over one batch, a backward pass counted by what it costs; see
    `pipelines.study.passes`."""
    amount: float = Field(default=100.0, gt=0)
    """How much of it."""


class StudySettings(Section):
    """Comparison of `sgmd study`: every variant with every seed, each on the same budget."""

    variants: dict[VariantName, dict[str, JsonValue]] = Field(default_factory=dict)
    """By name, what a variant has otherwise than the recipe, by dotted key."""
    seeds: list[Annotated[int, Field(ge=0)]] = Field(default_factory=lambda: [0, 1, 2])
    """Each variant is run once with each."""
    budget: BudgetSettings = BudgetSettings()
    """The same for every run."""
    settings: dict[str, JsonValue] = Field(default_factory=dict)
    """What every run has otherwise than the recipe, by dotted key."""
    measurements: int = Field(default=3, ge=1)
    """Points of a run that are measured, the last one its end. Each one costs a checkpoint."""
    num_captions: int = Field(default=128, ge=2)
    """Held-out captions that are measured with, one clip each."""
