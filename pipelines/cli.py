"""The command line: `sgmd`, or `python -m pipelines.cli`, which needs no installation.

A command reads its arguments, calls one function of `pipelines`, and shows what it returns. Heavy
imports stand inside the commands, so that `--help` is there at once.

    exit code 0   done
              1   a run failed on the way, or something necessary is missing (doctor)
              2   the request was wrong: a setting, a folder, a shard
"""

import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from typer.core import TyperGroup

from cluster.errors import ClusterError
from pipelines.cli_output import pairs, progress_bar, show, show_error, working
from sgmd_core.errors import ConfigError, NonFiniteError, SgmdError, StaleCallError

if TYPE_CHECKING:
    from pipelines.config import DistillConfig

_RUN_FAILURES = (ClusterError, NonFiniteError, StaleCallError)


class _TeachingGroup(TyperGroup):
    """Shows our errors in words; `--debug` lets the traceback through."""

    # Typer brings click along, from 0.2x on as a part of itself, so the context has two names.
    def invoke(self, ctx: Any) -> Any:  # noqa: ANN401
        try:
            return super().invoke(ctx)
        except SgmdError as error:
            if ctx.params["debug"]:
                raise
            show_error(error)
            raise typer.Exit(1 if isinstance(error, _RUN_FAILURES) else 2) from None


app = typer.Typer(
    name="sgmd",
    cls=_TeachingGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Turns a many-step text-to-video diffusion model into a four-step one, on Ray.",
)
recipes_app = typer.Typer(no_args_is_help=True, help="The recipes that ship, to read and to copy.")
app.add_typer(recipes_app, name="recipes")

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe that ships, or a YAML file.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Settings, such as objective.lambda_nr=0.05"),
]


def _show_version(wanted: bool) -> None:
    if wanted:
        try:
            typer.echo(f"sgmd {version('sgmd')}")
        except PackageNotFoundError:
            typer.echo("sgmd, run from its source tree")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    show_version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Options of all commands."""


@app.command()
def doctor(
    address: Annotated[
        str | None, typer.Option(help="Ray cluster to reach: auto, HOST:PORT")
    ] = None,
    storage: Annotated[str | None, typer.Option(help="Folder or s3://bucket/prefix to try")] = None,
    as_json: Json = False,
) -> None:
    """Say what this machine has, what is missing, and how to get it."""
    with working():
        from pipelines.doctor import Status, examine

        findings = examine(address=address, storage=storage)
    table = Table(title="sgmd doctor", title_justify="left")
    for heading in ("check", "", "found", "what to do"):
        table.add_column(heading, overflow="fold")
    colours = {Status.GOOD: "green", Status.LIMITED: "yellow", Status.MISSING: "red"}
    for finding in findings:
        colour = colours[finding.status]
        table.add_row(finding.name, f"[{colour}]{finding.status}[/]", finding.found, finding.remedy)
    rows = [
        {"check": item.name, "status": item.status, "found": item.found, "remedy": item.remedy}
        for item in findings
    ]
    show(rows, as_json, table)
    if any(item.status is Status.MISSING for item in findings):
        raise typer.Exit(1)


@recipes_app.command("list")
def recipes_list(as_json: Json = False) -> None:
    """List the recipes that ship."""
    from pipelines.recipe_files import shipped_recipes

    recipes = shipped_recipes()
    rows = [{"name": r.name, "summary": r.summary, "path": str(r.path)} for r in recipes]
    table = Table("recipe", "what it is", box=None)
    for recipe in recipes:
        table.add_row(recipe.name, recipe.summary)
    show(rows, as_json, table)


@recipes_app.command("show")
def recipes_show(recipe: RecipeName, as_json: Json = False) -> None:
    """Print a recipe, with every key explained."""
    from pipelines.overrides import read_yaml
    from pipelines.recipe_files import find_recipe

    text = find_recipe(recipe).read_text(encoding="utf-8")
    show(read_yaml(text), as_json, text.rstrip("\n"))


@recipes_app.command("copy")
def recipes_copy(
    recipe: RecipeName,
    target: Annotated[
        Path | None, typer.Argument(help="File to write; default RECIPE.yaml")
    ] = None,
    as_json: Json = False,
) -> None:
    """Copy a recipe, to be edited."""
    from pipelines.recipe_files import find_recipe

    source = find_recipe(recipe)
    target = target or Path(source.name)
    if target.exists():
        raise ConfigError(
            f"copying the recipe {recipe}", f"{target} is there already", "a new file"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    show({"path": str(target)}, as_json, f"{target}    run it: sgmd distill {target}")


@recipes_app.command("schema")
def recipes_schema() -> None:
    """Print the JSON schema of a distillation recipe, for editors that check YAML."""
    from pipelines.config import json_schema

    show(json_schema(), True)


@app.command()
def shapes(
    target: Annotated[str, typer.Argument(metavar="DST", help="Folder or s3://bucket/prefix.")],
    train_clips: Annotated[int, typer.Option(help="Clips in DST/train")] = 2048,
    held_out_clips: Annotated[int, typer.Option(help="Clips in DST/held_out")] = 512,
    shard_size: Annotated[int, typer.Option(help="Clips in one Parquet file")] = 512,
    seed: Annotated[int, typer.Option(help="Fixes every clip")] = 0,
    as_json: Json = False,
) -> None:
    """Write the embedded data set: captioned clips of moving shapes, as mp4 in Parquet shards."""
    with progress_bar() as on_progress:
        from pipelines.shapes import Split, write_shards

        shards = {
            split.value: write_shards(
                f"{target.rstrip('/')}/{split.value}",
                num_clips=num_clips,
                shard_size=shard_size,
                seed=seed,
                split=split,
                on_progress=lambda done, total, what=split.value: on_progress(what, done, total),
            )
            for split, num_clips in ((Split.TRAIN, train_clips), (Split.HELD_OUT, held_out_clips))
        }
    counts = {name: len(paths) for name, paths in shards.items()}
    data = {"folder": target, "clips": {"train": train_clips, "held_out": held_out_clips}}
    show(
        data | {"shards": shards},
        as_json,
        f"{train_clips} clips in {counts['train']} shards: {target}/train",
        f"{held_out_clips} clips in {counts['held_out']} shards: {target}/held_out",
    )


@app.command()
def distill(
    recipe: Annotated[
        str | None,
        typer.Argument(metavar="RECIPE", help="A recipe that ships, or a YAML file."),
    ] = None,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check settings, model and data; start nothing.")
    ] = False,
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN", help="Go on with this run's newest checkpoint; RECIPE may be left out."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Distil a teacher into a few-step generator: the main job."""
    with working() as console:
        from pipelines import distill as job
        from pipelines.progress import console_listener

        config = _distill_config(recipe, overrides or [], resume)
        if dry_run:
            result = job.dry_run(config)
        else:
            with console_listener(config.iterations, console) as listener:
                result = job.distill(config, resume=resume is not None, listener=listener)
    title = "dry run: everything fits; nothing was started" if dry_run else ""
    show(result, as_json, pairs(result, title=title))


