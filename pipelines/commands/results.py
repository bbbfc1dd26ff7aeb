"""Commands that read results: `sgmd evaluate`, `generate`, `report`, `ledger`."""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from pipelines.commands.options import Json, OptionGroup, expand_groups
from pipelines.commands.output import progress_bar, show, working
from sgmd_core.collector import paused_collector
from sgmd_core.errors import ConfigError

if TYPE_CHECKING:
    from pipelines.data.stream.reconciliation import EpochReconciliation
    from pipelines.distillation.audit import Audit
    from pipelines.generate import GeneratedClip


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateArguments(OptionGroup):
    """Options of `sgmd evaluate` by their names in `EvaluationOptions`."""

    num_captions: Annotated[
        int | None, typer.Option(help="Clips in every set; default 256, or all if there are fewer")
    ] = None
    teacher_steps: Annotated[int | None, typer.Option(help="Steps of the reference")] = None
    guidance_scale: Annotated[float | None, typer.Option(help="Guidance of the teacher")] = None
    batch_size: Annotated[
        int, typer.Option(help="Most clips sampled side by side; 32,768 tokens at most")
    ] = 16
    seed: Annotated[int, typer.Option(help="Seed of the reference")] = 0
    features: Annotated[
        Path | None,
        typer.Option(help="Weights of an I3D (.safetensors) in place of the built-in features"),
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipArguments(OptionGroup):
    """Options of which clips are sampled: one for each prompt and seed."""

    prompt: Annotated[
        list[str] | None, typer.Option(help="Caption of a clip; may be given more than once")
    ] = None
    prompts: Annotated[
        str | None,
        typer.Option(
            help="File of prompts: .txt with one per line, .csv, .tsv, .json, .jsonl, ..."
        ),
    ] = None
    seed: Annotated[
        list[int] | None,
        typer.Option(help="Seed of the initial noise; may be given more than once; default 0"),
    ] = None
    num_clips: Annotated[
        int | None,
        typer.Option(min=1, max=1_000_000, help="Clips of each prompt, with successive seeds"),
    ] = None

    def captions(self) -> list[str]:
        """Returns all prompts; ConfigError where there is none."""
        from pipelines.data.making.caption_file import read_prompts

        found = [
            *(self.prompt or []),
            *([] if self.prompts is None else read_prompts(self.prompts)),
        ]
        if not found:
            raise ConfigError(
                "generating clips",
                "no prompt",
                "something to show",
                "Give --prompt or --prompts FILE",
            )
        return found

    def seeds(self) -> list[int]:
        """Returns the seeds of each prompt; ConfigError where two options name them."""
        given = self.seed or [0]
        if self.num_clips is None:
            return given
        if len(given) > 1:
            raise ConfigError(
                "generating clips",
                f"--num-clips {self.num_clips} and {len(given)} seeds",
                "one of them, as clips come from following seeds",
            )
        return [given[0] + number for number in range(self.num_clips)]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightArguments(OptionGroup):
    """Options of which weights of a model are sampled."""

    checkpoint: Annotated[
        str | None, typer.Option(help="Checkpoint of a run: last, best or an iteration")
    ] = None
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE[@STRENGTH]",
            help="LoRA to merge into the model: a .safetensors file; may be given more than once",
        ),
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateArguments(OptionGroup):
    """Options of `sgmd generate` by their names in `SamplingOptions`."""

    num_steps: Annotated[int | None, typer.Option(help="Denoising steps")] = None
    guidance_scale: Annotated[float | None, typer.Option(help="1 means no guidance")] = None
    flow_shift: Annotated[float | None, typer.Option(help="Shift of the noise levels")] = None
    text_length: Annotated[int | None, typer.Option(help="Text positions")] = None
    negative_prompt: Annotated[
        str | None, typer.Option(help="Caption that guidance steers away from")
    ] = None
    num_frames: Annotated[int | None, typer.Option(help="Frames a clip")] = None
    height: Annotated[int | None, typer.Option(help="Pixels")] = None
    width: Annotated[int | None, typer.Option(help="Pixels")] = None
    fps: Annotated[int | None, typer.Option(help="Frames a second")] = None


