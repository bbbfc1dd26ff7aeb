"""Commands that make models of models: `sgmd export`, `import`, `experts`, `transition`."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from pipelines.commands.options import Json, OptionGroup, expand_groups
from pipelines.commands.output import progress_bar, show

if TYPE_CHECKING:
    from pipelines.exporting.export import ExportResult


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportArguments(OptionGroup):
    """Options of `sgmd export` by their names in `ExportOptions`."""

    form: Annotated[
        str,
        typer.Option("--format", help="diffusers, single-file, comfyui, lora or lora-comfyui"),
    ] = "diffusers"
    dtype: Annotated[str, typer.Option(help="Type of the weights: bf16, fp16 or fp32")] = "bf16"
    components: Annotated[
        str,
        typer.Option(help="Text encoder and autoencoder: link, copy or none (diffusers only)"),
    ] = "link"
    rank: Annotated[int | None, typer.Option(help="Rank of a LoRA of all weights; default 64")] = (
        None
    )


_MUCH = 0.05
"""Share of the change that rounding may lose without a word."""


@expand_groups
def export_command(
    model: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run, finished or not, or a model folder.")
    ],
    *,
    checkpoint: Annotated[
        str | None, typer.Option(help="last, best or an iteration; default: the newest")
    ] = None,
    form: ExportArguments,
    output: Annotated[
        Path | None, typer.Option(help="Folder, replaced whole; default RUN/exports/FORMAT")
    ] = None,
    base: Annotated[
        Path | None, typer.Option(help="Model that it was trained from; default: the run's")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a generator for diffusers, ComfyUI or the original code, and compare it.

    The folder has a model card, README.md, with the code that samples it.
    """
    with progress_bar() as on_progress:
        from pipelines.exporting.export import ExportOptions, export
        from pipelines.run.places import shared_place

        result = export(
            model,
            checkpoint=checkpoint,
            base=base,
            output=output,
            options=ExportOptions(**form.given()),
            on_progress=on_progress,
        )
    data = {
        "folder": shared_place(result.folder),
        "iteration": result.iteration,
        "bytes": result.bytes,
        **asdict(result.figures),
    }
    show(data, as_json, "\n".join(_export_words(data["folder"], result)))


def _export_words(place: str, result: "ExportResult") -> list[str]:
    """Returns what was written, and what it keeps of the training."""
    found = result.figures
    words = [f"{place}: {found.form}, {result.bytes / 1e9:.3g} GB of weights written"]
    if found.share_kept is not None:
        words.append(f"rank {found.rank} keeps {found.share_kept:.1%} of the change of the weights")
    words.append(
        f"read back: differs from the trained weights by up to {found.largest_difference:.3g}; "
        f"training changed them by up to {found.largest_change:.3g}"
    )
    if found.share_kept is None and found.lost > _MUCH:
        words.append(
            f"Rounding to {found.dtype} loses {found.lost_in_words} of what training has changed "
            "(in squares). Export with --dtype fp32"
            + (", or the change alone with --format lora" if result.takes_lora else "")
        )
    return words


def import_command(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="Weights, or a LoRA[@STRENGTH]; *.safetensors.")
    ],
    target: Annotated[Path, typer.Argument(metavar="DST", help="The new model folder.")],
    base: Annotated[
        Path, typer.Option(help="Model folder of the same size, for the other components")
    ],
    components: Annotated[
        str, typer.Option(help="Text encoder and autoencoder: link or copy")
    ] = "link",
    as_json: Json = False,
) -> None:
    """Make a model folder of an original Wan or ComfyUI file of a denoiser, or of a LoRA."""
    with progress_bar() as on_progress:
        from pipelines.exporting.sampled import LoraSource
        from pipelines.importing import import_file
        from workers.models.exporting import Components

        on_progress("converting the file", 0, 1)
        given = LoraSource.parse(file)
        result = import_file(
            given.place, base, target, cast(Components, components), given.strength
        )
        on_progress("converting the file", 1, 1)
    data = result.to_json()
    words = f"{data['folder']}: {result.num_tensors} tensors in {result.dtype} of {file}"
    if result.num_from_8_bits:
        words += f", {result.num_from_8_bits} of them from 8 bits"
    whose = "the base's" if result.is_scheduler_of_base else "our"
    words += f"; {whose} {result.scheduler} with flow shift {result.flow_shift:g}"
    show(data, as_json, words)


def experts_command(
    base: Annotated[Path, typer.Argument(metavar="MODEL", help="Model folder, or a run.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="The new model folder.")],
    boundary: Annotated[float, typer.Option(help="Lowest noise level of the first expert")],
    components: Annotated[str, typer.Option(help="Weight files: link or copy")] = "link",
    as_json: Json = False,
) -> None:
    """Make a model folder of two experts by noise level, to train them in phases."""
    with progress_bar() as on_progress:
        from pipelines.experts import make_experts
        from pipelines.run.places import shared_place
        from workers.models.exporting import Components

        on_progress("writing the folder", 0, 1)
        made = make_experts(base, target, boundary, cast(Components, components))
        folder = shared_place(made)
        on_progress("writing the folder", 1, 1)
    data = {"folder": folder, "boundary": boundary}
    show(data, as_json, f"{folder}: two experts of {base}, which change at noise level {boundary}")


def transition_command(
    base: Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of a Wan model, or a run.")],
    target: Annotated[
        Path,
        typer.Argument(
            metavar="DST", help="The new model folder; a model folder there is replaced."
        ),
    ],
    layers: Annotated[
        int, typer.Option(help="Last layers that belong to the flow head, from 1 to all but one")
    ],
    steps: Annotated[int, typer.Option(help="Steps of the inner flow")] = 2,
    shift: Annotated[float, typer.Option(help="Shift of the inner levels")] = 10.0,
    components: Annotated[str, typer.Option(help="Weight files: link or copy")] = "link",
    as_json: Json = False,
) -> None:
    """Make a model folder with a flow head, to distil it as a transition (TMD)."""
    with progress_bar() as on_progress:
        from pipelines.run.places import shared_place
        from pipelines.transition import make_transition
        from workers.models.exporting import Components

        on_progress("writing the folder", 0, 1)
        made = make_transition(base, target, layers, steps, shift, cast(Components, components))
        folder = shared_place(made)
        on_progress("writing the folder", 1, 1)
    data = {"folder": folder, "layers": layers, "steps": steps, "shift": shift}
    words = (
        f"{folder}: {base} with a flow head (layers, from the last: {layers}; inner steps: {steps})"
    )
    show(data, as_json, words)
