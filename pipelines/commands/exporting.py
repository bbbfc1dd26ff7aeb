"""Command that hands a generator over: `sgmd export`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, cast

import typer

from pipelines.commands.options import Json
from pipelines.commands.output import progress_bar, show


def export(
    model: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run, finished or not, or a model folder.")
    ],
    checkpoint: Annotated[
        str | None, typer.Option(help="last, best or an iteration; default: the newest")
    ] = None,
    form: Annotated[
        str,
        typer.Option("--format", help="diffusers, single-file, comfyui, lora or lora-comfyui"),
    ] = "diffusers",
    output: Annotated[
        Path | None, typer.Option(help="Folder, replaced whole; default RUN/exports/FORMAT")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the weights: bf16, fp16 or fp32")] = "bf16",
    components: Annotated[
        str,
        typer.Option(help="Text encoder and autoencoder: link, copy or none (diffusers only)"),
    ] = "link",
    rank: Annotated[int, typer.Option(help="Rank of a LoRA")] = 64,
    base: Annotated[
        Path | None, typer.Option(help="Model that it was trained from; a run knows it")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a generator for diffusers, ComfyUI or the original code, and compare it.

    The folder has a model card, README.md, with the lines of code that sample it rightly.
    """
    with progress_bar() as on_progress:
        from pipelines.exporting.export import Components, ExportOptions, export

        result = export(
            model,
            checkpoint=checkpoint,
            base=base,
            output=output,
            options=ExportOptions(form, dtype, cast(Components, components), rank),
            on_progress=on_progress,
        )
    found = result.figures
    words = [f"{result.folder}: {found.form}, {result.bytes / 1e9:.3g} GB of weights written"]
    if found.share_kept is not None:
        words.append(f"rank {found.rank} keeps {found.share_kept:.1%} of the change of the weights")
    words.append(
        f"read back: differs from the trained weights by up to {found.largest_difference:.3g}; "
        f"training changed them by up to {found.largest_change:.3g}"
    )
    data = {
        "folder": str(result.folder),
        "iteration": result.iteration,
        "bytes": result.bytes,
        **asdict(found),
    }
    show(data, as_json, "\n".join(words))
