"""Seconds of each stage: from arithmetic, from a run, or from a benchmark.

    modelled     passes * operations of a pass / operations a second
    a run        its metrics.jsonl: median busy seconds of each stage over the samples of a batch
    a benchmark  the gpu.json that benchmarks/gpu_check.py writes

Of several sizes of clips they are means by weight. Times measured for another network or clip are
scaled by operations, and the source says so. Where
a sample without a loss was not measured it is taken for a rollout, which makes the same passes.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from cluster.storage import read_text
from cluster.stores import store_address
from pipelines.config.recipe import load_recipe
from pipelines.config.roles import GENERATOR, ROLES
from pipelines.planning.hardware import Hardware
from pipelines.planning.kept_bytes import kept_copies, stream_bytes
from pipelines.planning.stage_work import (
    COUNTED_WITH,
    backwards_by_stage,
    mean_over_sizes,
    units_by_stage,
)
from pipelines.planning.workload import StageName, Workload
from pipelines.run.folder import RunFolder, read_jsonl
from pipelines.run.opened_copy import run_copy
from pipelines.run.places import shared_place
from pipelines.stages.algorithm import ROLLOUT, SAMPLE
from sgmd_core.errors import ConfigError
from sgmd_core.words import count_in_words
from workers.models.families import family_named
from workers.models.shape import PassFlops

_FAMILY_OF_BENCHMARKS = "wan"
"""Family of a gpu.json that does not name one."""
_NOT_A_BENCHMARK = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)
_MEASURED = "measured"
_NOT_NEEDED = ("samples", "stacks", "ledger", "wandb", "tensorboard")
_TO_INPUT = "fake_score.signal"
"""Stage with a backward pass to the input, as a benchmark names it."""
_COUNTED_AS_FORWARD = (2.0, 3.0)
"""Its passes where that pass counts one, without and with activation checkpointing."""
_BYTES_OF_AN_UPDATED = 8
"""That an update moves for an entry of weights, gradients, moments, average: in and out."""

_ADDED = {(own.role, own.name): (added.role, added.name) for added, own in COUNTED_WITH.items()}
"""Stages of a diversity loss, by the stage that a workload counts them with."""

_Found = tuple[dict[StageName, float], dict[StageName, float], str, tuple[tuple[str, int], ...]]


@dataclass(frozen=True, slots=True)
class StageTimes:
    """Seconds of one sample.

    Attributes:
        seconds: By role and stage, of one sample on one GPU.
        source: Where they come from, in words.
        ulysses: By role, ranks that had each sample together where the seconds were measured: the
            seconds contain their exchanges. Others worked alone.
    """

    seconds: Mapping[StageName, float]
    source: str
    ulysses: tuple[tuple[str, int], ...] = ()

    @property
    def is_measured(self) -> bool:
        """True if they were measured, not counted from operations."""
        return self.source.startswith(_MEASURED)


def modelled(work: Workload, hardware: Hardware) -> StageTimes:
    """From operations alone."""

    def seconds(one: Workload) -> dict[StageName, float]:
        forward_s, moved_s = one.forward_flops / hardware.flops, _moved_s(one, hardware)
        return {
            name: passes * forward_s + moved_s[name] for name, passes in units_by_stage(one).items()
        }

    return StageTimes(
        mean_over_sizes(work, seconds), f"modelled at {hardware.flops / 1e12:.1f} TFLOP/s a GPU"
    )


def _moved_s(one: Workload, hardware: Hardware) -> dict[StageName, float]:
    """Seconds in which layers' inputs go to main memory and back, by stage."""
    moved_s = {
        role: 2 * stream_bytes(one, role) / hardware.host_bandwidth for role in one.offloading
    }
    return {
        name: backwards_by_stage(one)[name] * moved_s.get(name[0], 0.0)
        for name in units_by_stage(one)
    }


def _flops(one: Workload) -> dict[StageName, float]:
    """Operations of each stage on one sample, of an iteration of one size."""
    return {name: passes * one.forward_flops for name, passes in units_by_stage(one).items()}


