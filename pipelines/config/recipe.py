"""Every setting of a distillation, checked before anything is started.

    recipe.yaml + overrides  ->  DistillConfig (frozen)  ->  each part gets its own section

Sections that a component owns (`objective`, `generator`, ...) are that component's own record;
the sections of the run itself are defined here. What depends on files, such as whether the clips
fit the networks, is checked by `pipelines.distillation.preflight`. Secrets are never settings: they
come from the environment.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, JsonValue, field_validator

from cluster.paths import real_path
from cluster.schedule.program import Team
from cluster.stores import store_address
from pipelines.config import recipe_files, settings_check
from pipelines.config.alarms import AlarmSettings
from pipelines.config.caption_sets import DataSettings
from pipelines.config.checkpointing import CheckpointSettings, ValidationSettings
from pipelines.config.clip_sizes import compiled_sizes
from pipelines.config.consistency import clipped_sums
from pipelines.config.contradictions import contradictions_of
from pipelines.config.digest import deciding_settings_of
from pipelines.config.experts import phases_in
from pipelines.config.guards import GuardSettings
from pipelines.config.lag import LagSettings
from pipelines.config.methods import ObjectiveSettings
from pipelines.config.model_folders import model_address, model_on_this_machine, models_of_roles
from pipelines.config.overrides import Override, apply_overrides, require_single
from pipelines.config.recovery import RecoverySettings
from pipelines.config.roles import DISCRIMINATOR, ROLES, TEACHER
from pipelines.config.section import Section
from pipelines.config.seldom_meant import odd_ends, split_factors, unlearned_guidance
from pipelines.config.study import StudySettings
from pipelines.config.sweep import SweepSettings
from pipelines.config.topology import TopologySettings
from pipelines.config.unreached import unreached_parts
from pipelines.config.unread import unread_settings
from sgmd_core.buckets import drawn_bucket
from sgmd_core.objectives import adversary_of, cautions_of, first_exit_of, looks_of
from sgmd_core.objectives.adversarial import AdversarialTerm
from sgmd_core.objectives.consistency import consistency_of
from sgmd_core.objectives.meanflow import flow_of
from sgmd_core.objectives.sgmd import SgmdObjective
from sgmd_core.phases import Phases
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

_log = logging.getLogger(__name__)


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


class DistillConfig(Section):
    """All settings of a distillation, as a recipe has them; made by `load_recipe`, frozen."""

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

    def contradictions(self) -> Iterable[str]:
        """Sentences on settings that do not fit together."""
        return contradictions_of(self)

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
        """Phases of the iterations; None where every iteration trains all steps."""
        return phases_in(self)

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
    def model_folder(self) -> Path:
        """The networks' folder on this machine; see `model_on_this_machine`."""
        return model_on_this_machine(self.model.folder)

    @property
    def teacher_folder(self) -> Path:
        """The teacher's folder on this machine."""
        return model_on_this_machine(models_of_roles(self)[TEACHER])

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

    def with_settings(self, settings: Mapping[str, JsonValue]) -> "DistillConfig":
        """The same run with other values, checked again.

        Args:
            settings: New values by dotted key, for example {"objective.lambda_nr": 0.05}.

        Raises:
            ConfigError: A key or a value is wrong.
        """
        return _changed(self, settings, f"changing settings of {self.name}")

    def in_folder(self, run: Path) -> "DistillConfig":
        """The same run, kept in this folder.

        Raises:
            ConfigError: The folder has no name that a run can have.
        """
        folder = run if run.name or store_address(run) else real_path(run)
        return self.with_settings({"output": str(folder.parent), "name": folder.name})

    def with_absolute_paths(self) -> "DistillConfig":
        """The same run for a process that works in another folder of this machine."""
        paths = {
            "model.folder": model_address(self.model.folder),
            "teacher.model": self.teacher.model and model_address(self.teacher.model),
            "data.train": self.data.train,
            "data.validation": self.data.validation,
            "output": self.output,
            "validation.teacher_clips": self.validation.teacher_clips,
        }
        also: list[JsonValue] = [
            {**each.model_dump(mode="json"), "source": recipe_files.absolute_path(each.source)}
            for each in self.data.also
        ]
        return self.with_settings(
            {key: recipe_files.absolute_path(path) for key, path in paths.items() if path}
            | ({"data.also": also} if also else {})
        )


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> DistillConfig:
    """Reads a recipe of `sgmd distill`.

    Args:
        name_or_path: Name of a recipe that ships, or path of a YAML file.
        overrides: Changed settings, for example `["objective.lambda_nr=0.05"]`; the last one of
            a key counts.

    Returns:
        The checked settings, for `distill`.

    Raises:
        ConfigError: The file, a key, a value or a combination is wrong; one error names all.
    """
    config = recipe_files.load(DistillConfig, name_or_path, overrides)
    # A grid over another method's settings is for `sgmd sweep` to refuse: nobody else reads it.
    own = {f"objective.{name}" for name in asdict(config.objective)}
    foreign = set(settings_check.known_keys(DistillConfig)) - own
    searched = config.sweep.dimensions
    check_sweep(
        config,
        [key for key in searched if not (key.startswith("objective.") and key in foreign)],
        f"checking the sweep of {name_or_path}",
    )
    given = [text.partition("=")[0].strip() for text in overrides]
    sentences = (
        *unread_settings(config, given),
        *clipped_sums(config),
        *compiled_sizes(config),
        *unlearned_guidance(
            config.objective, config.model.negative_prompt, config.data.prompt_dropout
        ),
        *unreached_parts(config),
        *odd_ends(config.schedule),
        *cautions_of(config.objective, config.schedule),
        *split_factors(config.teacher, config.teams[TEACHER]),
    )
    for sentence in sentences:
        _log.warning("%s", sentence)
    return config


def check_sweep(config: DistillConfig, keys: Iterable[str], attempted: str) -> None:
    """Checks the values of some keys of a sweep one by one: all of a choice, both ends of a range.

    A key with a condition is checked where it holds. `pipelines.sweeping.checks` has combinations.

    Raises:
        ConfigError: A key is not a setting of this recipe, or a value does not fit it.
    """
    trial = _changed(config, config.sweep.settings, attempted)
    dimensions = config.sweep.dimensions
    for key in keys:
        placed: dict[str, JsonValue] = {}
        conditions = [dimensions[key].places]
        while conditions:
            found = conditions.pop()
            placed |= found
            conditions += [dimensions[other].places for other in found]
        for value in dimensions[key].corners:
            _changed(trial, {**placed, key: value}, attempted)


def json_schema() -> dict[str, Any]:
    """JSON schema of a recipe, for editors that complete and check YAML."""
    schema = DistillConfig.model_json_schema()
    definitions = {**schema["$defs"], DistillConfig.__name__: schema}
    for kind in Section.kinds():
        if definition := definitions.get(kind.__name__):
            for name, meaning in kind.meanings().items():
                definition["properties"][name].setdefault("description", meaning)
    return schema


def _changed(
    config: DistillConfig, settings: Mapping[str, JsonValue], attempted: str
) -> DistillConfig:
    if settings.get("topology.mode") == "local":
        # Settings that leave Ray leave the cluster that the recipe names, too.
        settings = {"topology.address": None, **settings}
    changes = [Override(tuple(key.split(".")), value) for key, value in settings.items()]
    require_single(changes, attempted)
    changed = apply_overrides(config.model_dump(mode="json"), changes)
    return settings_check.validate(DistillConfig, changed, attempted)
