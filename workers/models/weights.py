"""Compare the weight files of a component with its network, by their headers alone.

    files that are loaded -> names, shapes, dtypes -> those of the network, or the difference

A header holds the name, shape and dtype of every tensor, and safetensors checks that the file is as
long as its header says, so that no value is read. Other weight files in the folder (second dtypes,
pickles, adapters) are never opened.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from safetensors import SafetensorError, safe_open

from sgmd_core.errors import ModelFolderError
from workers.models.configs import REMEDY, read_model_json

DTYPES = ("F32", "BF16", "F16", "F64")
"""Types of weights that can be trained on or computed with, in the words of safetensors."""

DIFFUSERS_STEM = "diffusion_pytorch_model"
TRANSFORMERS_STEM = "model"
"""Names under which the two libraries look for weight files, without suffix."""

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".gguf", ".msgpack")
_LFS_MARK = b"version https://git-lfs"
_MAX_NAMED = 4
_MAX_CHARS = 200


@dataclass(frozen=True, slots=True)
class ForeignNames:
    """Names of tensors that another program writes.

    Attributes:
        pattern: Regular expression that matches at least one of them.
        kind: What such a file is.
        remedy: What makes it a component of a model folder; `{convert}` is the network's own way.
    """

    pattern: str
    kind: str
    remedy: str


SCALED_NAMES = ForeignNames(
    r"scaled_fp8|comfy_quant|\.(scale_weight|scale_input|weight_scale|input_scale)$",
    "scaled weights in 8 bits",
    "Give the file of a denoiser to sgmd import FILE DST --base FOLDER; of other components, use "
    "the weights in bfloat16, float16 or float32",
)
"""Names beside weights that are a number in 8 bits times a scale, as ComfyUI's fp8_scaled files."""

_FOREIGN_NAMES = (
    ForeignNames(
        r"lora_|\.lora|hada_|lokr_",
        "a LoRA file, which holds changes of weights and no network",
        "Merge it: sgmd import FILE DST --base FOLDER",
    ),
    SCALED_NAMES,
    ForeignNames(r"^(model\.)?diffusion_model\.", "the names of ComfyUI", "Convert it: {convert}"),
)
_WRAPPED_NAMES = ForeignNames(
    r"^(module|_orig_mod|transformer|model|vae|text_encoder)\.",
    "the names of a network inside a wrapper",
    "Save the network itself with save_pretrained(FOLDER)",
)


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a header.

    Attributes:
        shape: Sizes of the axes.
        dtype: In the words of safetensors.
    """

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Architecture:
    """The tensors of a network that a component must bring.

    Attributes:
        stem: Name of the weight files without suffix.
        shapes: Shapes by name, of parameters and of buffers that are stored.
        aliases: Groups of names of one tensor, of which a file must hold at least one.
        ignored: Patterns of names that the network leaves out without a loss.
        convert: Command that makes a component of a single file of another program.
        foreign: Names that other programs give to the tensors of this network.
    """

    stem: str
    shapes: Mapping[str, tuple[int, ...]]
    aliases: tuple[tuple[str, ...], ...] = ()
    ignored: tuple[str, ...] = ()
    convert: str = "save it with save_pretrained(FOLDER)"
    foreign: tuple[ForeignNames, ...] = ()

    @property
    def num_parameters(self) -> int:
        """Parameters, each counted once whatever the number of its names."""
        seconds = {name for group in self.aliases for name in group[1:]}
        return sum(prod(shape) for name, shape in self.shapes.items() if name not in seconds)

    def ignores(self, name: str) -> bool:
        """Returns True if a tensor of a file can be left out without a loss."""
        return any(re.search(pattern, name) for pattern in self.ignored)

    def explain(self, names: Collection[str]) -> ForeignNames | None:
        """Kind of a file whose tensors have other names, and its remedy; None if unknown."""
        for each in (*_FOREIGN_NAMES, *self.foreign, _WRAPPED_NAMES):
            if any(re.search(each.pattern, name) for name in names):
                return replace(each, remedy=each.remedy.format(convert=self.convert))
        return None


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """Weight files of a component.

    Attributes:
        used: Files that are loaded, in order.
        unused: Weight files beside them that are never opened.
    """

    used: tuple[Path, ...]
    unused: tuple[Path, ...]


def lacks_weights(part: Path) -> bool:
    """True if nothing of a component's weights is there: no file of any kind, and no index."""
    return not part.is_dir() or not any(
        path.suffix in _WEIGHT_SUFFIXES or path.name.endswith(".index.json")
        for path in part.iterdir()
    )


