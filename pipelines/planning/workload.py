"""Workload of one iteration: its settings as far as costs go.

`pipelines.planning.stage_work` has the work of its stages, `pipelines.planning.kept_bytes` what
roles keep, `pipelines.planning.traffic` what they move.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, wraps
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from cluster.schedule.program import Program
from pipelines.config.recipe import DistillConfig
from pipelines.config.roles import DISCRIMINATOR, FAKE_SCORE, ROLES, TEACHER
from pipelines.planning.networks import (
    adapter_parameters,
    model_shape,
    other_shapes,
)
from pipelines.planning.workload_facts import (
    HeadsWork,
    allows_joint_walk,
    heads_of,
    largest_size_label,
    optimizers_of,
    roles_over_bf16,
    roles_where,
    shareable_buckets,
)
from pipelines.stages.algorithm import (
    SAMPLE,
    TRACK,
    iteration_program,
)
from pipelines.stages.costs import mean_rollouts
from pipelines.stages.kind import ALGORITHM_1, IterationKind
from sgmd_core.buckets import LatentBuckets
from sgmd_core.objectives import restarts_of
from workers.attention import KERNELS
from workers.models.shape import DenoiserShape
from workers.settings import DiversitySettings

StageName = tuple[str, str]
"""Role and stage."""

_Arguments = ParamSpec("_Arguments")
_Figure = TypeVar("_Figure")

TRACKING_STAGES = {(stage.role, stage.name) for stage in (SAMPLE, TRACK)}
"""Stages of each update of the fake score: role and name."""


# Without slots: the work of a stage is found once for all layouts that a search looks at.
@dataclass(frozen=True)
class Workload:
    """One iteration of a run, as far as it decides times and memory.

    Attributes:
        shape: The generator's network, and that of the other roles unless `others` has it.
        latent_shape: Channels, frames, rows, columns of one sample; of several sizes, those of the
            one with most tokens, which memory is counted at.
        text_length: Text positions.
        batch_size: Samples of one update.
        kind: Kind of the iteration.
        rollout: Forward passes of a rollout of the generator's batch, in the mean.
        sample: The same of a tracking batch.
        guided: Whether the teacher is asked with and without the caption.
        diversity: The extra loss on the generator's first step.
        averages: Whether the generator keeps averaged weights.
        teacher_weights: Type that the teacher's weights are kept in.
        teacher_whole: Whether every rank of a teacher holds all of them.
        average_on_cpu: Whether it keeps them in main memory.
        momentum: Roles whose optimizer keeps a first moment.
        moments_on_cpu: Roles whose optimizer keeps its moments in main memory.
        in_turn: Whether the teacher makes its two predictions in turn, not as one batch.
        bf16: Roles whose matrix products are in bfloat16; weights are in float32.
        checkpointing: Roles whose activations are made again in the backward pass.
        selective: Of these, roles that keep the outputs of self-attention.
        offloading: Of these, roles that keep the inputs of layers in main memory.
        others: Networks of roles of another size.
        adapters: Roles that train adapters, with the parameters of these.
        frozen_in_bf16: Of these, roles whose base is in bfloat16.
        restarts: Whether the fake score keeps the weights that it starts from, in main memory.
        heads: The discriminator; None without one.
        measures_lag: Whether the fake score's state is put aside while its lag is measured.
        moments_in_8_bits: Roles whose optimizer keeps second moments in 8 bits.
        ulysses: Roles whose ranks work on samples together, with how many of them do.
        all_pairs: Roles whose attention holds a matrix of all pairs of tokens.
        buckets: Several sizes that iterations draw from; None where there is one.
        may_walk_once: Whether it could, with checkpointing.
        idle_expert: Parameters of the expert that a run leaves as it is, of which no role has
            anything but the generator where `has_companion`; 0 where all is trained.
        has_companion: Whether the generator's rollouts begin with that expert, which is frozen.
        largest: Of several sizes, the one that memory is counted at, as people write it.
        paired: Whether each rank of the fake score has pairs of samples (`fake_score.gap`).
    """

    shape: DenoiserShape
    latent_shape: tuple[int, int, int, int]
    text_length: int
    batch_size: int
    kind: IterationKind = ALGORITHM_1
    rollout: float = 2.5
    sample: float = 2.5
    guided: bool = True
    diversity: DiversitySettings = field(default_factory=DiversitySettings)
    averages: bool = True
    teacher_weights: str = "fp32"
    teacher_whole: bool = False
    average_on_cpu: bool = False
    momentum: frozenset[str] = frozenset()
    moments_on_cpu: frozenset[str] = frozenset()
    in_turn: bool = False
    bf16: frozenset[str] = frozenset(ROLES)
    checkpointing: frozenset[str] = frozenset(ROLES)
    selective: frozenset[str] = frozenset()
    offloading: frozenset[str] = frozenset()
    others: Mapping[str, DenoiserShape] = field(default_factory=dict)
    adapters: tuple[tuple[str, int], ...] = ()
    frozen_in_bf16: frozenset[str] = frozenset()
    restarts: bool = False
    heads: HeadsWork | None = None
    measures_lag: bool = False
    moments_in_8_bits: frozenset[str] = frozenset()
    ulysses: tuple[tuple[str, int], ...] = ()
    all_pairs: frozenset[str] = frozenset()
    buckets: LatentBuckets | None = None
    may_walk_once: bool = False
    idle_expert: int = 0
    has_companion: bool = False
    largest: str = ""
    paired: bool = False

    def __getstate__(self) -> dict[str, Any]:
        # Figures are kept by functions that cannot be pickled, and are found again.
        return {name: value for name, value in vars(self).items() if name != "remembered"}

    @classmethod
    def of(cls, config: DistillConfig, model: str | None = None) -> Self:
        """Returns the workload of a recipe.

        Args:
            config: The recipe.
            model: Name of a released model of a family; None reads the recipe's model folder.

        Raises:
            ConfigError: There is no such shape or folder, or the clip does not fit it.
            ModelFolderError: The folder holds another kind of model.
        """
        shape = model_shape(config, model)
        updated, computes = optimizers_of(config), config.computes
        others = other_shapes(config, shape.denoiser)
        buckets = shareable_buckets(config, shape, others)
        rollout, sample = mean_rollouts(config)
        return cls(
            shape=shape.denoiser,
            latent_shape=max(buckets.shapes, key=shape.denoiser.num_tokens),
            text_length=config.model.text_length,
            batch_size=config.batch.size,
            kind=IterationKind.of(config),
            rollout=rollout,
            sample=sample,
            guided=config.teacher.guidance_scale != 1,
            diversity=config.generator.diversity,
            averages=config.generator.ema_decay > 0,
            teacher_weights=config.teacher.compute.weights,
            teacher_whole=not config.teacher.sharded,
            average_on_cpu=config.generator.ema_device == "cpu",
            momentum=roles_where(updated, lambda own: own.betas[0] > 0),
            moments_on_cpu=roles_where(updated, lambda own: own.moments == "cpu"),
            in_turn=not config.teacher.batched_guidance,
            bf16=roles_where(computes, lambda own: own.precision == "bf16"),
            checkpointing=roles_where(computes, lambda own: bool(own.checkpointing)),
            selective=roles_where(computes, lambda own: own.checkpointing == "selective"),
            offloading=roles_where(computes, lambda own: own.checkpointing == "offload"),
            others=others,
            adapters=adapter_parameters(config, shape.denoiser, others),
            frozen_in_bf16=roles_over_bf16(config),
            restarts=bool(restarts_of(config.objective)),
            heads=heads_of(config, others.get(TEACHER, shape.denoiser)),
            measures_lag=config.lag.every > 0,
            moments_in_8_bits=roles_where(updated, lambda own: own.moment_bits == 8),
            ulysses=tuple((role, own.ulysses) for role, own in computes.items() if own.ulysses > 1),
            all_pairs=roles_where(computes, lambda own: KERNELS[own.attention].all_pairs),
            buckets=buckets if len(buckets.shapes) > 1 else None,
            may_walk_once=allows_joint_walk(config, model),
            idle_expert=0 if config.model.alone is None else shape.denoiser.num_parameters,
            has_companion=config.model.alone == "low",
            largest=largest_size_label(config, buckets, shape.denoiser),
            paired=config.fake_score.gap == "shuffled",
        )

    @cached_property
    def other_walk(self) -> "Workload | None":
        """The same iteration with the other setting of `fake_score.walk`; None: there is none."""
        possible = self.may_walk_once and FAKE_SCORE in self.checkpointing
        return self.walking(joint=not self.kind.joint) if possible else None

    def walking(self, *, joint: bool) -> "Workload":
        """The same iteration with this setting of `fake_score.walk`."""
        return replace(self, kind=replace(self.kind, joint=joint))

    @property
    def at_largest(self) -> str:
        """Words on the size that memory is counted at; empty where there is one."""
        return f" at {self.largest}, the largest size of video.buckets" if self.largest else ""

    @property
    def sizes(self) -> "list[tuple[float, Workload]]":
        """The iteration at each size that is trained, with its share of the iterations."""
        if self.buckets is None:
            return [(1.0, self)]
        return [
            (share, replace(self, latent_shape=shape, buckets=None))
            for shape, share in zip(self.buckets.shapes, self.buckets.shares, strict=True)
        ]

    def ranks_per_sample(self, *roles: str) -> int:
        """Least number of ranks in which each of some roles has whole samples."""
        if not self.ulysses:
            return 1
        together = dict(self.ulysses)
        return math.lcm(*(together.get(role, 1) for role in roles))

    def suits(self, micro_batches: int, ranks: int) -> bool:
        """Returns True if so many ranks of the fake score may share a batch of so many parts."""
        groups = ranks // self.ranks_per_sample(FAKE_SCORE)
        return not self.paired or self.batch_size % (2 * micro_batches * groups) == 0

    def samples_of_a_rank(self, role: str, num_samples: int, ranks: int) -> float:
        """Most samples that a rank works through; a part of one where ranks work together.

        Args:
            role: The role.
            num_samples: Of a micro-batch.
            ranks: That share them; a multiple of the role's `ranks_per_sample`.
        """
        width = self.ranks_per_sample(role)
        most = -(-num_samples // (ranks // width))
        return most if width == 1 else most / width

    @property
    def roles(self) -> tuple[str, ...]:
        """Roles of the iteration."""
        return ROLES if self.heads is None else (*ROLES, DISCRIMINATOR)

    def num_trained(self, role: str) -> int:
        """Parameters that a learner updates: its adapters, its heads, or all."""
        if role == DISCRIMINATOR and self.heads is not None:
            return self.heads.num_parameters
        return dict(self.adapters).get(role, self.shape_of(role).num_parameters)

    def shape_of(self, role: str) -> DenoiserShape:
        """The network of a role; a discriminator has a copy of the teacher's."""
        return self.others.get(TEACHER if role == DISCRIMINATOR else role, self.shape)

    def updates_with(self, stage: StageName) -> int:
        """Times that an iteration goes through a stage: fresh tracking repeats its own."""
        return self.kind.tracking_updates if stage in TRACKING_STAGES else 1

    @cached_property
    def remembered(self) -> dict[Any, Any]:
        """Figures of the iteration that have been asked for: see `remember`."""
        return {}

    @property
    def program(self) -> Program:
        """The passes and updates of the iteration.

        A diversity loss has no stages of its own here: `pipelines.planning.stage_work` adds its
        work to those of the same role.
        """
        return iteration_program(replace(self.kind, diversity=False))

    @property
    def forward_flops(self) -> int:
        """Operations of one forward pass of one sample."""
        return self.shape.forward_flops(self.latent_shape, self.text_length)


def remember(
    figure: Callable[Concatenate[Workload, _Arguments], _Figure],
) -> Callable[Concatenate[Workload, _Arguments], _Figure]:
    """Decorates a figure of a workload so that it is found once for the same arguments.

    A search for a layout asks for the same few thousands of times. The figure is kept with the
    workload, so it has to be one that nobody changes.
    """

    @wraps(figure)
    def found(work: Workload, *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Figure:
        known, key = work.remembered, (figure, args, tuple(kwargs.items()))
        if key not in known:
            known[key] = figure(work, *args, **kwargs)
        return known[key]

    return found
