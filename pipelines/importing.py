"""Make a model folder of a single file: `sgmd import`.

weights in the names of the original release, or of ComfyUI -> diffusers' own conversion
weights in 8 bits and their scales                          -> the numbers, then the same
a LoRA in the names of any program                          -> the base's weights, and its changes
autoencoder, text encoder, tokenizer, scheduler             <- the base folder

A LoRA that says how to sample (`sgmd.json` beside it) gets a scheduler for that; one that does not
leaves the base's settings, few steps included, as they are.

Of two experts the file's name says which one it is of; the other stays as it is in the base.
"""

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cluster.folders import whole_folder_at
from cluster.paths import kind_of_path
from pipelines.exporting.sampled import LoraSource, settings_of_loras
from pipelines.exporting.target import require_safe_target
from pipelines.media.inference import (
    read_inference_settings,
    scheduler_of,
    write_inference_settings,
)
from pipelines.run.generator_folder import model_folder
from pipelines.run.places import shared_place
from sgmd_core.errors import ConfigError, ModelFolderError
from workers.models.configs import INDEX_FILE
from workers.models.exchange import ScaledLora, part_by_name
from workers.models.exporting import Components, narrowed_one
from workers.models.families import family_of
from workers.models.family import ModelFamily
from workers.models.folder import ModelFolder
from workers.models.lora_files import is_lora
from workers.models.scaled_weights import FLOAT8, is_beside_weights, is_in_8_bits
from workers.models.weight_digests import SETTINGS_FILE
from workers.models.weights import DTYPES

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float32}

_REMEDY = "Give the file of a text-to-video denoiser and, with --base, a folder of the same size"


@dataclass(frozen=True, slots=True)
class ImportResult:
    """A model folder that was made.

    Attributes:
        folder: Where it is.
        num_tensors: Tensors of the denoiser.
        dtype: Type of most of them: that of the file, or bf16 where that has 8 bits.
        num_from_8_bits: Tensors that the file has in 8 bits.
        scheduler: Class of the scheduler, with which diffusers samples the folder.
        is_scheduler_of_base: Whether it is the base's, with all of its settings.
        flow_shift: Its shift of the noise levels.
    """

    folder: Path
    num_tensors: int
    dtype: str
    num_from_8_bits: int
    scheduler: str
    is_scheduler_of_base: bool
    flow_shift: float

    def to_json(self) -> dict[str, object]:
        """Returns what `sgmd import --json` prints."""
        return {**asdict(self), "folder": shared_place(self.folder)}


def import_file(
    file: str | Path,
    base: str | Path,
    output: str | Path,
    components: Components = "link",
    strength: float = 1.0,
) -> ImportResult:
    """Make a model folder of a denoiser in one file, or of a LoRA and its base.

    Args:
        file: Safetensors file: weights in the names of the original release or of ComfyUI, or a
            LoRA.
        base: Model folder of the same size; its other components become the new folder's.
        output: The new folder; an existing model folder is replaced whole.
        components: Whether the other components are linked or copied.
        strength: Of a LoRA.

    Raises:
        ModelFolderError: The file is not one of the base's denoiser, or is damaged.
        ConfigError: A folder of something else is in the way, or `components` is neither.
    """
    path, target = Path(file), Path(output)
    base_folder = model_folder(base)
    require_safe_target(target, "DST", (path, base_folder), f"importing {path}")
    if components not in ("link", "copy"):
        raise ConfigError(f"importing {path}", f"--components {components}", "link or copy")
    family = family_of(base_folder)
    checked = family.inspect(base_folder)
    types = _stored_types(path)
    loras = [LoraSource(path, strength)] if is_lora(types) else []
    stated = settings_of_loras(base_folder, loras)
    settings = stated or read_inference_settings(base_folder)
    keeps = stated is None and scheduler_of(base_folder) is not None
    weights, stored = _weights(family, checked, path, types, strength)
    weights = finite_and_narrowed(path, weights, _DTYPES[stored], family.traits.keep_fp32)
    in_8_bits = sum(k in FLOAT8 and not is_beside_weights(name) for name, k in types.items())
    with whole_folder_at(target, (SETTINGS_FILE, INDEX_FILE)) as draft:
        family.export(
            draft,
            base_folder,
            weights,
            flow_shift=None if keeps else settings.flow_shift,
            components=components,
        )
        if loras and (stated is not None or (base_folder / SETTINGS_FILE).is_file()):
            write_inference_settings(draft, settings)
        family.inspect(draft)
        scheduler = scheduler_of(draft) or "none"
        shift = read_inference_settings(draft).flow_shift
    return ImportResult(target, len(weights), stored, in_8_bits, scheduler, keeps, shift)


