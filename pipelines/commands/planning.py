"""`sgmd plan`: pool sizes, memory and time before a GPU is taken."""

import math
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from pipelines.commands.options import Json, Overrides, RecipeName
from pipelines.commands.output import show, working
from sgmd_core.errors import ConfigError

if TYPE_CHECKING:
    from pipelines.planning.hardware import Hardware
    from pipelines.planning.plan import Plan
    from pipelines.planning.stage_times import StageTimes
    from pipelines.planning.workload import Workload

_TO_GAIN = 1.05
_MOST_GPUS = 4096  # the search over layouts grows with them


def plan(
    recipe: RecipeName,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(help="GPUs of the whole run, the validator included")] = 8,
    gpu_memory: Annotated[float, typer.Option(help="GB of memory of one")] = 80.0,
    model: Annotated[
        str | None,
        typer.Option(help="1.3b or 14b: Wan's sizes, where model.folder is not here yet"),
    ] = None,
    measured: Annotated[
        Path | None,
        typer.Option(help="A run's folder, or gpu.json of `make gpu-check`, to take times from"),
    ] = None,
    tflops: Annotated[
        float | None, typer.Option(help="TFLOP/s that a GPU reaches, where nothing is measured")
    ] = None,
    any_batch: Annotated[
        bool, typer.Option("--any-batch", help="Take the batch size nearby that suits best")
    ] = False,
    as_json: Json = False,
) -> None:
    """Size the pools for some GPUs: layout, time, use and memory, before any is taken."""
    results = sys.stdout
    with working():
        from dataclasses import replace

        from pipelines.config.recipe import load_recipe
        from pipelines.config.roles import ROLES
        from pipelines.planning import stage_times
        from pipelines.planning.hardware import Hardware
        from pipelines.planning.plan import make_plan
        from pipelines.planning.search import find_batch
        from pipelines.planning.workload import Workload

        for option, value in (("--gpu-memory", gpu_memory), ("--tflops", tflops)):
            if value is not None and not 0 < value < math.inf:
                raise ConfigError("planning a run", f"{option} {value:g}", "a number above 0")
        if gpus > _MOST_GPUS:
            raise ConfigError("planning a run", f"--gpus {gpus}", f"at most {_MOST_GPUS}")
        if measured is not None and tflops is not None:
            raise ConfigError(
                "planning a run", "both --measured and --tflops", "times from one of them"
            )
        config = load_recipe(recipe, overrides or [])
        hardware = Hardware(memory_gb=gpu_memory)
        if tflops is not None:
            hardware = replace(hardware, flops=1e12 * tflops)
        work = Workload.of(config, model)
        times = (
            stage_times.modelled(work, hardware)
            if measured is None
            else stage_times.measured(measured, work)
        )
        beside = config.gpus_beside
        for_roles = gpus - math.ceil(sum(beside.values()))
        if for_roles < len(ROLES):
            told = _plan_of_few(work, times, hardware, for_roles, beside)
            with redirect_stdout(results):
                show(told | {"recipe": recipe}, as_json, *_words_of_few(told))
            return
        suited = replace(work, batch_size=find_batch(work, times, hardware, for_roles))
        result = make_plan(suited if any_batch else work, times, hardware, for_roles, beside)
        advice = (
            []
            if any_batch
            else _advice(result, make_plan(suited, times, hardware, for_roles, beside))
        )
    data = result.to_json() | {"recipe": recipe, "advice": advice}
    show(data, as_json, _table(result), *_words(result), *advice)


def _table(result: "Plan") -> Table:
    told = result.to_json()
    shape = told["workload"]
    table = Table(
        title=f"{told['gpus_used']} of {told['gpus']} GPUs, "
        f"{_count(shape['parameters'])} parameters, {shape['tokens']} tokens a sample, "
        f"{shape['batch_size']} samples an iteration",
        title_justify="left",
    )
    headings = ("role", "GPUs", "samples a call", "busy", "GB a GPU", "state", "graphs", "working")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "role" else "right")
    for role, facts in told["roles"].items():
        memory = facts["memory_gb"]
        table.add_row(
            role.replace("_", " "),
            str(facts["gpus"]),
            f"{facts['samples_per_call']:.3g}",
            f"{100 * facts['busy']:.0f} %",
            f"{memory['total']:.1f}",
            f"{memory['state']:.1f}",
            f"{memory['graphs']:.1f}",
            f"{memory['gathered'] + memory['working']:.1f}",
        )
    for section, share in result.beside.items():
        table.add_row(section, f"{share:g}")
    return table


