"""`sgmd plan`: pool sizes, memory and time before a GPU is taken."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from cluster.redaction import without_secrets
from cluster.storage import write_text
from pipelines.commands.options import Json, OptionGroup, Overrides, RecipeName, expand_groups
from pipelines.commands.output import show, working
from sgmd_core.errors import ConfigError
from sgmd_core.words import count_in_words

if TYPE_CHECKING:
    from pipelines.config.recipe import DistillConfig
    from pipelines.planning.plan import Plan
    from pipelines.planning.planned_layout import Layout
    from pipelines.planning.request import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanArguments(OptionGroup):
    """Options of the question: the GPUs, what is known of them, and what may be changed."""

    gpus: Annotated[
        int | None, typer.Option(help="GPUs of the whole run, validator included [default: 8]")
    ] = None
    gpu_memory: Annotated[
        float | None,
        typer.Option(help="Memory of one GPU, in GB [default: 80]"),
    ] = None
    kinds: Annotated[
        list[str] | None,
        typer.Option(
            "--kind",
            metavar="NAME=GPUSxGB@TFLOPS",
            help="Instead of --gpus: one of several kinds of GPU, such as H100=8x80@229, where "
            "NAME is the label that Ray gives its machines; repeat it for each kind, fastest first",
        ),
    ] = None
    gpus_per_node: Annotated[
        int,
        typer.Option(help="GPUs of one machine, whose ranks gather weights at --node-bandwidth"),
    ] = 8
    node_bandwidth: Annotated[
        float, typer.Option(help="GB/s per GPU for weights within a machine")
    ] = 200.0
    network_bandwidth: Annotated[
        float, typer.Option(help="GB/s per GPU for weights between machines")
    ] = 40.0
    model: Annotated[
        str | None,
        typer.Option(
            help="1.3b, 5b, 14b, a14b (Wan) or ltx-2b, if model.folder is not on this machine"
        ),
    ] = None
    measured: Annotated[
        Path | None,
        typer.Option(help="Source of stage times: a run, or gpu.json of `make gpu-check`"),
    ] = None
    tflops: Annotated[
        float | None, typer.Option(help="TFLOP/s that a GPU reaches, without --measured")
    ] = None
    host_memory: Annotated[
        float, typer.Option(help="Main memory for each GPU, in GB, for offloaded tensors")
    ] = 200.0
    fit: Annotated[
        bool,
        typer.Option(
            "--fit",
            help="Choose the memory settings with which the run fits and is fastest",
        ),
    ] = False
    any_batch: Annotated[
        bool, typer.Option("--any-batch", help="Choose a nearby batch size that uses the GPUs best")
    ] = False

    def request(self, recipe: str, overrides: list[str]) -> "Request":
        """Returns the question that is asked about a recipe."""
        from pipelines.planning.request import Request

        given: dict[str, Any] = self.given() | {"kinds": self.kinds or []}
        return Request(recipe, overrides, **given)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOutputOptions(OptionGroup):
    """Options of what is written or printed of the plan."""

    write: Annotated[
        Path | None, typer.Option(help="New file for the recipe with the best layout")
    ] = None
    emit: Annotated[
        str | None,
        typer.Option(help="Print a manifest: kuberay, raycluster, slurm, launcher, dockerfile"),
    ] = None
    details: Annotated[
        list[str] | None,
        typer.Option(
            "--with", metavar="KEY=VALUE", help="Detail of the manifest, such as image=IMAGE"
        ),
    ] = None


@expand_groups
def plan_command(
    recipe: RecipeName,
    overrides: Overrides = None,
    *,
    arguments: PlanArguments,
    output: PlanOutputOptions,
    as_json: Json = False,
) -> None:
    """Size the pools for a number of GPUs: layout, time, use and memory; needs no GPU."""
    with working():
        from pipelines.planning.request import answer

        if output.write is not None:
            _require_new(output.write)
        request = arguments.request(recipe, overrides or [])
        found = answer(request)
        written = [] if output.write is None else [_write(found.config, found.plan, output.write)]
        manifest = None
        if output.emit is not None:
            details = output.details or []
            manifest = _manifest(output.emit, found.config, found.plan, details)
    data = found.plan.to_json() | {"recipe": recipe, "advice": found.advice}
    if manifest is not None:
        show(data | {"manifest": manifest}, as_json, manifest.rstrip("\n"))
        return
    show(data, as_json, _table(found.plan), *_words(found.plan), *found.advice, *written)


def _manifest(kind: str, config: "DistillConfig", plan: "Plan", details: Sequence[str]) -> str:
    """The manifest of a planned run, headed by the command that made it."""
    from pipelines.planning.emitting import emit_manifest
    from pipelines.planning.planned_recipe import planned_recipe

    command = without_secrets(shlex.join(["sgmd", *sys.argv[1:]]))
    return emit_manifest(kind, planned_recipe(config, plan), plan, details, command)


def _table(result: "Plan") -> Table:
    document = result.to_json()
    shape = document["workload"]
    table = Table(
        title=f"{document['gpus_used']} of {count_in_words(document['gpus'], 'GPU')}, "
        f"{_count(shape['parameters'])} parameters, "
        f"{count_in_words(shape['tokens'], 'token')} a sample, "
        f"{count_in_words(shape['batch_size'], 'sample')} an iteration",
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
            f"{pool.gpus} {pool.kind}".rstrip(),
            f"{pool.samples_per_call:.3g}",
            f"{100 * pool.busy:.0f} %",
            f"{pool.memory.total / 1e9:.1f}",
            f"{pool.memory.graphs / 1e9:.1f}",
        )
    kind = result.kind_beside.name if result.kinds and result.kind_beside else ""
    for section, share in result.beside.items():
        needed = result.memory_beside.get(section)
        memory = "" if needed is None else f"{needed / 1e9:.1f}"
        table.add_row(section, "", f"{share:g} {kind}".rstrip(), "", "", memory)
    return table


def _count(number: int) -> str:
    """A number of parameters in billions, or millions where it is less than 0.1 billion."""
    return f"{number / 1e9:.1f}B" if number >= 1e8 else f"{number / 1e6:.2g}M"


def _words(result: "Plan") -> list[str]:
    document = result.to_json()
    return [
        f"{document['layout']}: {document['iteration_s']:.4g} s an iteration, "
        f"{document['gpu_hours_per_1000_iterations']:.4g} GPU-hours for 1000; "
        f"{_gathered(result.best)}; stage times {document['stage_times']}",
        *(_beside(layout) for layout in result.layouts[1:]),
        *(f"{name}: {reason}" for name, reason in result.left_out.items()),
        f"settings: {' '.join([_set(document['settings']), *result.memory_settings])}",
    ]


def _require_new(path: Path) -> None:
    """Checks before a plan is made that its recipe can be written to a new file."""
    from pipelines.run.outputs import require_on_disk, require_output_folder

    require_on_disk(path, "--write")
    require_output_folder(path, "--write", is_file=True)
    if path.exists():
        raise ConfigError("writing the planned recipe", f"{path} is there already", "a new file")


def _write(config: "DistillConfig", result: "Plan", path: Path) -> str:
    """Writes the recipe with the best layout; returns what to do with it."""
    from pipelines.planning.planned_recipe import planned_recipe

    write_text(str(path), planned_recipe(config, result).to_yaml())
    return f"{path} has these settings: sgmd distill {path}"


def _beside(layout: "Layout") -> str:
    """One line about a layout that is not the best."""
    fullest = max(pool.memory.total for pool in layout.pools.values()) / 1e9
    fits = "fits" if layout.fits else "does not fit"
    busy = ", ".join(f"{name} {100 * pool.busy:.0f} %" for name, pool in layout.pools.items())
    return (
        f"{layout.title}: {layout.iteration_s:.4g} s on "
        f"{count_in_words(layout.num_gpus, 'GPU')}, busy {busy}; "
        f"{fullest:.0f} GB a GPU, which {fits}; {_gathered(layout)}"
    )


def _gathered(layout: "Layout") -> str:
    return f"{layout.gathered_bytes / 1e9:.3g} GB of weights gathered"


def _set(settings: Mapping[str, Any]) -> str:
    return " ".join(
        shlex.quote(f"{key}={_flow(value)}") if isinstance(value, dict) else f"{key}={_flow(value)}"
        for key, value in settings.items()
    )


def _flow(value: object) -> str:
    """A value as YAML on one line."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_flow(one)}' for key, one in value.items())}}}"
    return f"[{','.join(map(str, value))}]" if isinstance(value, list) else str(value)
