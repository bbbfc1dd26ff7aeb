"""The model card of an export: README.md with metadata, as model hubs read it.

recipe, data, figures, clips, and the lines of code that sample it rightly
"""

import logging
import re
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from cluster.errors import StorageError
from cluster.files import write_whole
from pipelines.evaluation.result import GENERATOR, Evaluation
from pipelines.evaluation.run import EVALUATION_FILE
from pipelines.exporting.source import TrainedGenerator
from pipelines.reporting.names import in_order
from pipelines.run.folder import RunFolder, read_jsonl
from pipelines.run.outputs import file_inside
from pipelines.run.revision import git_revision
from sgmd_core.errors import CheckpointError
from workers.models.addresses import is_hub_id
from workers.models.configs import INDEX_FILE, read_model_json
from workers.models.weights import lacks_weights
from workers.samplings import REFERENCE

CARD = "README.md"
_CLIPS = "samples"
_TEMPLATES = Path(__file__).parent / "assets"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Figures:
    """Form of an export, and its distance from the trained weights.

    Attributes:
        form: Its format.
        dtype: Type of its weights.
        rank: Of the LoRA.
        largest_difference: Of a weight that was read back from the trained one.
        largest_change: Of a trained weight from that of the base.
        lost: Squared distance from the trained weights over that from the base.
        share_kept: Share of the squared change that a LoRA holds; None for other formats.
    """

    form: str
    dtype: str
    rank: int
    largest_difference: float
    largest_change: float
    lost: float
    share_kept: float | None

    @property
    def lost_in_words(self) -> str:
        """Share of the change that is lost; rounding can take more than a short training adds."""
        return f"{100 * self.lost:.2g} %" if self.lost < 1 else "all"


def write_model_card(draft: Path, source: TrainedGenerator, figures: Figures) -> None:
    """Writes README.md, and the clips that it shows, into the folder of an export."""
    evaluation = _evaluation(source)
    rows = _rows(evaluation)
    files = sorted(path.name for path in draft.glob("*.safetensors"))
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        # Markdown: names from elsewhere are checked or cleaned before they come here.
        autoescape=False,
    )
    grid = source.sampling.schedule.sampling_grid(
        source.sampling.num_steps, source.sampling.guidance_scale
    )
    text = environment.get_template("model_card.md.j2").render(
        metadata=_metadata(source).to_yaml().strip(),
        name=re.sub(r"[^\w. -]", "-", source.name),
        source=source,
        config=source.config,
        base=_base_id(source.base),
        teacher=_teacher_id(source),
        parts=_parts(source),
        has_components=not any(
            lacks_weights(draft / name) for name in source.family.traits.layout.weights
        ),
        files=files,
        components=source.family.traits.layout.denoisers,
        sampling=source.sampling,
        sigmas=[round(float(sigma), 4) for sigma in grid],
        figures=figures,
        rows=rows,
        measures=in_order(row["measures"] for row in rows),
        validation=_validation(source),
        verdicts=() if evaluation is None else evaluation.verdicts,
        clips=_copy_clips(draft, source.run, evaluation),
        captions=_captions_seen(source),
        drawn=_iterations_by_size(source),
        data=_data_in_words(source),
        revision=git_revision(),
        versions={name: version(name) for name in ("sgmd", "torch", "diffusers")},
    )
    write_whole(draft / CARD, text.encode())


def _metadata(source: TrainedGenerator) -> ModelCardData:
    return ModelCardData(
        # Of a model with a flow head diffusers would sample the backbone alone.
        library_name="sgmd" if source.family.traits.taught_by else "diffusers",
        pipeline_tag="text-to-video",
        base_model=_base_id(source.base),
        tags=["text-to-video", "distillation", "few-step", "sgmd", source.family.name],
    )


def _parts(source: TrainedGenerator) -> tuple[str, ...]:
    """Denoisers of the pipeline of diffusers; none where another one samples the family."""
    make = source.family.traits.exchange
    return () if make is None else make().parts