def _count(number: int) -> str:
    """A number of parameters in billions, or millions where it is less than 0.1 billion."""
    return f"{number / 1e9:.1f}B" if number >= 1e8 else f"{number / 1e6:.2g}M"


def _words(result: "Plan") -> list[str]:
    told, fused = result.to_json(), result.fused
    fits = "fits" if fused.fits else "does not fit"
    return [
        f"{told['iteration_s']:.4g} s an iteration, "
        f"{told['gpu_hours_per_1000_iterations']:.4g} GPU-hours for 1000; "
        f"stage times {told['stage_times']}",
        f"all roles on {fused.ranks} GPUs (fused): {fused.iteration_s:.4g} s, "
        f"{fused.memory.total / 1e9:.0f} GB a GPU, which {fits}",
        *(
            [f"fused is faster; its settings: {_set(fused.settings(result.work))}"]
            if result.fused_is_faster
            else []
        ),
        f"{'settings of separate pools' if result.fused_is_faster else 'settings'}: "
        f"{_set(result.settings())}",
    ]


def _plan_of_few(
    work: "Workload",
    times: "StageTimes",
    hardware: "Hardware",
    num_gpus: int,
    beside: Mapping[str, float],
) -> dict[str, Any]:
    """The fused layout, where there are fewer GPUs than roles.

    Raises:
        ConfigError: No GPU is left for the roles, or one does not hold them.
    """
    from pipelines.planning.plan import plan_fused

    taken = ", ".join(f"{section} {share:g}" for section, share in beside.items())
    attempted = f"planning for {num_gpus + math.ceil(sum(beside.values()))} GPUs"
    if num_gpus < 1:
        raise ConfigError(
            attempted,
            f"no GPU left for the roles beside {taken or 'nothing'}",
            "at least one",
            "Set "
            + (" ".join(f"topology.{section}.gpus=0" for section in beside) or "--gpus 1 or more"),
        )
    fused = plan_fused(work, times, hardware, num_gpus)
    needed = f"{fused.memory.total / 1e9:.1f} GB"
    if not fused.fits:
        raise ConfigError(
            attempted,
            f"with all roles on every GPU (fused) one needs {needed}",
            f"at most {hardware.usable_bytes / 1e9:.1f} GB of its {hardware.memory_gb:g} GB",
            "Take 3 GPUs or more for separate pools, larger ones (--gpu-memory), "
            "checkpointing=true, a smaller clip or a smaller model",
        )
    return {
        "gpus": num_gpus + math.ceil(sum(beside.values())),
        "gpus_used": fused.ranks + math.ceil(sum(beside.values())),
        "gpus_beside": dict(beside),
        "faster": "fused",
        "settings": fused.settings(work),
        "iteration_s": fused.iteration_s,
        "memory_gb": fused.memory.to_json(),
        "stage_times": times.source,
    }


def _words_of_few(told: Mapping[str, Any]) -> list[str]:
    beside = "".join(f", {section} on {share:g}" for section, share in told["gpus_beside"].items())
    return [
        f"{told['gpus_used']} of {told['gpus']} GPUs, all roles together (fused){beside}",
        f"{told['iteration_s']:.4g} s an iteration, {told['memory_gb']['total']:.1f} GB a GPU, "
        f"which fits; stage times {told['stage_times']}",
        f"settings: {_set(told['settings'])}",
    ]


def _set(settings: Mapping[str, int | str]) -> str:
    return " ".join(f"{key}={value}" for key, value in settings.items())


def _advice(result: "Plan", suited: "Plan") -> list[str]:
    """Returns what another batch size would gain, if it is worth a line."""
    gain = (suited.work.batch_size / suited.best.iteration_s) / (
        result.work.batch_size / result.best.iteration_s
    )
    if gain < _TO_GAIN:
        return []
    return [
        f"with batch.size={suited.work.batch_size} the same GPUs would make "
        f"{100 * (gain - 1):.0f} % more samples a second: ranks share a micro-batch evenly, and "
        f"more layouts fit that size (--any-batch)"
    ]
