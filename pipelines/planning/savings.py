"""Settings that save memory of a GPU, and the cheapest of them with which a run fits.

    cheapest first     guidance in turn, teacher in bfloat16, products in bfloat16, checkpointing,
                       average and moments in main memory, inputs of layers in main memory,
                       teacher in 8 bits, whole on every rank
    proposed           added one after the other until the run fits; then each that it fits
                       without is left out again, the dearest first

    all_savings        every choice of them, for `pipelines.planning.fitting` to find the fastest;
                       each with either `fake_score.walk`, where both are possible

None of them changes what is trained. What they cost in time is in the plan that is made with them.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace

from pipelines.config.roles import DISCRIMINATOR, FAKE_SCORE, GENERATOR, ROLES, TEACHER
from pipelines.planning.hardware import Hardware
from pipelines.planning.pool_maps import any_layout_fits
from pipelines.planning.search import any_split_fits
from pipelines.planning.workload import Workload

_LEARNERS = frozenset((GENERATOR, FAKE_SCORE))


@dataclass(frozen=True, slots=True)
class Saving:
    """A change of settings that takes less memory of a GPU.

    Attributes:
        settings: Of the recipe.
        apply: Returns the workload with them.
    """

    settings: tuple[str, ...]
    apply: Callable[[Workload], Workload]


def savings(work: Workload) -> Iterator[Saving]:
    """Changes that a workload has not made yet, the cheapest first."""
    for saving in SAVINGS:
        if saving.apply(work) != work:
            yield saving


@dataclass(frozen=True, slots=True)
class Saved:
    """An iteration with some of the savings.

    Attributes:
        work: The iteration.
        settings: Of the recipe, that were changed.
    """

    work: Workload
    settings: tuple[str, ...] = ()


def all_savings(work: Workload) -> list[Saved]:
    """Every iteration that some of the savings make of one, the fewest settings for each."""
    found = [Saved(work)]
    for saving in SAVINGS:
        for one in found[:]:
            more = saving.apply(one.work)
            # Without it first: a setting that this one overrides is not named beside it.
            if all(more != other.work for other in found):
                found.append(Saved(more, one.settings + saving.settings))
    return found + [
        Saved(other, (*one.settings, walk_setting(other)))
        for one in found
        if (other := one.work.other_walk)
    ]


def walk_setting(work: Workload) -> str:
    """The setting of `fake_score.walk` that an iteration has."""
    return f"fake_score.walk={'joint' if work.kind.joint else 'apart'}"


def fitting_savings(
    work: Workload, hardware: Hardware, num_gpus: int
) -> tuple[Workload, tuple[str, ...]] | None:
    """The cheapest settings with which a run fits; none of them if it fits as it is.

    Args:
        work: The iteration.
        hardware: What it runs on.
        num_gpus: For the three roles.

    Returns:
        The workload with the settings, and the settings; None if all of them do not suffice.
    """
    taken: list[Saving] = []
    fits = run_fits(work, hardware, num_gpus)
    for saving in savings(work):
        if fits:
            break
        taken.append(saving)
        fits = run_fits(_with(work, taken), hardware, num_gpus)
    if not fits:
        return None
    for saving in reversed(taken[:]):
        fewer = [one for one in taken if one is not saving]
        if run_fits(_with(work, fewer), hardware, num_gpus):
            taken = fewer
    return _with(work, taken), tuple(name for saving in taken for name in saving.settings)


def with_all_savings(work: Workload) -> Workload:
    """Returns the iteration with every setting that saves memory."""
    return _with(work, list(savings(work)))


def run_fits(work: Workload, hardware: Hardware, num_gpus: int) -> bool:
    """Returns True if a GPU of every pool holds its ranks, in some layout."""
    return any_layout_fits(work, hardware, num_gpus) or any_split_fits(work, hardware, num_gpus)


def _with(work: Workload, taken: list[Saving]) -> Workload:
    for saving in taken:
        work = saving.apply(work)
    return work


def _of_learners(key: str) -> tuple[str, ...]:
    return tuple(f"{role}.{key}" for role in (GENERATOR, FAKE_SCORE))


def _checkpointing(work: Workload, roles: Collection[str]) -> Workload:
    own = frozenset(roles)
    return replace(work, checkpointing=work.checkpointing | own, selective=work.selective - own)


SAVINGS = (
    Saving(
        ("teacher.batched_guidance=false",),
        lambda work: replace(work, in_turn=True) if work.guided else work,
    ),
    Saving(
        ("teacher.compute.weights=bf16",),
        lambda work: (
            replace(work, teacher_weights="bf16") if work.teacher_weights == "fp32" else work
        ),
    ),
    Saving(
        tuple(f"{role}.compute.precision=bf16" for role in ROLES),
        lambda work: replace(work, bf16=work.bf16 | frozenset(ROLES)),
    ),
    Saving(
        _of_learners("compute.checkpointing=true"),
        lambda work: _checkpointing(work, _LEARNERS),
    ),
    Saving(
        ("discriminator.compute.precision=bf16", "discriminator.compute.weights=bf16"),
        lambda work: (
            replace(
                work,
                bf16=work.bf16 | {DISCRIMINATOR},
                heads=replace(work.heads, weights="bf16"),
            )
            if work.heads
            else work
        ),
    ),
    Saving(
        ("discriminator.compute.checkpointing=true",),
        lambda work: _checkpointing(work, {DISCRIMINATOR}) if work.heads else work,
    ),
    Saving(
        ("generator.ema_device=cpu",),
        lambda work: replace(work, average_on_cpu=True) if work.averages else work,
    ),
    Saving(
        _of_learners("optimizer.moments=cpu"),
        lambda work: replace(work, moments_on_cpu=work.moments_on_cpu | _LEARNERS),
    ),
    Saving(
        _of_learners("compute.checkpointing=offload"),
        lambda work: replace(
            _checkpointing(work, _LEARNERS), offloading=work.offloading | _LEARNERS
        ),
    ),
    Saving(
        ("teacher.compute.weights=fp8", "teacher.sharded=false"),
        lambda work: (
            work
            # Adapters have the teacher as their base, which stays as it is.
            if work.kind.through_teacher
            or work.adapters
            or TEACHER not in work.bf16
            or TEACHER in work.checkpointing
            else replace(work, teacher_weights="fp8", teacher_whole=True)
        ),
    ),
)
"""All changes, the cheapest first."""
