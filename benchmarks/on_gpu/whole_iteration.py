"""One iteration with all three roles on one card, against what `sgmd plan` says of it.

The roles are groups of this process, called in the order of the schedule of a run, one sample at a
time. Two samples leave their rollouts at steps whose mean is the mean over all steps.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cluster.local import LocalWorkerGroup
from on_gpu.cases import Case, peak_bytes, reset_peak, synchronize
from on_gpu.step import Context
from pipelines.config.recipe import DistillConfig, load_recipe
from pipelines.distillation.iteration import PromptBatch, Roles, iterate
from pipelines.distillation.iteration_plan import plan_iteration
from pipelines.planning.hardware import Hardware
from pipelines.planning.layouts import fused_layout
from pipelines.planning.stage_times import measured, modelled
from pipelines.planning.workload import Workload
from sgmd_core.types import MicroBatchKey
from workers.text_encoder import TextEncoder

EXITS = (1, 2)


class MadeUpCaptions:
    """Embeds captions as random numbers, in place of the text encoder."""

    def __init__(self, case: Case) -> None:
        self._case = case

    def encode(self, captions: Sequence[str], max_length: int) -> Tensor:
        """Random embeddings."""
        return self._case.text(len(captions))


def measure(context: Context, case: Case) -> dict[str, Any]:
    """Seconds and peak memory of two iterations, the first of which warms up."""
    config = recipe_of(case, EXITS)
    groups = {
        "generator": case.generator(),
        "fake_score": case.fake_score(),
        "teacher": case.teacher(),
    }
    context.record(num_frames=case.num_frames, samples=len(EXITS), iterations=[])
    for row in iterations(case, config, groups, EXITS):
        context.record(iterations=[*context.results["iterations"], row])
    work = workload_of(case, config)
    planned = _planned(context, work)
    context.record(planned=planned, against_plan=_compared(context.results, planned))
    return context.results


def recipe_of(case: Case, exits: Sequence[int], settings: Sequence[str] = ()) -> DistillConfig:
    """The recipe `wan21-1.3b` for some samples, each a micro-batch of its own."""
    counts = [f"batch.size={len(exits)}", f"batch.micro_batches={len(exits)}"]
    local = ["topology.mode=local", "topology.address=null"]
    return load_recipe("wan21-1.3b", [*counts, *local, *settings])


def workload_of(case: Case, config: DistillConfig) -> Workload:
    """The iteration as `sgmd plan` sees it, for the networks and the clip of a case."""
    work = Workload.of(config, "1.3b" if case.model == "tiny" else case.model)
    return replace(
        work, shape=case.shape, latent_shape=case.latent_shape, text_length=case.text_length
    )


def iterations(
    case: Case, config: DistillConfig, groups: Mapping[str, Any], exits: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """Makes two iterations, the first of which warms up; seconds and peak memory of each.

    Args:
        case: Sizes and device.
        config: See `recipe_of`.
        groups: The three roles by name.
        exits: Exit step of each sample.
    """
    text = TextEncoder(MadeUpCaptions(case), case.text_length)
    members = {name: LocalWorkerGroup(name, [role]) for name, role in groups.items()}
    roles = Roles(**members, text=LocalWorkerGroup("text", [text]))
    plan = plan_iteration(config, roles.text.call_rank(0, TextEncoder.encode_negative, ""))
    for iteration in range(2):
        draws = {}
        for index, exit_step in enumerate(exits):
            key = MicroBatchKey(iteration, index)
            draws[key] = case.draws(key, exit_step)
        reset_peak(case.device)
        synchronize(case.device)
        started = time.perf_counter()
        batch = PromptBatch(tuple(f"caption {index}" for index in range(len(exits))))
        report = iterate(roles, plan, iteration, [batch], draws)
        synchronize(case.device)
        yield {
            "seconds": time.perf_counter() - started,
            "peak_gb": peak_bytes(case.device) / 1e9,
            "reserved_gb": _reserved_gb(case.device),
            "losses": dict(report.losses),
            "grad_norms": dict(report.grad_norms),
        }


def _planned(context: Context, work: Workload) -> dict[str, Any]:
    """Seconds and memory by the planner, from the stages that were measured here if they were."""
    stages = context.folder / "stages.json"
    hardware = Hardware()
    document = context.of("stages")
    if document.get("runs"):
        scratch = context.folder / ".stages-measured.json"
        scratch.write_text(json.dumps(document), encoding="utf-8")
        times = measured(scratch, work)
        source = f"stages measured in {stages.name}"
    else:
        times, source = modelled(work, hardware), "modelled: no stages were measured"
    planned = fused_layout(work, times, hardware, 1)
    (pool,) = planned.pools.values()
    return {
        "seconds": planned.iteration_s,
        "memory_gb": pool.memory.to_json(),
        "stage_times": source,
    }


def _compared(results: dict[str, Any], planned: dict[str, Any]) -> dict[str, float | None]:
    """Measured over planned."""
    last = results["iterations"][-1]
    total = planned["memory_gb"]["total"]
    return {
        "seconds": last["seconds"] / planned["seconds"],
        "memory": last["peak_gb"] / total if last["peak_gb"] and total else None,
    }


def _reserved_gb(device: str) -> float:
    return torch.cuda.max_memory_reserved() / 1e9 if device.startswith("cuda") else 0.0