def find_weights(
    part: Path, stem: str, explain: Callable[[Collection[str]], ForeignNames | None] | None = None
) -> WeightFiles:
    """Find the files that diffusers or transformers would load from a component's folder.

    Args:
        part: Folder of the component.
        stem: Name of the weight files without suffix: that of diffusers or of transformers.
        explain: Kind of a file with foreign names of tensors, for the error.

    Raises:
        ModelFolderError: There are none in safetensors format under the name that is loaded, or a
            shard is missing.
    """
    whole, index = part / f"{stem}.safetensors", part / f"{stem}.safetensors.index.json"
    # Where both are there, transformers takes the single file and diffusers the index.
    if index.is_file() and not (stem == TRANSFORMERS_STEM and whole.is_file()):
        used = tuple(_shards(part, index))
    elif whole.is_file():
        used = (whole,)
    else:
        raise _no_weights(part, whole, explain)
    others = (path for path in sorted(part.iterdir()) if path.suffix in _WEIGHT_SUFFIXES)
    return WeightFiles(used, tuple(path for path in others if path not in used))


def check_weights(part: Path, architecture: Architecture) -> WeightFiles:
    """Check that a component's weights are those of its network, reading headers alone.

    Raises:
        ModelFolderError: A file or a tensor is missing, torn, unexpected or of another shape or
            dtype; says what converts it where that is known.
    """
    files = find_weights(part, architecture.stem, architecture.explain)
    found = _entries(part, files.used)
    expected = architecture.shapes
    unexpected = [name for name in found if name not in expected and not architecture.ignores(name)]
    missing = _missing(found, architecture)
    _require_names(part, files.used, missing, unexpected, architecture)
    wrong_dtype = [name for name in expected if name in found and found[name].dtype not in DTYPES]
    if wrong_dtype:
        raise _refusal(
            part,
            f"{_named(f'{name} in {found[name].dtype}' for name in wrong_dtype)}",
            f"weights in {', '.join(DTYPES)}",
            "Use weights that are not quantized",
        )
    wrong = [name for name in expected if name in found and found[name].shape != expected[name]]
    if wrong:
        shapes = (f"{name} is {found[name].shape}, not {expected[name]}" for name in wrong)
        raise _refusal(
            part,
            f"{len(wrong)} of {len(expected)} tensors have another shape than config.json says: "
            f"{_named(shapes)}",
            "weights and config.json of one network",
            "Copy both again from the same model",
        )
    return files


def _shards(part: Path, index: Path) -> Iterator[Path]:
    mapping = read_model_json(index).get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise _refusal(part, f"{index.name} has no weight_map", "the index of the shards", REMEDY)
    names = sorted({str(name) for name in mapping.values()})
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise _refusal(
            part,
            f"{index.name} names {_named(outside)}",
            "files in the same folder",
            "Download the folder again",
        )
    missing = [name for name in names if not _is_file(part / name)]
    if missing:
        raise _refusal(
            part,
            f"{len(missing)} of {len(names)} shards are missing: {_named(missing)}",
            f"every file that {index.name} names",
            "Download the missing files",
        )
    stored = {name: set(_header(part / name)) for name in names}
    lost = [key for key, name in mapping.items() if key not in stored[str(name)]]
    if lost:
        raise _refusal(
            part,
            f"{index.name} names {_named(lost)}, not found in the shards",
            "an index and shards that belong together",
            "Download the folder again",
        )
    yield from (part / name for name in names)


def _is_file(path: Path) -> bool:
    """As `Path.is_file`, also of a name that no disk takes."""
    try:
        return path.is_file()
    except OSError:
        return False


