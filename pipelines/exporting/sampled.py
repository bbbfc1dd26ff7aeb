"""Folders to sample from that are made for the call: a checkpoint of a run, a LoRA on its base."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

from pipelines.exporting.export import ExportOptions, export
from pipelines.media.inference import read_inference_settings, write_inference_settings
from pipelines.run.generator_folder import model_folder
from sgmd_core.errors import ConfigError, ModelFolderError
from workers.models.configs import read_model_json
from workers.models.families import family_of
from workers.models.weight_digests import SETTINGS_FILE, require_same_weights


@contextmanager
def sampled_folder(
    run_or_model: str | Path, *, checkpoint: str | None = None, lora: str | Path | None = None
) -> Iterator[Path]:
    """Yields the folder to sample from; a folder that was made is deleted afterwards.

    Args:
        run_or_model: Folder of a run, or a model folder.
        checkpoint: `last`, `best` or an iteration of the run; None: its finished generator.
        lora: LoRA of diffusers or ComfyUI, merged into the model with strength 1; `sgmd.json`
            beside it, as `sgmd export` writes it, says how to sample.

    Raises:
        ConfigError: The family takes no LoRA.
        CheckpointError: The checkpoint does not exist or is not whole.
        ModelFolderError: The model or the LoRA cannot be read, or they do not fit.
    """
    if checkpoint is None and lora is None:
        yield model_folder(run_or_model)
        return
    with tempfile.TemporaryDirectory(prefix="sgmd-") as scratch:
        folder = Path(scratch) / "model"
        if checkpoint is not None:
            export(
                run_or_model,
                checkpoint=checkpoint,
                output=folder,
                options=ExportOptions(dtype="fp32"),
            )
        if lora is not None:
            base = model_folder(run_or_model) if checkpoint is None else folder
            folder = Path(scratch) / "merged"
            _merge(base, Path(lora), folder)
        yield folder


def _merge(base: Path, lora: Path, folder: Path) -> None:
    """Writes a model folder with a LoRA merged in."""
    family = family_of(base)
    if family.traits.exchange is None:
        raise ConfigError(
            f"sampling {base} with a LoRA", f"a {family.name} model", "a family that takes LoRAs"
        )
    exchange = family.traits.exchange()
    paths = _files(lora, exchange.parts)
    beside = lora if lora.is_dir() else lora.parent
    require_same_weights(base)
    if (beside / SETTINGS_FILE).is_file():
        require_same_weights(beside)
    try:
        weights = exchange.read_low_rank(paths, base)
    # Whatever a library raises of a file of another kind.
    except Exception as error:
        raise ModelFolderError(
            f"merging the LoRA {lora} into {base}",
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            f"a LoRA of a {family.name} denoiser of this size",
            "Check that it was made for this base",
        ) from error
    settings = read_inference_settings(base)
    if (beside / SETTINGS_FILE).is_file():
        stored = read_model_json(beside / SETTINGS_FILE)
        try:
            settings = settings.model_validate({**settings.model_dump(), **stored})
        except ValidationError as error:
            raise ModelFolderError(
                f"reading {beside / SETTINGS_FILE}",
                error.errors()[0]["msg"],
                "sampling settings as `sgmd export` writes them",
                "Delete the file to sample as the base is sampled",
            ) from error
    family.export(folder, base, weights, flow_shift=settings.flow_shift, components="link")
    write_inference_settings(folder, settings)


def _files(lora: Path, parts: Sequence[str]) -> dict[str, Path]:
    """Files of a LoRA by part; in a folder, that of an expert has its name in its own."""
    found = sorted(lora.glob("*.safetensors")) if lora.is_dir() else [lora]
    by_part = {part: [path for path in found if part in path.name] for part in parts}
    wrong = [part for part, paths in by_part.items() if len(paths) > 1]
    known = {path for paths in by_part.values() for path in paths if path.is_file()}
    if wrong or not found or known != set(found) or found[0].suffix != ".safetensors":
        names = ", ".join(path.name for path in found if path.exists())
        experts = " or ".join(part for part in parts if part)
        raise ModelFolderError(
            f"reading the LoRA {lora}",
            names or "no such file",
            "one .safetensors file"
            + (f" an expert, with {experts} in its name" if experts else ""),
            "Name the file",
        )
    return {part: paths[0] for part, paths in by_part.items() if paths}