def measured(path: Path, work: Workload) -> StageTimes:
    """From a run's folder or a benchmark's JSON.

    Args:
        path: Either, also of what `cluster.stores.store_address` reads.
        work: What the times are for.

    Raises:
        ConfigError: It is neither, or lacks a stage of this workload.
        StorageError: The store of its address fails.
    """
    with run_copy(path, _NOT_NEEDED) as folder:
        is_run = folder.is_dir()
        found, flops, where, together = _from_run(folder) if is_run else _from_benchmark(path)
    place = shared_place(path)
    rollout, sample = (GENERATOR, ROLLOUT.name), (GENERATOR, SAMPLE.name)
    if sample in units_by_stage(work) and sample not in found and rollout in found:
        found[sample], flops[sample] = found[rollout], flops[rollout]
        where += ", generator.sample taken for generator.rollout"
    wanted = mean_over_sizes(work, _flops)
    # A stage may do the work of another one in the run: `fake_score.walk`.
    missing = [
        ".".join(name)
        for name in units_by_stage(work)
        if name not in found or (wanted[name] and not flops[name])
    ]
    if missing:
        raise ConfigError(
            f"taking stage times from {place}",
            f"no time of {', '.join(missing)}",
            "a time of every stage of this recipe",
            "Give the folder of a run with the same fake_score.tracking, fake_score.walk and"
            " objective.method (the benchmark measures SGMD alone), or plan without --measured",
        )
    factors = {
        name: wanted[name] / flops[name] if flops[name] else 1.0 for name in units_by_stage(work)
    }
    scaled = any(abs(factor - 1) > 0.01 for factor in factors.values())
    seconds = {name: found[name] * factors[name] for name in units_by_stage(work)}
    return StageTimes(seconds, where + (", scaled by operations" if scaled else ""), together)


def rescaled(
    times: StageTimes, before: Workload, after: Workload, hardware: Hardware
) -> StageTimes:
    """Measured times for the same run with other settings, by its operations and what it moves.

    Args:
        times: Of an iteration.
        before: That iteration.
        after: The one that times are wanted of, with the same stages.
        hardware: Whose way to main memory layers' inputs take.
    """
    old, new = mean_over_sizes(before, _flops), mean_over_sizes(after, _flops)
    # For a stage whose work another one did: `fake_score.walk`.
    rates = {
        role: sum(times.seconds[name] for name in old if name[0] == role)
        / max(1.0, sum(flops for name, flops in old.items() if name[0] == role))
        for role in {name[0] for name in old}
    }
    old_s, new_s = (
        mean_over_sizes(work, lambda one: _moved_s(one, hardware)) for work in (before, after)
    )
    seconds = {
        name: (own * new[name] / old[name] if old[name] else own + new[name] * rates[name[0]])
        + new_s[name]
        - old_s[name]
        for name, own in times.seconds.items()
    }
    return replace(times, seconds=seconds)


def update_s(work: Workload, hardware: Hardware, role: str, ranks: int) -> float:
    """Seconds of an update: bound by memory, or by the way to main memory, shared by the ranks."""
    entries = _BYTES_OF_AN_UPDATED * work.num_trained(role) / ranks
    kept = kept_copies(work, role)
    on_device = (2 + kept.moments + kept.averages) * entries / hardware.memory_bandwidth
    return on_device + kept.on_host * entries / hardware.host_bandwidth


