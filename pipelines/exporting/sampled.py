"""Folders to sample from that are made for the call: a checkpoint of a run, LoRAs on a base."""

import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from pipelines.config.recipe import load_recipe
from pipelines.exporting.export import ExportOptions, export
from pipelines.media.inference import (
    InferenceSettings,
    read_inference_settings,
    scheduler_of,
    write_inference_settings,
)
from pipelines.run.folder import RunFolder
from pipelines.run.generator_folder import model_folder
from sgmd_core.errors import ConfigError, ModelFolderError
from workers.models.addresses import local_model
from workers.models.configs import read_model_json
from workers.models.exchange import ScaledLora, part_by_name
from workers.models.families import family_of
from workers.models.folder import require_encoders
from workers.models.weight_digests import SETTINGS_FILE, require_same_weights


@dataclass(frozen=True, slots=True)
class LoraSource:
    """A LoRA to merge into a model.

    Attributes:
        place: File, or folder with one, or with one an expert.
        strength: Factor of its changes.
    """

    place: Path
    strength: float = 1.0

    @classmethod
    def parse(cls, text: str) -> "LoraSource":
        """Read `FILE` or `FILE@STRENGTH`; a file of the whole name comes first.

        Raises:
            ConfigError: What follows the `@` is not a number.
        """
        place, mark, strength = text.rpartition("@")
        if not mark or Path(text).exists():
            return cls(Path(text))
        try:
            found = float(strength)
        except ValueError:
            found = math.nan
        if not math.isfinite(found):
            raise ConfigError(
                f"reading --lora {text}",
                f"a strength of {strength!r}",
                "FILE@STRENGTH with a number, as in mine.safetensors@0.8",
            )
        return cls(Path(place), found)


@contextmanager
def sampled_folder(
    run_or_model: str | Path,
    *,
    checkpoint: str | None = None,
    loras: Sequence[LoraSource] = (),
) -> Iterator[Path]:
    """Yields the folder to sample from; a folder that was made is deleted afterwards.

    Args:
        run_or_model: Folder of a run, or a model folder.
        checkpoint: `last`, `best` or an iteration of the run; None: its finished generator.
        loras: LoRAs of diffusers, ComfyUI, Kohya or peft, merged into the model in order;
            `sgmd.json` beside one, as `sgmd export` writes it, says how to sample.

    Raises:
        ConfigError: The family takes no LoRA, or two of them say how to sample.
        CheckpointError: The checkpoint does not exist or is not whole.
        ModelFolderError: The model or a LoRA cannot be read, or they do not fit.
    """
    if checkpoint is None and not loras:
        yield model_folder(run_or_model)
        return
    _require_clips(run_or_model, checkpoint)
    with tempfile.TemporaryDirectory(prefix="sgmd-") as scratch:
        folder = Path(scratch) / "model"
        if checkpoint is not None:
            export(
                run_or_model,
                checkpoint=checkpoint,
                output=folder,
                options=ExportOptions(dtype="fp32"),
            )
        if loras:
            base = model_folder(run_or_model) if checkpoint is None else folder
            folder = Path(scratch) / "merged"
            _merge(base, loras, folder)
        yield folder


def _require_clips(run_or_model: str | Path, checkpoint: str | None) -> None:
    """Refuses a model that makes no clips, before its weights are read and merged."""
    if checkpoint is None:
        base = model_folder(run_or_model)
    elif not (run := RunFolder(local_model(run_or_model))).config.exists():
        return  # The export says what is wrong.
    else:
        base = load_recipe(str(run.config)).model_folder
    require_encoders(family_of(base).inspect(base), f"sampling from {base}")


def _merge(base: Path, loras: Sequence[LoraSource], folder: Path) -> None:
    """Writes a model folder with LoRAs merged in."""
    family = family_of(base)
    if family.traits.exchange is None:
        raise ConfigError(
            f"sampling {base} with a LoRA", f"a {family.name} model", "a family that takes LoRAs"
        )
    exchange = family.traits.exchange()
    scaled = [ScaledLora(_files(each.place, exchange.parts), each.strength) for each in loras]
    stated = settings_of_loras(base, loras)
    settings = stated or read_inference_settings(base)
    require_same_weights(base)
    weights = exchange.merge_loras(scaled, base)
    keeps = stated is None and scheduler_of(base) is not None
    shift = None if keeps else settings.flow_shift
    family.export(folder, base, weights, flow_shift=shift, components="link")
    write_inference_settings(folder, settings)


def settings_of_loras(base: Path, loras: Sequence[LoraSource]) -> InferenceSettings | None:
    """Sampling settings that a LoRA brings for a base, or None where it is sampled as before.

    Raises:
        ConfigError: Two of them bring settings that differ.
        ModelFolderError: They cannot be read, or are of other weights than lie beside them.
    """
    settings = read_inference_settings(base)
    places = {each.place if each.place.is_dir() else each.place.parent for each in loras}
    stating = sorted(place for place in places if (place / SETTINGS_FILE).is_file())
    found: list[InferenceSettings] = []
    for beside in stating:
        require_same_weights(beside)
        stored = read_model_json(beside / SETTINGS_FILE)
        try:
            found.append(settings.model_validate({**settings.model_dump(), **stored}))
        except ValidationError as error:
            raise ModelFolderError(
                f"reading {beside / SETTINGS_FILE}",
                error.errors()[0]["msg"],
                "sampling settings as `sgmd export` writes them",
                "Delete the file to sample as the base is sampled",
            ) from error
    for beside, other in zip(stating[1:], found[1:], strict=True):
        one, two = found[0].model_dump(mode="json"), other.model_dump(mode="json")
        if differing := [f"{key} {one[key]} and {two[key]}" for key in one if one[key] != two[key]]:
            raise ConfigError(
                f"merging LoRAs into {base}",
                f"{SETTINGS_FILE} in {stating[0]} and in {beside} differ: {', '.join(differing)}",
                "one way to sample",
                f"Give all but one as copies without {SETTINGS_FILE}",
            )
    return found[0] if found else None


def _files(lora: Path, parts: Sequence[str]) -> dict[str, Path]:
    """Files of a LoRA by part; that of an expert has `high` or `low` in its name."""
    found = sorted(lora.glob("*.safetensors")) if lora.is_dir() else [lora]
    by_part = [(part_by_name(path, parts), path) for path in found if path.is_file()]
    named = {part: path for part, path in by_part if part is not None}
    is_told = len(named) == len(found) and bool(found)
    if not is_told or found[0].suffix != ".safetensors":
        names = ", ".join(path.name for path in found if path.exists())
        experts = " or ".join(part for part in parts if part)
        raise ModelFolderError(
            f"reading the LoRA {lora}",
            names or "no such file",
            "one .safetensors file"
            + (f" an expert, with {experts} in its name" if experts else ""),
            "Name the file, or rename it" if experts else "Name the file",
        )
    return named
