"""Sections of a recipe, and what follows from them alone.

Sections that a component owns (`objective`, `generator`, ...) are that component's own record;
the sections of the run itself are defined here. `pipelines.config.recipe` adds the rules between
them, which take these.
"""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, field_validator

from cluster.schedule.program import Team
from cluster.stores import store_address
from pipelines.config import recipe_files
from pipelines.config.alarms import AlarmSettings
from pipelines.config.caption_sets import DataSettings
from pipelines.config.checkpointing import CheckpointSettings, ValidationSettings
from pipelines.config.digest import deciding_settings_of
from pipelines.config.guards import GuardSettings
from pipelines.config.lag import LagSettings
from pipelines.config.methods import ObjectiveSettings
from pipelines.config.model_folders import model_on_this_machine
from pipelines.config.recovery import RecoverySettings
from pipelines.config.roles import DISCRIMINATOR, FAKE_SCORE, GENERATOR, ROLES, TEACHER
from pipelines.config.section import Section
from pipelines.config.study import StudySettings
from pipelines.config.sweep import SweepSettings
from pipelines.config.topology import TopologySettings
from sgmd_core.buckets import drawn_bucket
from sgmd_core.objectives import adversary_of, first_exit_of, looks_of, phases_of
from sgmd_core.objectives.adversarial import AdversarialTerm
from sgmd_core.objectives.consistency import consistency_of
from sgmd_core.objectives.meanflow import flow_of
from sgmd_core.objectives.sgmd import SgmdObjective
from sgmd_core.phases import Phases, expert_phases
from sgmd_core.schedule import FlowMatchSchedule
from sgmd_core.types import Looks, Purpose
from workers.clip_settings import Bucket, VideoSettings
from workers.generator_task import GeneratorTask
from workers.network_settings import ComputeSettings
from workers.settings import (
    DiscriminatorSettings,
    ExportSettings,
    FakeScoreSettings,
    GeneratorSettings,
    ModelSettings,
    TeacherSettings,
)


class BatchSettings(Section):
    """Samples of one update."""

    size: int = Field(ge=1, le=2**20)
    """Samples in one iteration."""
    micro_batches: int = Field(default=1, ge=1)
    """Parts that the batch is split into, equal where it divides; they are what travels and what is
    pipelined."""
    exit_draws: int | None = Field(default=None, ge=1)
    """Draws of the exit step in one batch, each for as many samples; null: one per micro-batch. A
    run keeps its number, so `micro_batches` may change on resume to another multiple of it."""

    @property
    def num_exit_draws(self) -> int:
        """Draws of the exit step in one batch."""
        return self.exit_draws or self.micro_batches


class TraceSettings(Section):
    """Content of trace.json, for ui.perfetto.dev."""

    iterations: int = Field(default=20, ge=0)
    """The last iterations, every call of them; 0 writes no trace."""


class TrackerSettings(Section):
    """Logging besides the run folder's own files. W&B's key comes from WANDB_API_KEY."""

    wandb: Literal["off", "offline", "online"] = "off"
    """`offline` writes W&B's files into the run folder and needs no account."""
    project: str = "sgmd"
    """W&B project."""
    tensorboard: bool = False
    """Files for TensorBoard in RUN/tensorboard."""


