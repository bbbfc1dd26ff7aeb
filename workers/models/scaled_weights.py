"""Files of weights in 8 bits, as ComfyUI keeps them, read as the numbers that they stand for.

    LAYER.weight                        float8 (e4m3fn or e5m2)
    LAYER.scale_weight, .weight_scale   weight = float8 * scale, one of them or one per row or
                                        block of a row
    LAYER.scale_input, .input_scale     of activations in 8 bits: no part of the weight
    scaled_fp8, LAYER.comfy_quant       which layers are kept so; newer files say it in their header

A layer without a scale is what its numbers say, in a file of which no layer has one. Whatever else
is found is refused by its name, before a value is read.
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from sgmd_core.errors import ModelFolderError
from workers.models.weights import DTYPES, SCALED_NAMES

FLOAT8 = ("F8_E4M3", "F8_E5M2")
"""Types of 8 bits that are read, in the words of safetensors."""

_FORMATS = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
# The second says how a layer is multiplied, not what its numbers are.
_KEYS_OF_FORMATS = {"format", "full_precision_matrix_mult"}
_HEADER_KEY = "_quantization_metadata"
_SCALE = re.compile(r"\.(scale_weight|weight_scale)$")
_FORMAT = re.compile(r"\.comfy_quant$")
_BESIDE = re.compile(
    r"(^|\.)scaled_fp8$|\.(scale_weight|weight_scale|scale_input|input_scale|comfy_quant)$"
)
_REMEDY = "Give the file of the same model in bf16 or fp16, or with one scale a weight (fp8_scaled)"


def is_in_8_bits(types: Mapping[str, str]) -> bool:
    """True if a file, given the types of its tensors by name, has weights in 8 bits or scales."""
    return any(
        kind in FLOAT8 or re.search(SCALED_NAMES.pattern, name) for name, kind in types.items()
    )


def is_beside_weights(name: str) -> bool:
    """True if a tensor of such a file is about weights, and none itself."""
    return _BESIDE.search(name) is not None


@dataclass(frozen=True, slots=True)
class ScaledFile:
    """A file of weights in 8 bits that has been understood.

    Attributes:
        path: Where it is.
        weights: Names of its weights.
        scales: Name of the scale of a weight, by that of the weight.
    """

    path: Path
    weights: tuple[str, ...]
    scales: Mapping[str, str]

    def read(self) -> dict[str, Tensor]:
        """Weights in float32, by name.

        A product is rounded once, to float32: 4 bits of the number and 24 of its scale.

        Raises:
            ModelFolderError: A scale is not a positive number.
        """
        with safe_open(self.path, framework="pt") as file:
            return {name: self._weight(file, name) for name in self.weights}

    def _weight(self, file: Any, name: str) -> Tensor:  # noqa: ANN401  (safetensors' handle)
        weight = file.get_tensor(name).float()
        beside = self.scales.get(name)
        if beside is None:
            return weight
        scale = file.get_tensor(beside).float()
        if not (scale.isfinite() & (scale > 0)).all():
            wrong = scale[~(scale.isfinite() & (scale > 0))][0]
            raise _refusal(self.path, f"{beside} has {wrong:g}", "finite scales above 0")
        if scale.numel() == 1:
            return weight * scale.reshape(())
        blocks = scale.reshape(len(weight), -1, 1)
        return (weight.reshape(len(weight), blocks.shape[1], -1) * blocks).reshape(weight.shape)


def open_scaled(path: Path) -> ScaledFile | None:
    """Understand a file of weights in 8 bits by its header; None: all of its weights are in more.

    Raises:
        ModelFolderError: It is in 8 bits in a way that is not read; names the tensor.
    """
    try:
        with safe_open(path, framework="pt") as file:
            views = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            types = {name: str(view.get_dtype()) for name, view in views.items()}
            shapes = {name: tuple(view.get_shape()) for name, view in views.items()}
            if not is_in_8_bits(types):
                return None
            markers = {
                name: file.get_tensor(name)
                for name in types
                if _FORMAT.search(name) and types[name] == "U8"
            }
            header = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise _refusal(path, str(error), "a complete safetensors file", "Copy it again") from error
    formats = [*_formats_of(path, header), *_formats_in(path, markers)]
    _require_formats(path, types, formats)
    _require_types(path, types)
    scales = _scales(path, types, shapes)
    weights = tuple(name for name in types if not is_beside_weights(name))
    bare = [name for name in weights if types[name] in FLOAT8 and name not in scales]
    if bare and (formats or len(weights) < len(types)):
        raise _refusal(path, f"{bare[0]} in {types[bare[0]]} without a scale", "a scale for each")
    return ScaledFile(path, weights, scales)


def _require_types(path: Path, types: Mapping[str, str]) -> None:
    """Refuses a weight, a scale or a format in a type that is not read."""
    for name, kind in types.items():
        read = (*DTYPES, *FLOAT8)
        if is_beside_weights(name):
            read = DTYPES if _SCALE.search(name) else ("U8",) if _FORMAT.search(name) else (kind,)
        if kind not in read:
            raise _refusal(path, f"{name} in {kind}", ", ".join(read))


def _formats_of(path: Path, header: Mapping[str, str]) -> Iterator[tuple[str, object]]:
    """Layers and their formats as the header of a newer file has them."""
    text = header.get(_HEADER_KEY)
    if text is None:
        return
    found = _parsed(path, _HEADER_KEY, text)
    layers = found.get("layers")
    if not isinstance(layers, dict):
        raise _refusal(path, f"{_HEADER_KEY} without layers in its header", "formats by layer")
    yield from layers.items()


def _formats_in(path: Path, markers: Mapping[str, Tensor]) -> Iterator[tuple[str, object]]:
    """Layers and their formats as tensors beside the weights have them, in bytes of JSON."""
    for name, value in markers.items():
        yield name.removesuffix(".comfy_quant"), _parsed(path, name, bytes(value.tolist()))


def _parsed(path: Path, name: str, text: str | bytes) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _refusal(path, f"{name} is not JSON", "formats by layer") from error
    if not isinstance(found, dict):
        raise _refusal(path, f"{name} is a {type(found).__name__}", "formats by layer")
    return found


def _require_formats(
    path: Path, types: Mapping[str, str], formats: Collection[tuple[str, object]]
) -> None:
    """Refuses a layer in a format that is not read, or whose weight is of another type."""
    for layer, stated in formats:
        kind = stated.get("format") if isinstance(stated, dict) else stated
        if isinstance(stated, dict) and (others := stated.keys() - _KEYS_OF_FORMATS):
            raise _refusal(path, f"{layer} with {min(others)} in its format", "a format alone")
        wanted = _FORMATS.get(str(kind))
        if wanted is None:
            raise _refusal(path, f"{layer} in the format {kind}", " or ".join(_FORMATS))
        # Some programs leave the prefix of all names out.
        own = [types[name] for name in types if f".{name}".endswith(f".{layer}.weight")]
        if set(own) != {wanted}:
            found = f"{layer} with {own[0] if own else 'no weight'}, where its format is {kind}"
            raise _refusal(path, found, f"a weight in {wanted}")


def _scales(
    path: Path,
    types: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, str]:
    """Name of the scale of each weight that has one."""
    found: dict[str, str] = {}
    for name in (each for each in types if _SCALE.search(each)):
        weight = _SCALE.sub(".weight", name)
        if types.get(weight) not in FLOAT8:
            beside = f"a weight in {types[weight]}" if weight in types else "no weight"
            raise _refusal(path, f"{name} beside {beside}", "scales of weights in 8 bits")
        if weight in found:
            raise _refusal(path, f"{found[weight]} and {name}", "one of them")
        if not _fits(shapes[name], shapes[weight]):
            sizes = f"{name} is {shapes[name]} beside a weight of {shapes[weight]}"
            raise _refusal(path, sizes, "one scale, or one a row, (out, 1) or (out, blocks, 1)")
        found[weight] = name
    return found


def _fits(scale: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    """True if a scale says without doubt which numbers it is of."""
    if scale in ((), (1,), (1, 1)):
        return True
    if len(weight) != 2 or scale[0] != weight[0] or scale[-1] != 1 or len(scale) not in (2, 3):
        return False
    return len(scale) == 2 or (scale[1] > 0 and weight[1] % scale[1] == 0)


def _refusal(path: Path, found: str, expected: str, remedy: str = _REMEDY) -> ModelFolderError:
    return ModelFolderError(f"reading the weights in 8 bits of {path}", found, expected, remedy)
