"""`sgmd plan`: pool sizes, memory and time before a GPU is taken."""

import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from cluster.redaction import without_secrets
from cluster.storage import write_text
from pipelines.commands.options import Json, Overrides, RecipeName
from pipelines.commands.output import show, working
from sgmd_core.errors import ConfigError

if TYPE_CHECKING:
    from pipelines.config.recipe import DistillConfig
    from pipelines.planning.layouts import Layout
    from pipelines.planning.plan import Plan
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
        typer.Option(
            help="1.3b, 5b, 14b, a14b (Wan) or ltx-2b, where model.folder is not here yet"
        ),
    ] = None,
    measured: Annotated[
        Path | None,
        typer.Option(help="A run, or gpu.json of `make gpu-check`, to take times from"),
    ] = None,
    tflops: Annotated[
        float | None, typer.Option(help="TFLOP/s that a GPU reaches, where nothing is measured")
    ] = None,
    host_memory: Annotated[
        float, typer.Option(help="GB of main memory beside each GPU, for what is offloaded")
    ] = 200.0,
    fit: Annotated[
        bool, typer.Option("--fit", help="Change the recipe's memory settings until it fits")
    ] = False,
    any_batch: Annotated[
        bool, typer.Option("--any-batch", help="Take the batch size nearby that suits best")
    ] = False,
    write: Annotated[
        Path | None, typer.Option(help="New file for the recipe with the best layout")
    ] = None,
    emit: Annotated[
        str | None,
        typer.Option(help="Print a manifest: kuberay, raycluster, slurm, launcher, dockerfile"),
    ] = None,
    details: Annotated[
        list[str] | None,
        typer.Option(
            "--with", metavar="KEY=VALUE", help="Detail of the manifest, such as image=IMAGE"
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Size the pools for some GPUs: layout, time, use and memory, before any is taken."""
    with working():
        from dataclasses import replace

        from pipelines.config.recipe import load_recipe
        from pipelines.planning import stage_times
        from pipelines.planning.hardware import Hardware
        from pipelines.planning.plan import make_plan
        from pipelines.planning.savings import fitting_savings
        from pipelines.planning.search import find_batch
        from pipelines.planning.workload import Workload

        _require_amounts(gpus, {"--gpu-memory": gpu_memory, "--host-memory": host_memory}, tflops)
        if measured is not None and tflops is not None:
            raise ConfigError(
                "planning a run", "both --measured and --tflops", "times from one of them"
            )
        config = load_recipe(recipe, overrides or [])
        hardware = Hardware(memory_gb=gpu_memory, host_memory_gb=host_memory)
        if tflops is not None:
            hardware = replace(hardware, flops=1e12 * tflops)
        work = Workload.of(config, model)
        beside = config.gpus_beside
        for_roles = gpus - math.ceil(sum(beside.values()))
        if for_roles < 1:
            raise _nothing_left(gpus, beside)
        saved: tuple[str, ...] = ()
        if fit and (found := fitting_savings(work, hardware, for_roles)):
            work, saved = found
            config = load_recipe(recipe, [*(overrides or []), *saved])
        times = (
            stage_times.modelled(work, hardware)
            if measured is None
            else stage_times.measured(measured, work)
        )
        suited = replace(work, batch_size=find_batch(work, times, hardware, for_roles))
        result, other = (
            replace(make_plan(one, times, hardware, for_roles, beside), memory_settings=saved)
            for one in (work, suited)
        )
        if any_batch and _samples_per_s(other) > _samples_per_s(result):
            result, other = other, result
        advice = [*_advice(result, other), *_lag(config, work), *_attention(config)]
        written = [] if write is None else [_write(config, result, write)]
        manifest = None if emit is None else _manifest(emit, config, result, details or [])
    data = result.to_json() | {"recipe": recipe, "advice": advice}
    if manifest is not None:
        show(data | {"manifest": manifest}, as_json, manifest.rstrip("\n"))
        return
    show(data, as_json, _table(result), *_words(result), *advice, *written)


def _manifest(kind: str, config: "DistillConfig", plan: "Plan", details: Sequence[str]) -> str:
    """The manifest of a planned run, headed by the command that made it."""
    from pipelines.planning.emitting import emit_manifest
    from pipelines.planning.planned_recipe import planned_recipe

    command = without_secrets(shlex.join(["sgmd", *sys.argv[1:]]))
    return emit_manifest(kind, planned_recipe(config, plan), plan, details, command)


def _require_amounts(gpus: int, memory: Mapping[str, float], tflops: float | None) -> None:
    for option, value in {**memory, "--tflops": tflops}.items():
        if value is not None and not 0 < value < math.inf:
            raise ConfigError("planning a run", f"{option} {value:g}", "a number above 0")
    if gpus > _MOST_GPUS:
        raise ConfigError("planning a run", f"--gpus {gpus}", f"at most {_MOST_GPUS}")


def _table(result: "Plan") -> Table:
    told = result.to_json()
    shape = told["workload"]
    table = Table(
        title=f"{told['gpus_used']} of {told['gpus']} GPUs, "
        f"{_count(shape['parameters'])} parameters, {shape['tokens']} tokens a sample, "
        f"{shape['batch_size']} samples an iteration",
        title_justify="left",
    )
    headings = ("pool", "roles", "GPUs", "samples", "busy", "GB a GPU", "graphs")
    for heading in headings:
        is_text = heading in ("pool", "roles")
        table.add_column(heading, justify="left" if is_text else "right", no_wrap=is_text)
    for name, pool in result.best.pools.items():
        table.add_row(
            name.replace("_", " "),
            ", ".join(role.replace("_", " ") for role in pool.roles),
            str(pool.gpus),
            f"{pool.samples_per_call:.3g}",
            f"{100 * pool.busy:.0f} %",
            f"{pool.memory.total / 1e9:.1f}",
            f"{pool.memory.graphs / 1e9:.1f}",
        )
    for section, share in result.beside.items():
        table.add_row(section, "", f"{share:g}")
    return table


def _count(number: int) -> str:
    """A number of parameters in billions, or millions where it is less than 0.1 billion."""
    return f"{number / 1e9:.1f}B" if number >= 1e8 else f"{number / 1e6:.2g}M"


def _words(result: "Plan") -> list[str]:
    told = result.to_json()
    return [
        f"{told['layout']}: {told['iteration_s']:.4g} s an iteration, "
        f"{told['gpu_hours_per_1000_iterations']:.4g} GPU-hours for 1000; "
        f"stage times {told['stage_times']}",
        *(_beside(layout) for layout in result.layouts[1:]),
        f"settings: {' '.join([_set(told['settings']), *result.memory_settings])}",
    ]


def _write(config: "DistillConfig", result: "Plan", path: Path) -> str:
    """Writes the recipe with the best layout; returns what to do with it."""
    from pipelines.run.folder import require_on_disk

    require_on_disk(path, "--write")
    if path.exists():
        raise ConfigError("writing the planned recipe", f"{path} is there already", "a new file")
    from pipelines.planning.planned_recipe import planned_recipe

    write_text(str(path), planned_recipe(config, result).to_yaml())
    return f"{path} has these settings: sgmd distill {path}"


def _beside(layout: "Layout") -> str:
    """One line about a layout that is not the best."""
    fullest = max(pool.memory.total for pool in layout.pools.values()) / 1e9
    fits = "fits" if layout.fits else "does not fit"
    busy = ", ".join(f"{name} {100 * pool.busy:.0f} %" for name, pool in layout.pools.items())
    return (
        f"{layout.name}: {layout.iteration_s:.4g} s on {layout.num_gpus} GPUs, busy {busy}; "
        f"{fullest:.0f} GB a GPU, which {fits}; {layout.gathered_bytes / 1e9:.3g} GB of weights "
        "gathered"
    )


def _nothing_left(num_gpus: int, beside: Mapping[str, float]) -> ConfigError:
    taken = ", ".join(f"{section} {share:g}" for section, share in beside.items())
    return ConfigError(
        f"planning for {num_gpus} GPUs",
        f"no GPU left for the roles beside {taken or 'nothing'}",
        "at least one",
        "Set "
        + (" ".join(f"topology.{section}.gpus=0" for section in beside) or "--gpus 1 or more"),
    )


def _set(settings: Mapping[str, Any]) -> str:
    def in_words(value: object) -> str:
        return f"[{','.join(value)}]" if isinstance(value, list) else str(value)

    return " ".join(f"{key}={in_words(value)}" for key, value in settings.items())


def _lag(config: "DistillConfig", work: "Workload") -> list[str]:
    """Returns what a measured lag costs."""
    from pipelines.study.passes import expected_lag, lag_share, total_units

    if not config.lag.every:
        return []
    costs = work.costs
    return [
        f"measuring the lag every {config.lag.every} iterations (lag.every) takes "
        f"{total_units(expected_lag(config), costs):.3g} passes over a batch each time, "
        f"{100 * lag_share(config, costs):.2g} % beside the iterations; it is not in their seconds"
    ]


def _attention(config: "DistillConfig") -> list[str]:
    """Returns what the plan does not know of chosen kernels of attention."""
    from workers.attention import KERNELS, NATIVE

    lines: list[str] = []
    for role, compute in config.computes.items():
        if compute.attention != NATIVE:
            line = f"{role}.compute.attention {compute.attention}: times are those of native"
            if KERNELS[compute.attention].all_pairs:
                line += ", and memory, too: a matrix of all pairs of tokens comes on top"
            lines.append(line)
    return lines


def _samples_per_s(plan: "Plan") -> float:
    return plan.work.batch_size / plan.best.iteration_s


def _advice(result: "Plan", suited: "Plan") -> list[str]:
    """Returns what another batch size would gain, if it is worth a line."""
    gain = _samples_per_s(suited) / _samples_per_s(result)
    if gain < _TO_GAIN:
        return []
    return [
        f"with batch.size={suited.work.batch_size} the same GPUs would make "
        f"{100 * (gain - 1):.0f} % more samples a second (--any-batch)"
    ]