def _from_run(folder: Path) -> _Found:
    """Seconds and operations of a sample by stage, where they come from, and ranks together."""
    run = RunFolder(folder)
    if not run.metrics.exists() or not run.config.exists():
        raise ConfigError(
            f"taking stage times from {run}",
            "no config.yaml or no metrics.jsonl in it",
            "the folder of a run of `sgmd distill`, or the gpu.json of benchmarks/gpu_check.py",
        )
    config = load_recipe(str(run.config))
    work = Workload.of(config)
    records = read_jsonl(run.metrics)
    if not records:
        raise ConfigError(
            f"taking stage times from {run}",
            f"no whole line in {run.metrics.name}",
            "a run that has made at least one iteration",
            "Give another run, or plan without --measured",
        )
    flops = mean_over_sizes(work, _flops)
    # Iterations of several sizes are brought to their mean by operations.
    labels = [bucket.label for bucket in config.video.buckets]
    at_size = dict(zip(labels, (_flops(one) for _, one in work.sizes), strict=False))
    found: dict[StageName, float] = {}
    for name in units_by_stage(work):
        key, added = ".".join(name), ".".join(_ADDED.get(name, ()))
        times: list[float] = []
        for record in records:
            seconds, own = record["seconds"], at_size.get(record.get("bucket", ""), flops)
            if spent := _seconds(seconds.get(key), 0.0):
                spent += _seconds(seconds.get(added), 0.0)
                times.append(spent * (flops[name] / own[name] if own[name] else 1.0))
        if times:
            samples = config.batch.size * work.updates_with(name)
            found[name] = median(times) / samples
    number = count_in_words(len(records), "iteration")
    return found, flops, f"{_MEASURED} in {number} of {run}", work.ulysses


def _seconds(value: object, default: float) -> float:
    """A measured time; the default where it is not a finite number above 0."""
    if isinstance(value, int | float) and 0 < value < math.inf:
        return float(value)
    return default


def _from_benchmark(path: Path) -> _Found:
    place = shared_place(path)
    try:
        document = json.loads(
            read_text(place) if store_address(path) else path.read_text(encoding="utf-8")
        )
        run = best_run(document)
        family = family_named(run.get("family", _FAMILY_OF_BENCHMARKS))
        shape = family.shape_from_record(run["shape"])
        costs = shape.pass_flops(tuple(run["latent_shape"]), run["text_length"])
        device = document["machine"]["device"]
        found: dict[StageName, float] = {}
        flops: dict[StageName, float] = {}
        for key, stage in run["stages"].items():
            role, _, name = key.partition(".")
            if role in ROLES and "passes" in stage:
                found[role, name] = _measured_s(key, stage["seconds_per_sample"])
                flops[role, name] = _passes(key, stage["passes"], costs) * costs.forward
    except _NOT_A_BENCHMARK as error:
        raise ConfigError(
            f"taking stage times from {place}",
            _in_words(error),
            "a run's folder, or a gpu.json that benchmarks/gpu_check.py wrote",
        ) from error
    return found, flops, f"{_MEASURED} by {place} on {device}", ()


def _passes(key: str, counted: float, costs: PassFlops) -> float:
    """Passes of a stage; files of before 2026-11-28 count one to the input as a forward pass."""
    if key == _TO_INPUT and counted in _COUNTED_AS_FORWARD:
        return counted - 1 + costs.to_input / costs.forward
    return counted


def _measured_s(key: str, value: object) -> float:
    seconds = _seconds(value, 0.0)
    if not seconds:
        raise ValueError(f"seconds_per_sample of {key} is {value!r}, no time above 0")
    return seconds


def _in_words(error: Exception) -> str:
    """Says why a file is not a benchmark's, without Python's own names for it."""
    match error:
        case FileNotFoundError():
            return "no such file"
        case OSError():
            return f"a file that cannot be read ({error.strerror})"
        case json.JSONDecodeError():
            return f"a file that is not JSON (line {error.lineno}, column {error.colno})"
        case UnicodeDecodeError():
            return f"bytes that are not UTF-8 text, at {error.start}"
        case KeyError():
            return f"JSON without {error.args[0]!r}"
        case ValueError():
            return str(error)
        case _:
            return "JSON of another shape"


def best_run(document: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fastest of a benchmark's runs: they differ in how the networks are computed."""
    if not document["runs"]:
        raise ValueError("JSON whose 'runs' are empty")
    return min(
        document["runs"],
        key=lambda run: sum(stage["seconds_per_sample"] for stage in run["stages"].values()),
    )
