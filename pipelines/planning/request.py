"""Question of `sgmd plan`, and the plan, recipe and advice that answer it."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from pipelines.config.recipe import DistillConfig, load_recipe
from pipelines.config.roles import FAKE_SCORE, GENERATOR
from pipelines.planning import stage_times
from pipelines.planning.beside import (
    VALIDATOR,
    WITHOUT_VALIDATIONS,
    check_beside,
    handed_over,
    with_memory_beside,
)
from pipelines.planning.fitting import fastest_fit
from pipelines.planning.hardware import Hardware, parse_kinds
from pipelines.planning.passes import expected_lag, lag_share, total_units
from pipelines.planning.plan import Plan, best_layouts, make_mixed_plan, make_plan
from pipelines.planning.planned_layout import Layout
from pipelines.planning.savings import Saved, fitting_savings, walk_setting
from pipelines.planning.search import find_batch
from pipelines.planning.stage_times import StageTimes
from pipelines.planning.stage_work import role_costs
from pipelines.planning.workload import Workload
from sgmd_core.errors import ConfigError
from sgmd_core.words import count_in_words
from workers.attention import KERNELS, NATIVE

_ATTEMPTED = "planning a run"
_TO_GAIN = 1.05
_WALK_GAINS = 1.01
_MOST_GPUS = 4096  # the search over layouts grows with them
_GPUS, _MEMORY_GB = 8, 80.0
_ADAPTER_RANK = 64  # as in the recipes that train adapters


@dataclass(frozen=True, slots=True)
class Request:
    """Question of a plan. None leaves a number to its default.

    Attributes:
        recipe: Name of a recipe or its file.
        overrides: Settings, `KEY=VALUE`.
        gpus: GPUs of the whole run.
        gpu_memory: GB of memory of one.
        tflops: TFLOP/s that one reaches.
        kinds: Instead of these three, kinds of GPU as `GpuKind.parse` reads them.
        gpus_per_node: GPUs of a machine.
        node_bandwidth: GB/s at which a GPU is sent weights within a machine.
        network_bandwidth: The same between machines.
        host_memory: GB of main memory beside each GPU.
        model: Name of a released model, where the recipe's folder is not here.
        measured: A run or a benchmark to take times from.
        fit: Whether memory settings may be changed: to those with which it is fastest.
        any_batch: Whether the batch size may be changed.
    """

    recipe: str
    overrides: list[str] = field(default_factory=list)
    gpus: int | None = None
    gpu_memory: float | None = None
    tflops: float | None = None
    kinds: list[str] = field(default_factory=list)
    gpus_per_node: int = 8
    node_bandwidth: float = 200.0
    network_bandwidth: float = 40.0
    host_memory: float = 200.0
    model: str | None = None
    measured: Path | None = None
    fit: bool = False
    any_batch: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """Answer to a `Request`.

    Attributes:
        config: The recipe, with the memory settings that make it fit.
        plan: Layouts of it.
        advice: What else is worth knowing, a sentence each.
    """

    config: DistillConfig
    plan: Plan
    advice: list[str]


def answer(request: Request) -> Answer:
    """Plans what is asked.

    Raises:
        ConfigError: Options contradict each other, or the roles or a process beside them fit no
            GPU.
    """
    _require_amounts(request)
    hardware = Hardware(
        memory_gb=request.gpu_memory or _MEMORY_GB,
        host_memory_gb=request.host_memory,
        ranks_per_machine=request.gpus_per_node,
        gather_bandwidth=1e9 * request.node_bandwidth,
        gather_bandwidth_between=1e9 * request.network_bandwidth,
    )
    if request.tflops is not None:
        hardware = replace(hardware, flops=1e12 * request.tflops)
    config = load_recipe(request.recipe, request.overrides)
    found = (_mixed if request.kinds else _of_one_kind)(request, config, hardware)
    plan = with_memory_beside(found.plan, found.config, request.model)
    advice = [
        *check_beside(plan, found.config, request.model, _hardware_beside(plan)),
        *found.advice,
        *_lag(found.config, plan.work),
        *handed_over(plan, found.config),
        *_sizes(plan.work, found.config),
        *_attention(found.config),
        *_ulysses(plan.work),
    ]
    return replace(found, plan=plan, advice=advice)


def _hardware_beside(plan: Plan) -> Hardware:
    """GPUs of the processes beside the roles."""
    if not plan.kinds:
        return plan.hardware
    if (together := plan.kind_beside) is not None:
        return together.hardware
    # They are on several kinds, and each may be on the smallest.
    left = [kind.hardware for kind in plan.kinds if plan.left_over[kind.name]]
    return min(left, key=lambda hardware: hardware.usable_bytes)


def _mixed(request: Request, config: DistillConfig, hardware: Hardware) -> Answer:
    work = Workload.of(config, request.model)
    kinds = parse_kinds(request.kinds, hardware)
    _require_few(sum(kind.num_gpus for kind in kinds), "--kind")
    times = _times(request, work, kinds[0].hardware)
    return Answer(config, make_mixed_plan(work, times, kinds, config.gpus_beside), [])


def _of_one_kind(request: Request, config: DistillConfig, hardware: Hardware) -> Answer:
    work, beside = Workload.of(config, request.model), config.gpus_beside
    gpus = _GPUS if request.gpus is None else request.gpus
    for_roles = gpus - math.ceil(sum(beside.values()))
    if for_roles < 1:
        raise _nothing_left(gpus, beside)
    saved: tuple[str, ...] = ()
    times = _times(request, work, hardware)
    times_of = partial(_times_with, times, work, hardware)
    fastest = fastest_fit(work, times_of, hardware, for_roles)
    if request.fit and fastest is not None:
        work, saved, times = fastest.work, fastest.settings, times_of(fastest.work)
        config = load_recipe(request.recipe, [*request.overrides, *saved])
    size = find_batch(work, times, hardware, for_roles)
    suited = work if size == work.batch_size else replace(work, batch_size=size)
    try:
        result, other = (
            replace(make_plan(one, times, hardware, for_roles, beside), memory_settings=saved)
            for one in (work, suited)
        )
    except ConfigError as error:
        if words := _by_adapters(request, work, hardware, for_roles):
            error.add_note(words)
        raise
    if request.any_batch and _samples_per_s(other) > _samples_per_s(result):
        result, other = other, result
    advice = _batch(result, other)
    if fastest is not None and not request.any_batch:
        advice += _faster(result, fastest, times_of)
    return Answer(config, result, advice)


def _by_adapters(request: Request, work: Workload, hardware: Hardware, num_gpus: int) -> str:
    """Says with which settings adapters would fit where whole weights do not; empty: none."""
    if work.adapters:
        return ""
    settings = [
        f"{role}.{setting}"
        for role in (GENERATOR, FAKE_SCORE)
        for setting in (f"lora={{rank: {_ADAPTER_RANK}}}", "compute.weights=bf16")
    ]
    try:
        adapted = Workload.of(
            load_recipe(request.recipe, [*request.overrides, *settings]), request.model
        )
    except ConfigError:
        # Some methods train whole weights only.
        return ""
    found = fitting_savings(adapted, hardware, num_gpus)
    if found is None:
        return ""
    named = " ".join(f"'{setting}'" if " " in setting else setting for setting in settings)
    return f"Adapters in place of whole weights would fit, with {' '.join([named, *found[1]])}"


def _times_with(
    times: StageTimes, before: Workload, hardware: Hardware, after: Workload
) -> StageTimes:
    """Times of the recipe's iteration with other settings."""
    if times.is_measured:
        return stage_times.rescaled(times, before, after, hardware)
    return stage_times.modelled(after, hardware)


