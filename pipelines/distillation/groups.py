"""Opens the groups of a run where the recipe wants them, and closes them on every way out.

    local   one process, no Ray: every call runs at once
    map     Ray actors: learn x ranks (generator, teacher) | score x ranks (fake score, teacher),
            or as topology.roles says
    pools   Ray actors: generator x ranks | fake_score x ranks | teacher x replicas x ranks
    fused   Ray actors x ranks, each with a rank of all roles
            a discriminator, where the method has one: a pool of its own, or where topology.roles
            puts it
            on Ray besides: text | feed | validator

All make the same roles from the same factories and settings, so they make the same numbers.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, TypeVarTuple

from cluster.local import LocalWorkerGroup
from cluster.ray.direct import Direct
from cluster.ray.pools import bundles_of
from cluster.schedule.program import Team
from cluster.worker_group import WorkerGroup
from pipelines.config.adapters import teacher_is_base
from pipelines.config.model_folders import (
    model_address,
    model_on_this_machine,
)
from pipelines.config.recipe import DistillConfig
from pipelines.config.roles import DISCRIMINATOR, FAKE_SCORE, GENERATOR, TEACHER
from pipelines.data.stream.batch import BatchFeed
from pipelines.data.stream.feed import FeedProgress, StreamSettings
from pipelines.data.stream.mixing import build_feed
from pipelines.distillation.iteration import Roles
from pipelines.distillation.pools import BORROWED, own_cluster_size, own_pools_of, pools_of
from pipelines.distillation.preflight import Preflight
from pipelines.distillation.training_sets import training_sets
from pipelines.distillation.validation import ValidationPlan, Validator, build_validator
from pipelines.distillation.watch import watch_groups
from pipelines.run.events import EventLog
from pipelines.run.folder import RunFolder
from pipelines.run.places import shared_place
from pipelines.stages.algorithm import STAGES
from workers.build import (
    build_discriminator,
    build_fake_score,
    build_generator,
    build_teacher,
    build_text_encoder,
)
from workers.kept_clips import KeptClips, clip_facts
from workers.models.families import modules_of
from workers.samplings import REFERENCE, TEACHER_FEW, teacher_samplings
from workers.settings import ModelSettings
from workers.text_encoder import TextEncoder

# Ray is imported where it starts: mode `local` runs on machines that do not have it.
if TYPE_CHECKING:
    from cluster.ray.hosts import Hosts
    from cluster.ray.topology import Placement

W = TypeVar("W")
Ts = TypeVarTuple("Ts")


@dataclass(frozen=True, slots=True)
class Groups:
    """All worker groups of a run."""

    roles: Roles
    feed: WorkerGroup[BatchFeed]
    validator: WorkerGroup[Validator] | None

    @property
    def all(self) -> list[WorkerGroup[Any]]:
        """Groups of learners, teacher, text encoder and feed, and the validator if there is one."""
        roles = self.roles
        found: list[WorkerGroup[Any]] = [
            *roles.learners.values(),
            roles.teacher,
            roles.text,
            self.feed,
        ]
        return [*found, self.validator] if self.validator else found


@contextmanager
def open_groups(
    config: DistillConfig,
    checked: Preflight,
    folder: RunFolder,
    progress: FeedProgress,
    num_rows: int,
    *,
    in_trial: bool = False,
    events: EventLog | None = None,
    service: str = "",
) -> Iterator[Groups]:
    """Starts every role and waits until all have loaded their networks.

    Args:
        config: The run's settings.
        checked: Result of the checks before the run.
        folder: Where the validator puts its sheets.
        progress: Where the run stands in its data.
        num_rows: Captions that it will still take.
        in_trial: Take over the placement group of the Tune trial that this process is.
        events: Receives the processes that the watch has ended, and its observer a warning when the
            Ray cluster is lost or a machine may lack memory; None: nothing is watched.
        service: Name of a `cluster.ray.service` that has the frozen roles; empty: own ones.

    Raises:
        SgmdError: A role cannot load what it needs.
        ClusterError: Ray does not start, or the cluster lacks what the pools ask for.
    """
    with ExitStack() as stack:
        opener: _Opener = _LocalOpener()
        if config.topology.mode != "local":
            tell = _no_words if events is None else events.observer.warning
            placement = _placed(stack, config, checked, tell, in_trial=in_trial, lent=bool(service))
            opener = _ray_opener(config, placement, service)
        groups = _open(opener, stack, config, checked, folder, progress, num_rows)
        if events is not None:
            limit_s = config.validation.timeout_s
            # What is borrowed serves others, too, and its owner looks after it.
            watched = [each for each in groups.all if not (service and each.name in BORROWED)]
            stack.enter_context(watch_groups(watched, config.topology, limit_s, folder, events))
        _wait_ready(groups.all, config.topology.start_timeout_s)
        yield groups


def _no_words(words: str) -> None:
    """Ignores a warning."""


def _placed(
    stack: ExitStack,
    config: DistillConfig,
    checked: Preflight,
    tell: Callable[[str], None],
    *,
    in_trial: bool,
    lent: bool,
) -> "Placement":
    """Starts or joins Ray, and reserves what the pools ask for, until the stack is closed."""
    from cluster.connection_watch import watch_cluster
    from cluster.ray.topology import Placement, reserve
    from cluster.runtime import start_ray
    from pipelines.distillation.placed_memory import require_placed

    pools = own_pools_of(config) if lent else pools_of(config)
    num_cpus = own_cluster_size(config, bundles_of(pools))
    stack.enter_context(
        start_ray(
            config.topology.address,
            num_cpus=num_cpus,
            preload=modules_of(model_on_this_machine(config.model.folder)),
        )
    )
    stack.enter_context(watch_cluster(tell))
    placement = (
        Placement.adopt_current(pools)
        if in_trial
        else reserve(pools, config.topology.start_timeout_s)
    )
    stack.enter_context(placement)
    for words in require_placed(config, checked.model, checked.texts.encoding, placement):
        tell(words)
    return placement


def _wait_ready(groups: Sequence[WorkerGroup[Any]], timeout_s: float) -> None:
    """Waits until all have loaded their networks, side by side."""
    deadline_s = time.monotonic() + timeout_s
    for group in groups:
        # At the deadline the others may be ready, and must not be counted as late.
        group.wait_ready(max(1.0, deadline_s - time.monotonic()))


class _Opener(Protocol):
    """Makes one group."""

    def open(
        self, name: str, factory: Callable[[*Ts], W], args: tuple[*Ts], team: Team
    ) -> WorkerGroup[W]: ...


class _LocalOpener:
    def open(
        self, name: str, factory: Callable[[*Ts], W], args: tuple[*Ts], team: Team
    ) -> WorkerGroup[W]:
        return LocalWorkerGroup(name, [factory(*args) for _ in range(team.size)])


@dataclass(frozen=True)
class _RayOpener:
    """Makes groups of Ray actors.

    Attributes:
        placement: Reserved resources.
        bf16_kinds: Kinds of tensors that are rounded on the way.
        direct: What the roles send one another past the object store; None: nothing.
        shared: Pools of processes that roles share, by name; empty: each role has its own.
        service: Service that has the frozen roles; empty: none.
        borrower: Name of the run.
        scheduled: Roles that send one another results.
    """

    placement: "Placement"
    bf16_kinds: frozenset[str]
    direct: Direct | None
    shared: "Mapping[str, Hosts]"
    service: str = ""
    borrower: str = ""
    scheduled: tuple[str, ...] = ()

    def open(
        self, name: str, factory: Callable[[*Ts], W], args: tuple[*Ts], team: Team
    ) -> WorkerGroup[W]:
        from cluster.ray.group import RayWorkerGroup

        if self.service and name in BORROWED:
            from cluster.ray.service import BorrowedHosts

            lent = BorrowedHosts(self.service, name, team.size, self.borrower)
            return RayWorkerGroup(name, factory, args, lent, bf16_kinds=self.bf16_kinds)
        if team.homes:
            hosts = [self.shared[home.pool] for home in team.homes]
            return RayWorkerGroup(name, factory, args, hosts, bf16_kinds=self.bf16_kinds)
        return RayWorkerGroup(
            name,
            factory,
            args,
            self.placement,
            replicas=team.replicas if team.ranks > 1 else None,
            bf16_kinds=self.bf16_kinds,
            direct=self.direct if name in self.scheduled else None,
        )


def direct_of(transport: str) -> Direct | None:
    """Results that the roles send one another, and the controller never fetches."""
    if transport == "object_store":
        return None
    return Direct(transport, frozenset(stage.name for stage in STAGES.values() if stage.sends))


def _ray_opener(config: DistillConfig, placement: "Placement", service: str) -> _RayOpener:
    from cluster.ray.hosts import Hosts

    topology = config.topology
    direct = direct_of(topology.transport)
    shared: dict[str, Hosts] = {}
    if topology.shares_pools:
        for name, pool in topology.role_pools_of(config.roles).items():
            shared[name] = Hosts(name, placement, pool.ranks, shared=True)
    return _RayOpener(
        placement, topology.bf16_kinds, direct, shared, service, config.name, config.roles
    )


def _open(
    opener: _Opener,
    stack: ExitStack,
    config: DistillConfig,
    checked: Preflight,
    folder: RunFolder,
    progress: FeedProgress,
    num_rows: int,
) -> Groups:
    def group(name: str, factory: Callable[[*Ts], W], args: tuple[*Ts]) -> WorkerGroup[W]:
        team = config.topology.teams_of(config.roles).get(name, Team())
        return stack.enter_context(opener.open(name, factory, args, team))

    models = {
        role: replace(config.model, folder=model_address(folder))
        for role, folder in config.models_of_roles.items()
    }
    model = models[GENERATOR]
    seed, threads = config.seed, config.topology.threads_per_rank
    # A rank that raised would leave the others in a collective: see `workers.finite`.
    raises = False
    sampled = (model, config.video, config.schedule)
    roles = Roles(
        generator=group(
            GENERATOR,
            build_generator,
            (*sampled, config.generator, seed, threads, raises, config.generator_task),
        ),
        fake_score=group(
            FAKE_SCORE,
            build_fake_score,
            (models[FAKE_SCORE], config.objective, config.fake_score, threads, seed, raises),
        ),
        teacher=group(
            TEACHER,
            build_teacher,
            (models[TEACHER], config.teacher, threads, teacher_is_base(config), raises),
        ),
        text=group("text", _text_factory(checked), (model, threads, config.data.text_cache)),
    )
    if DISCRIMINATOR in config.roles:
        judge = (models[TEACHER], config.objective, config.discriminator, threads, seed, raises)
        roles = replace(roles, discriminator=group(DISCRIMINATOR, build_discriminator, judge))
    feed = group("feed", build_feed, feed_arguments(config, checked, progress, num_rows))
    validator = None
    if checked.held_out:
        plan = _validation_plan(config, checked, folder)
        teacher = models[TEACHER].folder if config.teacher.model else None
        judged = (*sampled, plan, config.generator, threads, teacher)
        validator = group("validator", build_validator, (*judged, checked.texts.validation))
    return Groups(roles, feed, validator)


def _text_factory(checked: Preflight) -> Callable[[ModelSettings, int, int], TextEncoder]:
    lazily, stored = checked.has_stored_text, checked.texts.prompts
    return partial(build_text_encoder, lazily=lazily, raises=False, stored=stored)


def feed_arguments(
    config: DistillConfig, checked: Preflight, progress: FeedProgress, num_rows: int
) -> tuple[StreamSettings, FeedProgress, int]:
    """Arguments of `build_feed`.

    Args:
        config: The run's settings.
        checked: Result of the checks before the run.
        progress: Where the run stands in its data.
        num_rows: Captions that it will still take.
    """
    sets = training_sets(config)
    stream = StreamSettings(
        checked.source,
        config.seed,
        config.data.shuffle,
        config.data.max_bad_fraction,
        ahead=None if config.topology.mode == "local" else config.data.read_ahead,
        weight=sets[0].weight,
        further=tuple(
            (looked.source, chosen.weight)
            for looked, chosen in zip(checked.further, sets[1:], strict=True)
        ),
    )
    return stream, progress, num_rows


def _validation_plan(
    config: DistillConfig, checked: Preflight, folder: RunFolder
) -> ValidationPlan:
    samplings = teacher_samplings(
        config.validation.teacher_steps,
        config.teacher.guidance_scale,
        config.generator.num_steps,
        config.seed,
    )
    return ValidationPlan(
        captions=checked.held_out,
        generator=samplings[TEACHER_FEW],
        teacher=samplings[REFERENCE],
        fps=config.video.fps,
        samples=shared_place(folder.samples),
        outage_s=config.recovery.storage_outage_s,
        scores=(config.checkpoint.score, config.sweep.score),
        kept=kept_clips_of(config, checked.content, checked.teacher_content, folder),
    )


def kept_clips_of(
    config: DistillConfig,
    model: Mapping[str, str],
    teacher: Mapping[str, str],
    folder: RunFolder,
) -> KeptClips:
    """The teacher's clips that a run's validations share with other runs.

    Args:
        config: The run's settings.
        model: Digests of the components of its model.
        teacher: Those of a teacher of another model; else empty.
        folder: Of the run.
    """
    content = {"base": dict(model), "teacher": dict(teacher)}
    shares_base = config.generator.lora is not None and not config.teacher.model
    # As `build_evaluator` loads the teacher.
    compute = config.generator.compute
    weights = compute.weights if shares_base else compute.precision
    return KeptClips(
        folder=config.validation.teacher_clips or shared_place(folder.teacher_clips),
        digest=json.dumps(content, sort_keys=True),
        facts=(*clip_facts(config.model, config.video, config.schedule), weights),
        patience_s=config.recovery.storage_outage_s,
    )
