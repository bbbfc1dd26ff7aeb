"""A recipe of `sgmd study` in closed-form worlds: Gaussian mixtures, exact teacher, small networks.

It has the sections `worlds`, `networks` and `search` instead of a model and data.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from pipelines.config.adversary import adversary_contradictions
from pipelines.config.methods import ObjectiveSettings, method_contradictions
from pipelines.config.recipe_files import find_recipe, own_home, recipe_sections
from pipelines.config.section import Section
from pipelines.config.shuffled import shuffling_contradictions
from pipelines.config.study import VariantName
from sgmd_core.errors import ConfigError
from sgmd_core.objectives import adversary_of, looks_of, phases_of
from sgmd_core.objectives.meanflow import flow_of
from sgmd_core.objectives.sgmd import SgmdObjective
from sgmd_core.objectives.shuffled import Gap
from sgmd_core.schedule import MAX_STEPS, FlowMatchSchedule
from sgmd_core.types import Looks
from workers.settings import DiversitySettings, FakeScoreSettings

INNER_STEPS = 2
"""Steps of the inner flow of a generator with a flow head."""

Rate = Annotated[float, Field(gt=0, le=1)]
_MOST_POINTS = 2**16


class MixtureSettings(Section):
    """One world: a mixture of equal Gaussians."""

    dim: int = Field(default=2, ge=1, le=4096)
    """Dimensions of a sample."""
    modes: int = Field(default=8, ge=1, le=1024)
    """Gaussians of the mixture: 1 at the origin, 2 opposite, more on a circle (2 dimensions) or at
    right angles (more)."""
    radius: PositiveFloat = 2.0
    """Distance of the modes from the origin."""
    spread: PositiveFloat = 0.2
    """Standard deviation of a mode in every direction."""
    num_steps: int = Field(default=1, ge=1, le=MAX_STEPS)
    """Steps of the generator. With one step it starts as the identity, which turns noise into
    noise; with more as the teacher, whose first step alone would lead to the mean of all modes."""
    forwards: float = Field(default=8000.0, gt=0)
    """Budget of every run: passes of a network over a batch, a backward pass to the input counted
    as one and to the weights as two."""


class NetworkSettings(Section):
    """Generator and fake score: what they start from, plus a correction by a small network."""

    width: int = Field(default=64, ge=1, le=4096)
    """Units of each hidden layer."""
    hidden_layers: int = Field(default=2, ge=1, le=8)
    """Hidden layers."""
    ema_decay: float = Field(default=0.99, ge=0, lt=1)
    """Of the generator's weights that are measured; 0 measures the weights themselves."""
    generator_layers: int | None = Field(default=None, ge=0, le=8)
    """Hidden layers of the generator, where it has others than the fake score; null: as many. With
    0, a generator of one step is affine, and makes a Gaussian whose score is known."""
    beta2: float = Field(default=0.999, ge=0, lt=1)
    """Adam's decay of squared gradients. Where gradients jump, a step can be
    1 / sqrt(1 - beta2) times the rate: 32 times at 0.999, 3.2 times at 0.9."""


class RateSearch(Section):
    """Search of learning rates: the same pairs for every variant, on seeds of its own."""

    generator_rates: list[Rate] = Field(
        default_factory=lambda: [1e-4, 3e-4, 1e-3, 3e-3, 1e-2], min_length=1
    )
    """Learning rates of the generator."""
    fake_rates: list[Rate] = Field(default_factory=lambda: [1e-3, 3e-3, 1e-2], min_length=1)
    """Learning rates of the fake score; every pair is tried."""
    num_seeds: PositiveInt = 2
    """Seeds of a pair; other ones than those of the comparison."""


class GaussianVariant(Section):
    """One method as it is compared."""

    objective: ObjectiveSettings = Field(default_factory=SgmdObjective)
    """As in a recipe of `sgmd distill`."""
    tracking: Literal["shared", "fresh"] = "shared"
    """`shared`: the fake score is tracked on the generator's own batch, in the same forward pass.
    `fresh`: on new samples of the updated generator, `objective.fake_updates` times."""
    gap: Gap = "own"
    """As `fake_score.gap` of a recipe of `sgmd distill`: `shuffled` is a control."""
    worlds: list[VariantName] = Field(default_factory=list)
    """Worlds that the variant is compared in; []: all. Phases need a generator of several steps."""

    @property
    def _fake_score(self) -> FakeScoreSettings:
        return FakeScoreSettings(tracking=self.tracking, gap=self.gap)

    def contradictions(self) -> Iterator[str]:
        """Sentences on what the study cannot do with the method."""
        problems = method_contradictions(self.objective, self._fake_score)
        problems += shuffling_contradictions(
            self.objective, self._fake_score, DiversitySettings(weight=0.0)
        )
        method = self.objective.method
        if looks_of(self.objective, guidance_scale=1.0) != Looks():
            problems.append(
                f"objective.method {method} looks at samples off a rollout, and this study makes "
                "none; set objective.off_trajectory=0"
            )
        adversary, flow = adversary_of(self.objective), flow_of(self.objective)
        if adversary is not None and adversary.has_penalty:
            problems.append(
                "objective.adversary.r1_weight asks about perturbed states, and this study draws "
                "no perturbations; set it to 0"
            )
        if flow is not None and flow.guidance != 1:
            problems.append(
                f"objective.meanflow.guidance is {flow.guidance:g}, and there are no captions here "
                "to guide by; set it to 1"
            )
        for problem in problems:
            yield problem.replace("fake_score.", "")


