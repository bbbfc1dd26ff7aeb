"""Make a model folder of a single file of weights: `sgmd import`.

names of the original release, or of ComfyUI -> diffusers' own conversion -> transformer/
autoencoder, text encoder, tokenizer, scheduler                           <- the base folder
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cluster.files import kind_of_path
from cluster.folders import whole_folder_at
from pipelines.exporting.target import require_safe_target
from pipelines.media.inference import read_inference_settings
from pipelines.run.generator_folder import model_folder
from pipelines.run.places import shared_place
from sgmd_core.errors import ConfigError, ModelFolderError
from workers.models.configs import INDEX_FILE
from workers.models.exporting import Components, narrowed
from workers.models.families import family_of
from workers.models.weight_digests import SETTINGS_FILE
from workers.models.weights import DTYPES

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float32}


@dataclass(frozen=True, slots=True)
class ImportResult:
    """A model folder that was made.

    Attributes:
        folder: Where it is.
        num_tensors: Tensors of the denoiser.
        dtype: Type of most of them, that of the file.
    """

    folder: Path
    num_tensors: int
    dtype: str

    def to_json(self) -> dict[str, object]:
        """Returns what `sgmd import --json` prints."""
        return {**asdict(self), "folder": shared_place(self.folder)}


def import_file(
    file: str | Path, base: str | Path, output: str | Path, components: Components = "link"
) -> ImportResult:
    """Make a model folder of a denoiser in one file.

    Args:
        file: Weights in safetensors format, in the names of the original release or of ComfyUI.
        base: Model folder of the same size; its other components become the new folder's.
        output: The new folder; an existing model folder is replaced whole.
        components: Whether the other components are linked or copied.

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
    family.inspect(base_folder)
    stored = _stored_dtype(path)
    make = family.traits.exchange
    files = None if make is None else make()
    if files is None or len(files.parts) != 1:
        expected = "a family of one denoiser that other programs keep in single files"
        raise _refusal(path, f"a base of the family {family.name}", expected)
    try:
        weights = files.read_weights({files.parts[0]: path}, base_folder)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise _refusal(path, first, f"the denoiser of {base_folder}, and nothing else") from error
    _require_finite(path, weights)
    weights = narrowed(weights, _DTYPES[stored], family.traits.keep_fp32)
    with whole_folder_at(target, (SETTINGS_FILE, INDEX_FILE)) as draft:
        family.export(
            draft,
            base_folder,
            weights,
            flow_shift=read_inference_settings(base_folder).flow_shift,
            components=components,
        )
        family.inspect(draft)
    return ImportResult(target, len(weights), stored)


def _stored_dtype(path: Path) -> str:
    """The type of most tensors of a file, in the words of safetensors."""
    if kind_of_path(path) != "a file" or path.suffix != ".safetensors":
        found = kind_of_path(path) or "no such file"
        found = f"a file {path.suffix}, which is never opened" if found == "a file" else found
        raise _refusal(path, found, "a file *.safetensors; pickled weights can run code")
    try:
        with safe_open(path, framework="pt") as weights:
            names = list(weights.keys())
            types = [str(weights.get_slice(name).get_dtype()) for name in names]
    except (OSError, SafetensorError) as error:
        raise _refusal(path, f"unreadable ({error})", "a complete safetensors file") from error
    odd = [
        f"{name} in {kind}" for name, kind in zip(names, types, strict=True) if kind not in DTYPES
    ]
    if odd or not names:
        raise _refusal(path, odd[0] if odd else "no tensors", f"weights in {', '.join(DTYPES)}")
    return max(set(types), key=types.count)


def _require_finite(path: Path, weights: Mapping[str, Tensor]) -> None:
    for name, value in weights.items():
        if not torch.isfinite(value).all():
            raise _refusal(path, f"NaN or infinity in {name}", "finite weights")


def _refusal(path: Path, found: str, expected: str) -> ModelFolderError:
    return ModelFolderError(
        f"importing {path}",
        found,
        expected,
        "Give the file of a text-to-video denoiser and, with --base, a diffusers folder of the "
        "same size",
    )