@expand_groups
def evaluate_command(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A finished run, or a diffusers folder.")
    ],
    *,
    teacher: Annotated[
        Path | None, typer.Option(help="Teacher's folder; default: the run's")
    ] = None,
    captions: Annotated[
        str | None, typer.Option(help="Shards or file of held-out captions; default: the run's")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for the results; default RUN")] = None,
    sampling: EvaluateArguments,
    cache: Annotated[
        Path | None, typer.Option(help="Folder that keeps the teacher's figures for several runs")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure a generator against its teacher: figures, verdicts, contact sheet.

    A verdict is `unknown` if the clips are too few to decide. The exit code is 0 for all verdicts;
    `passed` of evaluation.json is true, false or null.
    """
    with progress_bar() as on_progress, ExitStack() as stack:
        with paused_collector():
            from pipelines.commands.evaluation_table import table, verdict_lines
            from pipelines.evaluation import run as job
            from pipelines.run.folder import RunFolder
            from pipelines.run.opened_copy import run_copy
            from pipelines.run.places import shared_place

        root = stack.enter_context(run_copy(run))
        if output is None:
            is_run = root.is_dir() and RunFolder(root).config.exists()
            output = Path(shared_place(root)) if is_run else Path("evaluation")
        result = job.evaluate(
            root,
            teacher=teacher,
            captions=captions,
            output=output,
            cache=cache,
            options=job.EvaluationOptions(**sampling.given()),
            on_progress=on_progress,
        )
    paths = [output / job.EVALUATION_FILE, output / result.sheet_png, output / result.sheet_gif]
    lines = "\n".join(["", *verdict_lines(result), "", *map(shared_place, paths)])
    show(result.model_dump(mode="json"), as_json, table(result), lines)


@expand_groups
def generate_command(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="A model folder, or a finished run.")
    ],
    *,
    clips: ClipArguments,
    output: Annotated[Path, typer.Option(help="Folder for the clips")] = Path("clips"),
    sampling: GenerateArguments,
    weights: WeightArguments,
    zoom: Annotated[int | None, typer.Option(help="Enlarge the files this many times")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")] = None,
    as_json: Json = False,
) -> None:
    """Sample prompts to mp4 and GIF; settings that are not given come from the model's folder."""
    with progress_bar() as on_progress:
        with paused_collector():
            from diffusers.utils import logging

            from pipelines import generate as job
            from pipelines.exporting.sampled import LoraSource, sampled_folder

        logging.disable_progress_bar()
        shown = clips.captions()
        loras = [LoraSource.parse(text) for text in weights.lora or []]
        with sampled_folder(model, checkpoint=weights.checkpoint, loras=loras) as folder:
            made = job.generate(
                folder,
                shown,
                output=output,
                seed=clips.seeds(),
                options=job.SamplingOptions(**sampling.given()),
                zoom=zoom,
                device=device,
                on_progress=lambda done, total: on_progress("denoising steps", done, total),
            )
            rows = [_clip_record(clip) for clip in made]
    show(rows, as_json, "\n".join(path for row in rows for path in row["paths"]))


def _clip_record(clip: "GeneratedClip") -> dict[str, Any]:
    """A clip as `--json` prints it."""
    from pipelines.run.places import shared_place

    return {
        "prompt": clip.prompt,
        "seed": clip.seed,
        "paths": [shared_place(path) for path in clip.paths],
        "seconds": clip.seconds,
    }


def report_command(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="A run, finished or not; several are compared."),
    ],
    output: Annotated[
        Path | None,
        typer.Option(help="File to write; default RUN/report.html, or comparison.html beside it"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write one self-contained HTML page: figures, clips, curves, times, alarms, settings.

    The folder of a sweep gives a page of its trials.

    Exit code 1: a file of a run could not be read at all; the page shows the rest.
    """
    with working(), ExitStack() as stack:
        from cluster.storage import file_size
        from pipelines.reporting.page import write_page
        from pipelines.reporting.records import read_run
        from pipelines.run.opened_copy import working_copy
        from pipelines.run.outputs import require_lasting_folder
        from pipelines.run.places import shared_place
        from pipelines.sweeping.page import is_sweep, write_sweep_page
        from pipelines.sweeping.places import ELSEWHERE

        if output:
            require_lasting_folder(output, "--output")
        folders = [stack.enter_context(working_copy(run, ELSEWHERE)) for run in runs]
        if len(folders) == 1 and is_sweep(folders[0]):
            records, page = [], write_sweep_page(folders[0], output)
        else:
            records = [read_run(folder) for folder in folders]
            page = write_page(records, output)
        path = shared_place(page)
        size = file_size(path)
        broken = {str(run.folder): list(run.broken) for run in records if run.broken}
        lost = [shared_place(run.folder.root / name) for run in records for name in run.unreadable]
        empty = [str(run.folder) for run in records if run.is_empty]
    data = {"path": path, "bytes": size, "broken": broken, "unreadable": lost, "empty": empty}
    words = [f"{run}: {sentence}" for run, sentences in broken.items() for sentence in sentences]
    words += [
        f"{run}: nothing yet: no iteration has been finished. Go on with `sgmd distill --resume "
        f"{run}`; if it failed, {run}/events.jsonl may say why"
        for run in empty
    ]
    if lost:
        words.append(f"The page lacks what nothing could be read of: {', '.join(lost)}")
    show(data, as_json, path, *words)
    if lost:
        raise typer.Exit(1)


def ledger_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run, finished or not.")],
    data: Annotated[
        str | None, typer.Option(help="Present place of the training data, if they were moved")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check that a run used every sample of each epoch once; exit code 1 if it did not."""
    with working():
        from pipelines.distillation.audit import audit

        result = audit(run, data)
    verdict = "every sample once" if result.is_clean else "samples were lost or repeated"
    if result.iterations_missing:
        verdict = f"{result.iterations_missing} iterations were made of which the ledger has none"
    outcome = f"{result.iterations} iterations, {result.samples_of_all} samples: {verdict}"
    if not result.iterations and result.is_clean:
        outcome = "nothing yet: no iteration has been finished, so there is no sample to look for"
    examples = [
        f"epoch {epoch}, for example: {', '.join(found.examples)}"
        for epoch, found in _epochs(result)
        if found.examples
    ]
    if result.iterations and not result.has_metrics:
        examples.append(
            "metrics.jsonl is not there: iterations that the ledger lacks are missed up to the "
            "last checkpoint alone"
        )
    if result.text_encoder_named:
        examples.append(
            "the model folder had no text encoder: embeddings were not verified; they name as "
            f"their maker {result.text_encoder_named}"
        )
    if result.autoencoder_named:
        examples.append(
            "the model folder had no autoencoder: latents were not verified; they name as "
            f"their maker {result.autoencoder_named}"
        )
    show(result.to_json(), as_json, ledger_table(result), *examples, outcome)
    if not result.is_clean:
        raise typer.Exit(1)


def ledger_table(result: "Audit") -> Table:
    """One row an epoch, as far as the run has come in it."""
    kinds = ("due", "used_once", "quarantined", "repeated", "missing", "unknown")
    table = Table()
    for heading in ("epoch", *(kind.replace("_", " ") for kind in kinds)):
        table.add_column(heading, justify="right", overflow="fold")
    for epoch, found in _epochs(result):
        table.add_row(epoch, *(str(getattr(found, kind)) for kind in kinds))
    return table


def _epochs(result: "Audit") -> "list[tuple[str, EpochReconciliation]]":
    """Epochs of all sets of captions; those of further ones named by their place."""
    found = [(str(one.epoch), one) for one in result.epochs]
    for place, further in enumerate(result.further):
        found += [(f"{one.epoch} of data.also[{place}]", one) for one in further.epochs]
    return found