class RecipeSections(Section):
    """Sections of a recipe by name, before the rules between them are checked."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200)
    """Name of the run and of its folder."""
    output: str = "runs"
    """Folder that holds the run's folder: a path, or an address such as s3://bucket/runs."""
    seed: int = Field(default=0, ge=0)
    """Every random draw is counted from it."""
    iterations: int = Field(ge=1)
    """Updates of the generator."""
    model: ModelSettings
    video: VideoSettings
    data: DataSettings
    batch: BatchSettings
    schedule: FlowMatchSchedule = FlowMatchSchedule()
    objective: ObjectiveSettings = SgmdObjective()
    generator: GeneratorSettings = GeneratorSettings()
    fake_score: FakeScoreSettings = FakeScoreSettings()
    teacher: TeacherSettings = TeacherSettings()
    topology: TopologySettings = TopologySettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    export: ExportSettings = ExportSettings()
    validation: ValidationSettings = ValidationSettings()
    alarms: AlarmSettings = AlarmSettings()
    guards: GuardSettings = GuardSettings()
    trace: TraceSettings = TraceSettings()
    tracker: TrackerSettings = TrackerSettings()
    sweep: SweepSettings = SweepSettings()
    study: StudySettings = StudySettings()
    recovery: RecoverySettings = RecoverySettings()
    discriminator: DiscriminatorSettings = DiscriminatorSettings()
    lag: LagSettings = LagSettings()

    @field_validator("output")
    @classmethod
    def _as_it_is_meant(cls, output: str) -> str:
        # A `Path` makes s3:/bucket of an address, and a folder called ~ of a home.
        return store_address(output) or recipe_files.own_home(output)

    @property
    def run_folder(self) -> Path:
        """Folder of the run; of an address, what `cluster.stores.store_address` reads."""
        return Path(self.output) / self.name

    @property
    def fresh_updates(self) -> int:
        """Updates of the fake score per iteration that see new samples; 0 with shared tracking."""
        return self.objective.fake_updates if self.fake_score.tracking == "fresh" else 0

    def bucket_at(self, iteration: int) -> Bucket:
        """Size of the clips of an iteration; see `sgmd_core.buckets`."""
        video = self.video
        return video.trained[drawn_bucket(self.seed, iteration, video.bucket_weights)]

    @property
    def looks(self) -> Looks:
        """Score queries of a micro-batch beside the one at the generator's samples."""
        return looks_of(self.objective, self.teacher.guidance_scale)

    @property
    def roles(self) -> tuple[str, ...]:
        """Roles that the method has."""
        return ROLES if self.adversary is None else (*ROLES, DISCRIMINATOR)

    @property
    def computes(self) -> dict[str, ComputeSettings]:
        """Sections `compute` of the method's roles."""
        return {role: getattr(self, role).compute for role in self.roles}

    @property
    def teams(self) -> dict[str, Team]:
        """Processes of each of the method's roles."""
        return {
            role: replace(team, ranks_per_sample=self.computes[role].ulysses)
            for role, team in self.topology.teams_of(self.roles).items()
        }

    @property
    def adversary(self) -> AdversarialTerm | None:
        """Term of the generator's loss by a discriminator; None without one."""
        return adversary_of(self.objective)

    @property
    def phases(self) -> Phases | None:
        """Phases of the iterations; None where every iteration trains all steps.

        They are those of the method, or the one of an expert that is trained alone.

        Raises:
            ConfigError: They do not fit the generator's steps.
        """
        steps, expert = self.generator.num_steps, self.model.alone
        if expert is None:
            return phases_of(self.objective, self.schedule, steps)
        return expert_phases(self.schedule, steps, self.model.boundary, expert)

    @property
    def generator_task(self) -> GeneratorTask:
        """Parts of the method that the generator computes beside the rollout."""
        return GeneratorTask(
            self.looks,
            self.phases,
            consistency_of(self.objective),
            flow_of(self.objective),
            self.first_exit(Purpose.TRACK),
        )

    def first_exit(self, purpose: Purpose) -> int:
        """First step that a rollout may leave at; one that both learn from is the generator's."""
        if self.fake_score.tracking == "shared":
            purpose = Purpose.GENERATE
        return first_exit_of(self.objective, self.generator.diversity.first_exit, purpose)

    @property
    def gpus_beside(self) -> dict[str, float]:
        """GPUs of the processes beside the three roles, by section; those that take some."""
        topology = self.topology
        pools = {"text": topology.text, "feed": topology.feed}
        if self.validation.every:
            pools["validator"] = topology.validator
        return {section: pool.gpus for section, pool in pools.items() if pool.gpus}

    @property
    def models_of_roles(self) -> dict[str, str]:
        """The model that each role starts from, as the recipe names it."""
        own = self.model.folder
        teacher = self.teacher.model or own
        start = teacher if self.fake_score.start == "teacher" else own
        return {GENERATOR: own, TEACHER: teacher, FAKE_SCORE: start}

    @property
    def model_folder(self) -> Path:
        """The networks' folder on this machine; see `model_on_this_machine`."""
        return model_on_this_machine(self.model.folder)

    @property
    def teacher_folder(self) -> Path:
        """The teacher's folder on this machine."""
        return model_on_this_machine(self.models_of_roles[TEACHER])

    @property
    def deciding_settings(self) -> dict[str, Any]:
        """The settings that decide a run's numbers, by dotted key.

        Not among them is where networks and data are: their content decides, wherever it lies.
        """
        return deciding_settings_of(self, acts_on_lag=self.lag.slow_above is not None)

    @property
    def digest(self) -> str:
        """Names the settings that decide a run's numbers; two runs that may share state agree."""
        text = json.dumps(self.deciding_settings, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def inference_settings(self) -> dict[str, Any]:
        """Returns how the distilled generator is to be sampled."""
        return {
            "num_steps": self.generator.num_steps,
            "guidance_scale": 1.0,
            "flow_shift": self.schedule.shift,
            "num_frames": self.video.num_frames,
            "height": self.video.height,
            "width": self.video.width,
            "fps": self.video.fps,
            "text_length": self.model.text_length,
            "negative_prompt": self.model.negative_prompt,
            "steps": self.schedule.steps,
            "warp_steps": self.schedule.warp_steps,
            "renoise": self.schedule.renoise,
            **(
                {"trained_sizes": [list(bucket.size) for bucket in self.video.buckets]}
                if self.video.buckets
                else {}
            ),
        }

    def to_yaml(self) -> str:
        """The resolved settings, as config.yaml holds them; `load_recipe` reads them back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
