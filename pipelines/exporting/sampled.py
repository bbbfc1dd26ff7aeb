"""Folders to sample from that are made for the call: a checkpoint of a run, a LoRA on its base."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.exporting.export import ExportOptions, export
from pipelines.media.inference import (
    model_folder,
    read_inference_settings,
    write_inference_settings,
)
from sgmd_core.errors import ConfigError, ModelFolderError
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
    lora = _file(lora)
    require_same_weights(base)
    if (lora.parent / SETTINGS_FILE).is_file():
        require_same_weights(lora.parent)
    try:
        weights = family.traits.exchange().read_low_rank(lora, base)
    # Whatever a library raises of a file of another kind.
    except Exception as error:
        raise ModelFolderError(
            f"merging the LoRA {lora} into {base}",
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            f"a LoRA of a {family.name} denoiser of this size",
            "Check that it was made for this base",
        ) from error
    settings = read_inference_settings(base)
    if (lora.parent / SETTINGS_FILE).is_file():
        stored = json.loads((lora.parent / SETTINGS_FILE).read_text())
        settings = settings.model_validate({**settings.model_dump(), **stored})
    family.export(folder, base, weights, flow_shift=settings.flow_shift, components="link")
    write_inference_settings(folder, settings)


def _file(lora: Path) -> Path:
    """File of a LoRA; of a folder, the only one in it."""
    found = sorted(lora.glob("*.safetensors")) if lora.is_dir() else [lora]
    if len(found) != 1 or not found[0].is_file() or found[0].suffix != ".safetensors":
        names = ", ".join(path.name for path in found if path.exists())
        raise ModelFolderError(
            f"reading the LoRA {lora}",
            names or "no such file",
            "one .safetensors file",
            "Name the file",
        )
    return found[0]
