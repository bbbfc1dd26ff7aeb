"""Commands that make something: `sgmd shapes`, `pretrain`, `distill`."""

import os
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.commands.failures import hinting
from pipelines.commands.options import LARGEST_SEED, Json, Overrides, RecipeName
from pipelines.commands.output import plain_printer, progress_bar, show, working
from sgmd_core.collector import paused_collector
from sgmd_core.errors import ConfigError
from sgmd_core.worlds import WorldName

if TYPE_CHECKING:
    from pipelines.config.recipe import DistillConfig
    from pipelines.pretraining.events import PretrainEvent


def shapes_command(
    target: Annotated[str, typer.Argument(metavar="DST", help="Folder or s3://bucket/prefix.")],
    train_clips: Annotated[int, typer.Option(help="Clips in DST/train")] = 2048,
    held_out_clips: Annotated[int, typer.Option(help="Clips in DST/held_out")] = 512,
    shard_size: Annotated[int, typer.Option(help="Clips in one Parquet file")] = 512,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Fixes every clip")] = 0,
    world: Annotated[
        WorldName,
        typer.Option(help="`open`: several textured objects, captions that leave motion open"),
    ] = WorldName.SHAPES,
    as_json: Json = False,
) -> None:
    """Write an embedded data set: captioned clips of moving shapes, as mp4 in Parquet shards."""
    with progress_bar() as on_progress:
        from pipelines.embedded_worlds import embedded_world
        from pipelines.shapes import ClipSplit, require_counts, write_shards

        require_counts(
            train_clips=train_clips, held_out_clips=held_out_clips, shard_size=shard_size
        )
        shards = {
            split.value: write_shards(
                f"{target.rstrip('/')}/{split.value}",
                num_clips=num_clips,
                shard_size=shard_size,
                seed=seed,
                split=split,
                on_progress=lambda done, total, what=split.value: on_progress(what, done, total),
                world=embedded_world(world),
            )
            for split, num_clips in (
                (ClipSplit.TRAIN, train_clips),
                (ClipSplit.HELD_OUT, held_out_clips),
            )
        }
    counts = {name: len(paths) for name, paths in shards.items()}
    data = {"folder": target, "clips": {"train": train_clips, "held_out": held_out_clips}}
    show(
        data | {"shards": shards},
        as_json,
        f"{train_clips} clips in {counts['train']} shards: {target}/train",
        f"{held_out_clips} clips in {counts['held_out']} shards: {target}/held_out",
    )


def pretrain_command(
    recipe: RecipeName,
    overrides: Overrides = None,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster to join: auto, HOST:PORT; default: start one")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check settings, clips and folders; start nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train a small teacher from clips with Ray Train; the same command again resumes it."""
    with working() as console:
        from pipelines.pretraining.config import load_pretraining

        loaded = load_pretraining(recipe, overrides or [])

        with paused_collector():
            from cluster.runtime import start_ray
            from pipelines.pretraining import run as job

        checked = job.checked(loaded)
        if dry_run:
            config, num_clips = checked.config, checked.clips.num_rows
            data = {"output": config.output, "run_dir": config.run_dir, "clips": num_clips}
            words = f"{num_clips} clips in {config.world.train}; would write {config.output}"
            show(data, as_json, words)
            return
        own_cluster = address is None and "RAY_ADDRESS" not in os.environ
        num_cpus = (
            max(os.cpu_count() or 1, job.num_cpus_needed(checked.config)) if own_cluster else None
        )
        with start_ray(address, num_cpus=num_cpus, preload=job.NETWORK_MODULES):
            say = plain_printer(console)
            result = job.pretrain(checked, lambda event: say(_event_line(event)))
    data = {"output": str(result.output), "quality": asdict(result.quality)}
    show(data, as_json, str(result.output), result.quality.in_words())


def _event_line(event: "PretrainEvent") -> str:
    if event.note:
        return f"{event.stage}: {event.note}"
    figures = "  ".join(f"{name} {value:.4g}" for name, value in event.metrics.items())
    step = f"{event.step}/{event.num_steps}"
    return f"{event.stage} {step}  {figures}  {event.seconds_per_step:.2f} s a step"


_AUTO = Path("auto")
"""Stands for the recipe's own run, so that a job that is started again needs no other command."""


def distill_command(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE",
            help="Name of a shipped recipe, a YAML file, or a run whose settings are used.",
        ),
    ] = None,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check settings, model and data; start nothing.")
    ] = False,
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN",
            help="Resume this run from its newest checkpoint; RECIPE may be left out. `auto`: the "
            "recipe's own run if it exists, else a new one.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Distil a teacher into a few-step generator: the main job."""
    with working() as console, ExitStack() as stack:
        # Before the libraries of networks: a wrong setting is reported without waiting for them.
        config = distill_config(recipe, overrides or [], resume)

        with paused_collector():
            from pipelines.distillation import run as job
            from pipelines.run.folder import RunFolder
            from pipelines.run.opened_copy import working_copy
            from pipelines.run.progress import console_observer
            from pipelines.run.stop_rule import StopRule

        stack.enter_context(working_copy(config.run_folder, job.NOT_NEEDED))
        folder = RunFolder(config.run_folder)
        resumes = folder.config.exists() if resume == _AUTO else resume is not None
        if dry_run:
            result = job.dry_run(config, resume=resumes)
        else:
            is_ours = resumes or not folder.config.exists()

            def hint() -> str:
                known = is_ours and folder.config.exists()
                return f"The run goes on with: sgmd distill --resume {folder}" if known else ""

            rule = StopRule(config.iterations)
            with hinting(hint), console_observer(rule, console) as observer:
                result = job.distill(config, resume=resumes, observer=observer)
    if dry_run:
        from pipelines.commands.run_summary import dry_run_words

        show(result, as_json, *dry_run_words(result))
    else:
        from pipelines.commands.run_summary import summary_words

        show(result, as_json, *summary_words(result))


def distill_config(
    recipe: str | None, overrides: list[str], resume: Path | None
) -> "DistillConfig":
    """Settings of a distillation: of a recipe and overrides, or of the run that is resumed."""
    with paused_collector():
        from pipelines.config.recipe import load_recipe
        from pipelines.config.unread import warn_of_foreign_sections
        from pipelines.run.folder import RunFolder
        from pipelines.run.opened_copy import working_copy

    warn_of_foreign_sections("distill", overrides)
    if resume is None or resume == _AUTO:
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
        with working_copy(resume, ("samples",)):
            folder = RunFolder(resume)
            folder.require()
            return load_recipe(str(folder.config), overrides).in_folder(resume)
    return load_recipe(recipe, overrides).in_folder(resume)