def _distill_config(
    recipe: str | None, overrides: list[str], resume: Path | None
) -> "DistillConfig":
    from pipelines.config import load_recipe

    if resume is None:
        if recipe is None:
            raise ConfigError(
                "starting a distillation",
                "neither a recipe nor a run to resume",
                "sgmd distill RECIPE, or sgmd distill --resume RUN",
                "`sgmd recipes list` shows the recipes that ship",
            )
        return load_recipe(recipe, overrides)
    if recipe is None or "=" in recipe:
        overrides = [recipe, *overrides] if recipe else overrides
        recipe = str(resume / "config.yaml")
    return load_recipe(recipe, overrides).in_folder(resume)


@app.command()
def evaluate(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A finished run, or a diffusers folder.")
    ],
    teacher: Annotated[Path | None, typer.Option(help="Teacher's folder; a run knows it")] = None,
    captions: Annotated[
        str | None, typer.Option(help="Shards of held-out captions; a run knows them")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for the results; default RUN")] = None,
    num_captions: Annotated[int, typer.Option(help="Clips in every set")] = 256,
    teacher_steps: Annotated[int | None, typer.Option(help="Steps of the reference")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Guidance of the teacher")] = None,
    batch_size: Annotated[int, typer.Option(help="Clips sampled side by side")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of the reference")] = 0,
    as_json: Json = False,
) -> None:
    """Measure a generator against its teacher: figures, verdicts, contact sheet."""
    with progress_bar() as on_progress:
        from pipelines import evaluate as job
        from pipelines.evaluation import table, verdict_lines
        from pipelines.run_folder import RunFolder

        if output is None:
            output = run if RunFolder(run).config.exists() else Path("evaluation")
        result = job.evaluate(
            run,
            teacher=teacher,
            captions=captions,
            output=output,
            options=job.EvaluationOptions(
                num_captions=num_captions,
                seed=seed,
                batch_size=batch_size,
                teacher_steps=teacher_steps,
                guidance_scale=guidance_scale,
            ),
            on_progress=on_progress,
        )
    paths = [output / job.EVALUATION_FILE, output / result.sheet_png, output / result.sheet_gif]
    lines = "\n".join(["", *verdict_lines(result), "", *map(str, paths)])
    show(result.model_dump(mode="json"), as_json, table(result), lines)


@app.command()
def generate(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="A diffusers Wan folder, or a finished run.")
    ],
    prompt: Annotated[list[str], typer.Option(help="What to show; may be given more than once")],
    output: Annotated[Path, typer.Option(help="Folder for the clips")] = Path("clips"),
    seed: Annotated[int, typer.Option(help="Seed of the initial noise")] = 0,
    num_steps: Annotated[int | None, typer.Option(help="Denoising steps")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="1 is no guidance")] = None,
    flow_shift: Annotated[float | None, typer.Option(help="Shift of the noise levels")] = None,
    text_length: Annotated[int | None, typer.Option(help="Text positions")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What to lead away from")] = None,
    num_frames: Annotated[int | None, typer.Option(help="Frames a clip")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels")] = None,
    fps: Annotated[int | None, typer.Option(help="Frames a second")] = None,
    zoom: Annotated[int | None, typer.Option(help="Enlarge the files this many times")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")] = None,
    as_json: Json = False,
) -> None:
    """Sample prompts to mp4 and GIF; what is not given comes from the model's folder."""
    with progress_bar() as on_progress:
        from pipelines import generate as job

        clips = job.generate(
            model,
            prompt,
            output=output,
            seed=seed,
            num_steps=num_steps,
            guidance_scale=guidance_scale,
            flow_shift=flow_shift,
            text_length=text_length,
            negative_prompt=negative_prompt,
            num_frames=num_frames,
            height=height,
            width=width,
            fps=fps,
            zoom=zoom,
            device=device,
            on_progress=lambda done, total: on_progress("denoising steps", done, total),
        )
    rows = [
        {
            "prompt": clip.prompt,
            "seed": clip.seed,
            "paths": [str(path) for path in clip.paths],
            "seconds": clip.seconds,
        }
        for clip in clips
    ]
    show(rows, as_json, "\n".join(str(path) for clip in clips for path in clip.paths))


def main() -> None:
    """Runs the command line."""
    app()


if __name__ == "__main__":
    main()