def _times(request: Request, work: Workload, hardware: Hardware) -> StageTimes:
    if request.measured is None:
        return stage_times.modelled(work, hardware)
    return stage_times.measured(request.measured, work)


def _require_amounts(request: Request) -> None:
    of_one_kind = {
        "--gpus": request.gpus is not None,
        "--gpu-memory": request.gpu_memory is not None,
        "--tflops": request.tflops is not None,
        "--fit": request.fit,
        "--any-batch": request.any_batch,
    }
    given = [option for option, is_given in of_one_kind.items() if is_given]
    if request.kinds and given:
        raise ConfigError(
            _ATTEMPTED,
            f"--kind and {', '.join(given)}",
            "several kinds of GPU by --kind, or one by the others",
        )
    if len(request.kinds) == 1:
        raise ConfigError(_ATTEMPTED, "one --kind", "at least two, or --gpus and --gpu-memory")
    if request.measured is not None and request.tflops is not None:
        raise ConfigError(_ATTEMPTED, "both --measured and --tflops", "times from one of them")
    amounts = {
        "--gpu-memory": request.gpu_memory,
        "--tflops": request.tflops,
        "--host-memory": request.host_memory,
        "--gpus-per-node": request.gpus_per_node,
        "--node-bandwidth": request.node_bandwidth,
        "--network-bandwidth": request.network_bandwidth,
    }
    for option, value in amounts.items():
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(_ATTEMPTED, f"{option} {value:g}", "a number above 0")
    _require_few(request.gpus or 0, "--gpus")


def _require_few(gpus: int, option: str) -> None:
    if gpus > _MOST_GPUS:
        raise ConfigError(_ATTEMPTED, f"{option} of {gpus} GPUs", f"at most {_MOST_GPUS}")


