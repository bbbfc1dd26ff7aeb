"""Seconds of one forward pass over a batch: known from runs that were made, or tried out.

Trying out is for the local topology alone, where this machine is the one that will compute.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from statistics import median

import torch

from pipelines.config.recipe import DistillConfig
from pipelines.config.roles import GENERATOR
from pipelines.distillation.preflight import run_preflight
from pipelines.planning.passes import iteration_passes, pass_costs, total_units
from pipelines.run.folder import RunFolder, read_jsonl
from pipelines.study.plan import StudyPlan
from workers.build import build_denoiser
from workers.placement import device_of

_TRIES = 5


def seconds_per_unit(plan: StudyPlan) -> tuple[float | None, str]:
    """Seconds of a forward pass over one batch, and where the figure is from.

    Returns:
        None where no run has been made and none would compute on this machine.
    """
    found = _recorded(plan)
    if found:
        return median(found), f"{len(found)} iterations of this study"
    first = plan.runs[0].config
    if first.topology.mode != "local":
        return None, "no run has been made, and the passes are not made in this process"
    # What is timed is the generator's network; a unit is a pass of the teacher.
    timed = time_forward(first) / pass_costs(first)[GENERATOR].forward
    return timed, "passes timed just now"


def time_forward(config: DistillConfig) -> float:
    """Median seconds of a forward pass over one batch, in micro-batches, on this machine.

    The network is built as the generator's is: on the GPU if there is one, and with its `compute`.
    """
    checked = run_preflight(config)
    model = replace(config.model, folder=str(checked.model.path))
    network = build_denoiser(model, config.generator.compute, config.topology.threads_per_rank)
    device = device_of(network.eval())
    num_samples = config.batch.size // config.batch.micro_batches
    x_t = torch.zeros(num_samples, *checked.latent_shape, device=device)
    sigma = torch.full((num_samples,), 0.5, device=device)
    text_shape = (num_samples, config.model.text_length, checked.model.text_width)
    text = torch.zeros(text_shape, device=device)
    seconds: list[float] = []
    with torch.no_grad():
        for _ in range(_TRIES):
            began = time.perf_counter()
            network(x_t, sigma, text)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - began)
    # The first pass pays for what is set up once.
    return config.batch.micro_batches * median(seconds[1:])


def _recorded(plan: StudyPlan) -> Sequence[float]:
    """Seconds a unit of every iteration that was made, by the units of that very iteration."""
    found: list[float] = []
    for run in plan.runs:
        costs = pass_costs(run.config)
        for line in read_jsonl(RunFolder(run.folder).metrics):
            units = total_units(iteration_passes(run.config, line["iteration"]), costs)
            found.append(line["seconds"]["total"] / units)
    return found