def _teacher_id(source: TrainedGenerator) -> str:
    """Id of the model that the generator was distilled from; the base where none is named."""
    named = source.config.teacher.model if source.config is not None else None
    return _base_id(Path(named) if named else source.base)


def _base_id(base: Path) -> str:
    """Id of the base on the hub, where its folder or index says so, or the folder's name."""
    for part in (base, *base.parents):
        if part.name.startswith("models--"):
            return part.name.removeprefix("models--").replace("--", "/", 1)
    known = read_model_json(base / INDEX_FILE) if (base / INDEX_FILE).is_file() else {}
    named = str(known.get("_name_or_path"))
    # A downloaded file must not write text of its own into the card.
    return named if is_hub_id(named) else re.sub(r"[^\w.-]", "-", base.name)


def _evaluation(source: TrainedGenerator) -> Evaluation | None:
    """Result of `sgmd evaluate`; None where there is none of these weights that can be read."""
    if source.run is None or source.config is None or source.iteration != source.config.iterations:
        return None
    path = file_inside(source.run.root, EVALUATION_FILE)
    try:
        return None if path is None else Evaluation.load(path)
    except (CheckpointError, OSError):
        return None


def _rows(evaluation: Evaluation | None) -> list[dict[str, Any]]:
    """Figures of the generator beside those of the teacher."""
    if evaluation is None:
        return []
    names = {row.name for row in evaluation.rows}
    return [
        evaluation.row(name).model_dump(mode="json")
        for name in (GENERATOR, REFERENCE)
        if name in names
    ]


def _lines(path: Path) -> list[dict[str, Any]]:
    """Lines of a run's log; none where it cannot be read: the card can do without."""
    try:
        return read_jsonl(path)
    except StorageError as error:
        _log.warning("the model card is written without %s: %s", path, error.found)
        return []


def _validation(source: TrainedGenerator) -> dict[str, float]:
    """Figures of the validation at this iteration; none where it was not validated."""
    if source.run is None:
        return {}
    lines = _lines(source.run.validation)
    return next((li["figures"] for li in lines if li["iteration"] == source.iteration), {})


def _copy_clips(draft: Path, run: RunFolder | None, evaluation: Evaluation | None) -> str:
    """Copies the contact sheet beside the card; its name, or nothing."""
    if run is None or evaluation is None:
        return ""
    sheet = file_inside(run.root, evaluation.sheet_gif)
    if sheet is None or sheet.suffix != ".gif" or not sheet.read_bytes().startswith(b"GIF8"):
        return ""
    write_whole(draft / f"{_CLIPS}.gif", sheet.read_bytes())
    return f"{_CLIPS}.gif"


def _data_in_words(source: TrainedGenerator) -> str:
    """Sets of captions by the last part of their addresses; a card is read by strangers."""
    if source.config is None:
        return ""
    sets = [(source.config.data.train, source.config.data.weight)]
    sets += [(each.source, each.weight) for each in source.config.data.also]
    whole = sum(weight for _, weight in sets)
    return ", ".join(
        re.sub(r"[^\w./ -]", "-", url.rstrip("/").split("/")[-1])
        + (f" ({weight / whole:.0%})" if len(sets) > 1 else "")
        for url, weight in sets
    )


def _iterations_by_size(source: TrainedGenerator) -> Counter[tuple[int, int, int]]:
    """Iterations of each size that these weights have been trained at."""
    if source.config is None or source.iteration is None or not source.config.video.buckets:
        return Counter()
    return Counter(source.config.bucket_at(each).size for each in range(source.iteration))


def _captions_seen(source: TrainedGenerator) -> int:
    """Captions that the weights have been trained on."""
    if source.run is None:
        return 0
    seen = [
        line["samples_seen"]
        for line in _lines(source.run.metrics)
        if source.iteration is None or line["iteration"] < source.iteration
    ]
    return max(seen, default=0)