def _nothing_left(num_gpus: int, beside: Mapping[str, float]) -> ConfigError:
    taken = ", ".join(f"{section} {share:g}" for section, share in beside.items())
    others = [section for section in beside if section != VALIDATOR]
    remedies = [f"Set {WITHOUT_VALIDATIONS}"] if VALIDATOR in beside else []
    if others:
        remedies.append("set " + " ".join(f"topology.{section}.gpus=0" for section in others))
    least = math.ceil(sum(beside.values())) + 1
    return ConfigError(
        f"planning for {count_in_words(num_gpus, 'GPU')}",
        f"no GPU left for the roles beside {taken}" if taken else "no GPU for the roles",
        "at least one",
        "; ".join(remedies) + f"; or give --gpus {least}" if remedies else "Give --gpus 1 or more",
    )


def _lag(config: DistillConfig, work: Workload) -> list[str]:
    """Returns what a measured lag costs."""
    if not config.lag.every:
        return []
    costs, every = role_costs(work), count_in_words(config.lag.every, "iteration")
    return [
        f"measuring the lag every {every} (lag.every) takes "
        f"{total_units(expected_lag(config), costs):.3g} passes over a batch each time, "
        f"{100 * lag_share(config, costs):.2g} % beside the iterations; it is not in their seconds"
    ]


def _sizes(work: Workload, config: DistillConfig) -> list[str]:
    """Returns what the plan takes of several sizes of clips."""
    if work.buckets is None:
        return []
    tokens = [work.shape.num_tokens(shape) for shape in work.buckets.shapes]
    most = config.video.buckets[tokens.index(max(tokens))]
    return [
        f"video.buckets has {len(tokens)} sizes: memory is that of the largest, {most.label} "
        f"({max(tokens)} tokens a sample); seconds are means over all of them, by weight"
    ]


def _attention(config: DistillConfig) -> list[str]:
    """Returns what the plan does not know of chosen kernels of attention."""
    lines: list[str] = []
    for role, compute in config.computes.items():
        if compute.attention != NATIVE:
            line = f"{role}.compute.attention {compute.attention}: times are those of native"
            if KERNELS[compute.attention].all_pairs:
                line += ", and memory, too: a matrix of all pairs of tokens comes on top"
            lines.append(line)
    return lines


def _ulysses(work: Workload) -> list[str]:
    """Returns what a sample that several ranks share comes to."""
    return [
        f"{role}.compute.ulysses {number}: each sample lies on {number} ranks, so a rank has "
        f"1/{number} of its activations and work; the seconds contain the exchange of tokens for "
        "heads around attention, at the bandwidth between these ranks"
        for role, number in work.ulysses
    ]


def _samples_per_s(plan: Plan) -> float:
    return plan.work.batch_size / plan.best.iteration_s


def _faster(result: Plan, fastest: Saved, times_of: Callable[[Workload], StageTimes]) -> list[str]:
    """Returns the gain of settings that save memory, or of the other `fake_score.walk` alone."""
    if fastest.work == result.work.other_walk:
        return _walk(result, times_of)
    best = _fastest(result, fastest.work, times_of)
    gain = result.best.iteration_s / best.iteration_s
    if gain < _TO_GAIN:
        return _walk(result, times_of)
    return [
        f"with {' '.join(fastest.settings)} a layout fits that takes {best.iteration_s:.4g} s an "
        f"iteration, {100 * (1 - 1 / gain):.0f} % less (--fit)"
    ]


def _fastest(result: Plan, work: Workload, times_of: Callable[[Workload], StageTimes]) -> Layout:
    return best_layouts(work, times_of(work), result.hardware, result.num_gpus)[0]


def _walk(result: Plan, times_of: Callable[[Workload], StageTimes]) -> list[str]:
    """Returns the gain of the other `fake_score.walk`, if it gains."""
    other = result.work.other_walk
    if other is None:
        return []
    best = _fastest(result, other, times_of)
    gain = result.best.iteration_s / best.iteration_s
    if not best.fits or gain < _WALK_GAINS:
        return []
    return [
        f"with {walk_setting(other)} an iteration takes {best.iteration_s:.4g} s ({best.name}), "
        f"{100 * (1 - 1 / gain):.1f} % less, and the numbers are the same to the bit (--fit)"
    ]


def _batch(result: Plan, suited: Plan) -> list[str]:
    """Returns what another batch size would gain, if it is worth a line."""
    gain = _samples_per_s(suited) / _samples_per_s(result)
    if gain < _TO_GAIN:
        return []
    return [
        f"with batch.size={suited.work.batch_size} the same GPUs would make "
        f"{100 * (gain - 1):.0f} % more samples a second (--any-batch)"
    ]