def _no_weights(
    part: Path, whole: Path, explain: Callable[[Collection[str]], ForeignNames | None] | None
) -> ModelFolderError:
    """Say which weights there are instead of those that would be loaded."""
    others = sorted(path for path in part.iterdir() if path.suffix in _WEIGHT_SUFFIXES)
    safe = [path for path in others if path.suffix == ".safetensors"]
    expected = f"{whole.name}, or its shards with {whole.name}.index.json"
    if not safe:
        pickled = f" ({_named(path.name for path in others)} is never opened)" if others else ""
        return _refusal(
            part,
            f"no weights: no *.safetensors file in {part}{pickled}",
            f"{expected}; pickled weights can run code and are refused",
            "Download the safetensors files, or load the model where you trust it and save it "
            "with save_pretrained(FOLDER, safe_serialization=True)",
        )
    found = f"{_named(path.name for path in safe)} instead of {whole.name}"
    hint = explain(_header(safe[0])) if explain is not None else None
    if hint is not None:
        return _refusal(part, f"{found}: {hint.kind}", expected, hint.remedy)
    variant = f"{whole.stem}."
    if len(safe) == 1 and safe[0].name.startswith(variant):
        return _refusal(part, f"{found}: a variant alone", expected, f"Rename it to {whole.name}")
    return _refusal(part, found, expected, REMEDY)


def _entries(part: Path, files: tuple[Path, ...]) -> dict[str, Entry]:
    """Tensors of all files; a name in two of them is refused."""
    found: dict[str, Entry] = {}
    for file in files:
        header = _header(file)
        twice = [name for name in header if name in found]
        if twice:
            raise _refusal(
                part,
                f"{_named(twice)} in more than one file",
                "each tensor in one shard",
                "Download the folder again",
            )
        found |= header
    return found


def _header(file: Path) -> dict[str, Entry]:
    try:
        with safe_open(file, framework="pt") as weights:
            views = {name: weights.get_slice(name) for name in weights.keys()}  # noqa: SIM118
            return {
                name: Entry(tuple(view.get_shape()), str(view.get_dtype()))
                for name, view in views.items()
            }
    except (OSError, SafetensorError) as error:
        if _is_pointer(file):
            raise ModelFolderError(
                f"reading the header of {file}",
                "a pointer of Git LFS in place of the file",
                "a complete safetensors file",
                "Fetch it: git lfs pull, or download the model with hf download",
            ) from error
        if file.is_symlink() and not file.exists():
            raise ModelFolderError(
                f"reading the header of {file}",
                f"a link to {file.readlink()}, which is not there",
                "the file that it leads to",
                "Download the model again: its cache was cleared, or copied without the files",
            ) from error
        raise ModelFolderError(
            f"reading the header of {file}",
            f"{type(error).__name__}: {error}",
            "a complete safetensors file",
            "Copy the file again; it is probably cut short",
        ) from error


def _is_pointer(file: Path) -> bool:
    try:
        with file.open("rb") as opened:
            return opened.read(len(_LFS_MARK)) == _LFS_MARK
    except OSError:
        return False


def _missing(found: Collection[str], architecture: Architecture) -> list[str]:
    brought = {
        name for group in architecture.aliases if any(n in found for n in group) for name in group
    }
    return [name for name in architecture.shapes if name not in found and name not in brought]


def _require_names(
    part: Path,
    files: tuple[Path, ...],
    missing: list[str],
    unexpected: list[str],
    architecture: Architecture,
) -> None:
    if not missing and not unexpected:
        return
    problems = []
    if missing:
        problems.append(f"{len(missing)} tensors are missing ({_named(missing)})")
    if unexpected:
        problems.append(f"{len(unexpected)} are not in the network ({_named(unexpected)})")
    what = f"{_named(file.name for file in files)}: {' and '.join(problems)}"
    hint = architecture.explain(unexpected)
    if hint is not None:
        expected = "weights as diffusers saves them"
        raise _refusal(part, f"{what}; they are {hint.kind}", expected, hint.remedy)
    raise _refusal(
        part,
        what,
        "exactly the tensors of the network that config.json describes",
        "Copy weights and config.json again from the same model",
    )


def _named(names: Iterable[str]) -> str:
    shown = [name if len(name) <= _MAX_CHARS else name[:_MAX_CHARS] + "..." for name in names]
    more = len(shown) - _MAX_NAMED
    return ", ".join(shown[:_MAX_NAMED]) + (f" and {more} more" if more > 0 else "")


def _refusal(part: Path, found: str, expected: str, remedy: str) -> ModelFolderError:
    return ModelFolderError(f"checking the weights of {part}", found, expected, remedy)