class GaussianStudyConfig(Section):
    """A recipe of the study in closed-form worlds."""

    name: VariantName = "gaussians"
    """Name of the study."""
    output: str = "runs"
    """Folder in which its folder is made."""
    num_seeds: int = Field(default=20, ge=2, le=1000)
    """Seeds of every variant, the same for all: differences are measured seed by seed."""
    batch_size: int = Field(default=128, ge=2, le=_MOST_POINTS)
    """Samples of an iteration."""
    measurements: int = Field(default=4, ge=1, le=100)
    """Points of a run that are measured, equally spaced, the last one its end."""
    num_samples: int = Field(default=1024, ge=16, le=_MOST_POINTS)
    """Samples of the generator and of the truth that are measured with."""
    schedule: FlowMatchSchedule = FlowMatchSchedule(shift=1.0)
    """As in a recipe of `sgmd distill`; a shift is for large videos."""
    networks: NetworkSettings = NetworkSettings()
    search: RateSearch = RateSearch()
    baseline: VariantName = "sgmd"
    """Variant that the others are compared with, seed by seed."""
    worlds: dict[VariantName, MixtureSettings] = Field(min_length=1)
    """By name."""
    variants: dict[VariantName, GaussianVariant] = Field(min_length=1)
    """By name."""

    def contradictions(self) -> Iterator[str]:
        """Sentences on settings that do not fit together."""
        if self.baseline not in self.variants:
            known = ", ".join(self.variants)
            yield f"baseline is {self.baseline}, which is not one of the variants {known}"
        for name, world in self.worlds.items():
            if world.modes > 2 and world.dim != 2 and world.modes > world.dim:
                yield (
                    f"worlds.{name} has {world.modes} modes at right angles in {world.dim} "
                    "dimensions"
                )
        for name, variant in self.variants.items():
            yield from _variant_contradictions(self, name, variant)
        shuffled = [name for name, each in self.variants.items() if each.gap == "shuffled"]
        if shuffled and self.batch_size % 2:
            yield (
                f"variants.{shuffled[0]}.gap is shuffled among pairs, and batch_size "
                f"{self.batch_size} is odd"
            )
        given, plain = self.schedule, FlowMatchSchedule()
        for name in ("score_level_min", "score_level_max", "score_window", "steps", "renoise"):
            if getattr(given, name) != getattr(plain, name):
                found = getattr(given, name)
                yield f"schedule.{name} is {found}, which this study does not draw by; leave it out"

    def worlds_of(self, variant: str) -> list[str]:
        """Names of the worlds that a variant is compared in."""
        named = self.variants[variant].worlds
        return [world for world in self.worlds if not named or world in named]

    @property
    def folder(self) -> Path:
        """Folder of the study; of an address, what `cluster.stores.store_address` reads."""
        return Path(own_home(self.output)) / f"{self.name}-study"


def _variant_contradictions(
    config: GaussianStudyConfig, name: str, variant: GaussianVariant
) -> Iterator[str]:
    """Sentences on what keeps a variant out of a world, or out of this study's noise levels."""
    objective = variant.objective
    if name == config.baseline and config.worlds_of(name) != list(config.worlds):
        yield f"variants.{name} is the baseline, which has to be in every world; set worlds=[]"
    for problem in adversary_contradictions(objective, config.schedule):
        yield f"variants.{name}.{problem}"
    for world in config.worlds_of(name):
        try:
            phases_of(objective, config.schedule, config.worlds[world].num_steps)
        except ConfigError as error:
            yield (
                f"variants.{name} cannot be in the world {world}: {error.found}; name others in "
                f"variants.{name}.worlds, or set worlds.{world}.num_steps"
            )


def is_gaussian_study(recipe: str) -> bool:
    """True for a recipe with the section `worlds`, of its own or of its base.

    Args:
        recipe: Name of a recipe that ships, or path of a YAML file.

    Raises:
        ConfigError: There is no such recipe, or it cannot be read.
    """
    return "worlds" in recipe_sections(find_recipe(recipe), GaussianStudyConfig)
