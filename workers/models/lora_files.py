"""LoRA files of this and other programs: every tensor is merged or the file is refused.

    PREFIX LAYER PART        base_model.model. | transformer. | diffusion_model. | lora_unet_ | ...

    lora_A, lora_down        down (rank, in)    of LAYER.weight
    lora_B, lora_up          up (out, rank)
    alpha                    strength of the layer: alpha / rank
    lora_B.bias              change of LAYER.bias, times alpha / rank
    diff, diff_b, diff_m     whole changes of weight, bias and modulation

Loaders of other programs leave out what they do not know. A LoRA that lacks a part samples well
enough to be taken for a bad LoRA.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from sgmd_core.errors import ModelFolderError
from workers.models.lora_scales import LoraScales, read_lora_scales
from workers.models.weight_changes import DenseChange, Product, WeightChange

UNDERSCORED = "lora_unet_"
"""Prefix of Kohya's names, in which dots are underscores."""

# What programs put before a layer's name. `pipe.dit.` is DiffSynth's.
_PREFIX = re.compile(
    r"^(base_model\.model\.)?((model\.)?diffusion_model\.|transformer\.|pipe\.dit\.|unet\.)?"
)
_PART = re.compile(
    r"^(?P<layer>.+)\.(?:"
    r"(?P<down>lora_A(?:\.\w+)?\.weight|lora_down\.weight|lora\.down\.weight)|"
    r"(?P<up>lora_B(?:\.\w+)?\.weight|lora_up\.weight|lora\.up\.weight)|"
    r"(?P<up_bias>lora_B(?:\.\w+)?\.bias)|"
    r"(?P<alpha>alpha)|(?P<diff>diff)|(?P<diff_b>diff_b)|(?P<diff_m>diff_m))$"
)
_WEIGHT_OF = {"diff": "weight", "diff_b": "bias", "diff_m": "modulation"}
_MERGE_IT = "Merge it with the program that made it, save the whole model, and give that folder"
_FOR_THIS_BASE = "Give a LoRA that was trained on this base"
_ADAPTER = r"lora_|hada_|lokr_|oft_|glora|vera_"
# Kinds of files that cannot be merged: what they are, and what to do.
_REFUSED = (
    (r"lora_magnitude_vector|dora_scale", "a DoRA, which rescales the base", _MERGE_IT),
    (r"hada_|lokr_|oft_|glora|lora_mid|vera_", "an adapter of another kind than LoRA", _MERGE_IT),
    (
        r"set_weight|reshape_weight|base_layer|w_norm|b_norm",
        "weights in place of changes",
        _MERGE_IT,
    ),
    (r"^(lora_te|text_encoder)", "a change of the text encoder", _MERGE_IT),
    (
        r"^transformer_2\.",
        "the expert of the low noise levels",
        "Write each expert's tensors to a file of its own, below transformer., and name the files "
        "high_noise and low_noise",
    ),
    (
        r"_img|img_emb|image_embedder|add_[kv]_proj",
        "a part of an image-to-video model",
        "Give the LoRA of the text-to-video model",
    ),
)