def _weights(
    family: ModelFamily, base: ModelFolder, path: Path, types: Mapping[str, str], strength: float
) -> tuple[Mapping[str, Tensor], str]:
    """Weights of the new denoiser, or of one expert, and the type to write most of them in."""
    make = family.traits.exchange
    files = None if make is None else make()
    if files is None:
        expected = "a family that other programs keep in single files"
        raise _refusal(path, f"a base of the family {family.name}", expected)
    part = part_by_name(path, files.parts)
    if part is None:
        expected = f"{' or '.join(files.parts)} in its name: each expert has a file of its own"
        raise _refusal(path, "a file of one of two experts", expected, "Rename it")
    if is_lora(types):
        (first, *_) = base.weights[base.layout.denoiser].used
        merged = files.merge_loras([ScaledLora({part: path}, strength)], base.path)
        return merged, _main_type(first, _stored_types(first))
    if strength != 1:
        found = f"a strength of {strength:g} for a file of weights"
        raise ConfigError(f"importing {path}", found, "a LoRA, which has a strength")
    stored = _main_type(path, types)
    try:
        return files.read_weights({part: path}, base.path), stored
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise _refusal(path, first, f"the denoiser of {base.path}, and nothing else") from error


def _stored_types(path: Path) -> dict[str, str]:
    """Types of a file's tensors by name, in the words of safetensors."""
    if kind_of_path(path) != "a file" or path.suffix != ".safetensors":
        found = kind_of_path(path) or "no such file"
        found = f"a file {path.suffix}, which is never opened" if found == "a file" else found
        raise _refusal(path, found, "a file *.safetensors; pickled weights can run code")
    try:
        with safe_open(path, framework="pt") as weights:
            names = list(weights.keys())
            return {name: str(weights.get_slice(name).get_dtype()) for name in names}
    except (OSError, SafetensorError) as error:
        raise _refusal(path, f"unreadable ({error})", "a complete safetensors file") from error


def _main_type(path: Path, types: Mapping[str, str]) -> str:
    """The type of most tensors of a file of weights; where those have 8 bits, that to write."""
    if is_in_8_bits(types):
        return "BF16"
    odd = [f"{name} in {kind}" for name, kind in types.items() if kind not in DTYPES]
    expected = f"weights in {', '.join(DTYPES)}"
    if odd or not types:
        raise _refusal(path, odd[0] if odd else "no tensors", expected)
    return max(set(types.values()), key=list(types.values()).count)


def finite_and_narrowed(
    path: Path, weights: Mapping[str, Tensor], dtype: torch.dtype, kept: Collection[str]
) -> dict[str, Tensor]:
    """Weights in the type of the file; each is asked for once, since that merges its changes."""
    found: dict[str, Tensor] = {}
    for name in weights:
        found[name] = narrowed_one(name, weights[name], dtype, kept)
        if not torch.isfinite(found[name]).all():
            raise _refusal(path, f"NaN or infinity in {name}, in {dtype}", "finite weights")
    return found


def _refusal(path: Path, found: str, expected: str, remedy: str = _REMEDY) -> ModelFolderError:
    return ModelFolderError(f"importing {path}", found, expected, remedy)