@dataclass(frozen=True, slots=True)
class LoraFile:
    """Content of a LoRA's file.

    Attributes:
        path: Where it is.
        tensors: By name.
        scales: Settings beside them.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    scales: LoraScales


def is_lora(names: Collection[str]) -> bool:
    """True if a file with these tensors is a LoRA, or an adapter of another kind."""
    return any(_PART.match(name) or re.search(_ADAPTER, name) for name in names)


def read_lora(path: Path) -> LoraFile:
    """Read a LoRA's file, and the settings beside it.

    Raises:
        ModelFolderError: It cannot be read, is not a LoRA, or of a kind that cannot be merged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            header = file.metadata() or {}
            _require_lora(path, names)
            tensors = {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise _refusal(path, str(error), "a complete safetensors file", "Copy it again") from error
    for name, value in tensors.items():
        is_number = value.is_floating_point() or name.endswith(".alpha")
        if not is_number or not value.float().isfinite().all():
            found = f"{name} has {'NaN or infinity' if is_number else value.dtype}"
            raise _refusal(path, found, "finite numbers that are not quantized", "Copy it again")
    try:
        return LoraFile(path, tensors, read_lora_scales(path, header))
    except (ValueError, RecursionError) as error:
        raise _refusal(path, str(error), "settings of a LoRA", _MERGE_IT) from error


def lora_changes(
    lora: LoraFile,
    weights: Mapping[str, tuple[int, ...]],
    names: Mapping[str, str],
    strength: float,
) -> dict[str, WeightChange]:
    """Changes of a denoiser's weights, by their names there.

    Args:
        lora: The file.
        weights: Shapes of the denoiser's weights by name.
        names: Names of weights by the names that other programs give them, without a prefix.
        strength: Factor of every change.

    Raises:
        ModelFolderError: A tensor belongs to no weight of the denoiser or to half a pair, or does
            not fit; names it.
    """
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, value in lora.tensors.items():
        match = _PART.match(_PREFIX.sub("", name))
        assert match is not None, f"{name} has passed as a LoRA's"
        kind = str(match.lastgroup)
        own = parts[match["layer"]]
        if kind in own:
            raise _refusal(lora.path, f"{name} is there twice", "each part once", "Split the file")
        own[kind] = value
    found: dict[str, WeightChange] = {}
    for layer, own in parts.items():
        for end, change in _changes_of(lora, layer, own, strength).items():
            foreign = f"{layer}.{end}"
            name = names.get(foreign)
            if name is None:
                raise _refusal(
                    lora.path, f"{foreign} is of no layer of the base", "its layers", _FOR_THIS_BASE
                )
            if change.shape != weights[name]:
                shapes = f"{foreign} is {change.shape}, where the base has {weights[name]}"
                raise _refusal(lora.path, shapes, "a change of this base's size", _FOR_THIS_BASE)
            if name in found:
                twice = f"{name} is changed twice"
                raise _refusal(lora.path, twice, "one change a weight", "Split the file")
            found[name] = change
    return found


def _changes_of(
    lora: LoraFile, layer: str, own: Mapping[str, Tensor], strength: float
) -> dict[str, WeightChange]:
    """Changes of one layer by `weight`, `bias` and `modulation`."""
    found: dict[str, WeightChange] = {
        _WEIGHT_OF[kind]: DenseChange(own[kind], strength) for kind in own.keys() & _WEIGHT_OF
    }
    rest = own.keys() - _WEIGHT_OF.keys()
    if not rest:
        return found
    if not {"down", "up"} <= rest:
        has = ", ".join(sorted(rest))
        raise _refusal(
            lora.path,
            f"{layer} has {has} without the other half of its pair",
            "lora_A and lora_B, or lora_down and lora_up",
            "Download or save the file again",
        )
    down, up = own["down"], own["up"]
    rank = down.shape[0]
    if down.ndim < 2 or down.ndim != up.ndim or up[0].numel() != rank:
        shapes = f"{layer} has {tuple(up.shape)} x {tuple(down.shape)}"
        raise _refusal(lora.path, shapes, "(out, rank) x (rank, in)", _MERGE_IT)
    try:
        alpha = float(own["alpha"]) if "alpha" in own else None
        scale = strength * lora.scales.scale(layer, rank, alpha)
    except (ValueError, RuntimeError, re.error) as error:
        raise _refusal(
            lora.path,
            str(error),
            "one strength a layer",
            "Correct the one that is wrong, in the file or in its settings",
        ) from error
    if "weight" in found or ("bias" in found and "up_bias" in own):
        raise _refusal(
            lora.path, f"{layer} has a LoRA and a difference", "one of them", "Split the file"
        )
    found["weight"] = Product(up, down, scale)
    if "up_bias" in own:
        found["bias"] = DenseChange(own["up_bias"], scale)
    return found


def _require_lora(path: Path, names: list[str]) -> None:
    """Refuses a file of which a tensor is not part of a LoRA."""
    bare = {name: _PREFIX.sub("", name) for name in names}
    for pattern, kind, remedy in _REFUSED:
        odd = [name for name in names if re.search(pattern, bare[name])]
        if odd:
            raise _refusal(path, f"{odd[0]}: {kind}", "a LoRA of the denoiser alone", remedy)
    others = [name for name in names if not _PART.match(bare[name])]
    if others or not names:
        found = f"{others[0]} belongs to no LoRA" if others else "there is nothing in it"
        raise _refusal(
            path,
            found,
            "matrices lora_A and lora_B (or lora_down and lora_up), alpha, diff",
            "Give a LoRA's file; a whole network is made a model folder by `sgmd import`",
        )


def _refusal(path: Path, found: str, expected: str, remedy: str) -> ModelFolderError:
    return ModelFolderError(f"reading the LoRA {path}", found, expected, remedy)
