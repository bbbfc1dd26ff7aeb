"""Checks that recognise a Wan folder by its configurations alone.

    model_index.json            WanPipeline, one denoiser, no boundary between experts
    COMPONENT/config.json       the class of the component, no image input, no quantization

No weight file is opened: `wan_folder` checks those.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sgmd_core.errors import ModelFolderError
from workers.models.addresses import missing_folder
from workers.models.configs import (
    CONFIG_FILE,
    INDEX_FILE,
    read_model_json,
    require_plain_weights,
)
from workers.models.folder import (
    ClipGeometry,
    FolderLayout,
    geometry_as_released,
    one_denoiser_layout,
    require_class,
)
from workers.models.weights import DIFFUSERS_STEM, lacks_weights

WAN = "wan"
TRANSFORMER, VAE, TEXT_ENCODER = "transformer", "vae", "text_encoder"
TOKENIZER = "tokenizer"
LOW_NOISE = "transformer_2"
"""Expert of the low noise levels, where `transformer` is that of the high ones."""
REMEDY = "Give a complete diffusers folder of a Wan text-to-video model"
_PIPELINE_CLASS = "WanPipeline"
TRANSITION_CLASS = "WanTransitionPipeline"
"""Of folders with a flow head, which no pipeline of diffusers samples."""
_CLASSES = {
    TRANSFORMER: ["diffusers", "WanTransformer3DModel"],
    VAE: ["diffusers", "AutoencoderKLWan"],
    TEXT_ENCODER: ["transformers", "UMT5EncoderModel"],
}
TRANSITION_CLASSES = {TRANSFORMER: ["workers", "WanTransitionBackbone"]}
"""Of the index of a folder with a flow head. `WanPipeline` looks at neither the class of a pipeline
nor a component more, but it cannot make one of this class: it would sample the backbone alone."""
_TOKENIZER_LIBRARY = "transformers"
# What another kind of model is for, so that the sentence says why it cannot be distilled.
OTHER_PIPELINES = {
    "WanImageToVideoPipeline": "an image-to-video model",
    "WanVACEPipeline": "a VACE model, which edits given videos",
    "WanVideoToVideoPipeline": "a video-to-video pipeline",
    "WanAnimatePipeline": "an animation model, which takes an image and a motion",
    "WanSpeechToVideoPipeline": "a speech-to-video model",
}
# Keys of transformer/config.json that only models with an image input set.
_IMAGE_KEYS = ("image_dim", "added_kv_proj_dim", "pos_embed_seq_len")
# Files of the original release, which is laid out in another way.
_ORIGINAL_FILES = ("Wan2.1_VAE.pth", "Wan2.2_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth")
LAYOUT = one_denoiser_layout(_PIPELINE_CLASS, _CLASSES[TRANSFORMER][1])
EXPERTS_LAYOUT = replace(
    LAYOUT, experts=(LOW_NOISE,), weights={**LAYOUT.weights, LOW_NOISE: DIFFUSERS_STEM}
)
"""Wan 2.2 A14B: two denoisers, each for a range of noise levels."""


SAMPLED_PX = 16
"""Sides of clips are multiples of it in WanPipeline, whatever the networks take."""
WAN_GEOMETRY = ClipGeometry(16, temporal_factor=4, spatial_factor=8, patch_size=(1, 2, 2))
# The autoencoder of Wan 2.2's 5B packs 2 x 2 pixels into channels before it halves three times.
WIDE_STRIDE_GEOMETRY = replace(WAN_GEOMETRY, latent_channels=48, spatial_factor=16)


@dataclass(frozen=True, slots=True)
class WanConfigs:
    """The configurations of a Wan text-to-video folder.

    Attributes:
        path: The folder.
        index: Content of model_index.json.
        components: Content of config.json by component; without those that were left out.
    """

    path: Path
    index: Mapping[str, Any]
    components: Mapping[str, Mapping[str, Any]]


def read_configs(folder: str | Path, layout: FolderLayout = LAYOUT) -> WanConfigs:
    """Read the configurations of a folder and refuse every model that is not supported.

    Raises:
        ModelFolderError: A file is missing or no JSON, or the folder is not a text-to-video Wan
            with these denoisers; says which kind of model it is where that is known.
    """
    path = Path(folder)
    require_supported_index(path, layout)
    components = {
        name: read_component(path, name)
        for name in layout.weights
        if name in EXPERTS_LAYOUT.weights
        # Where all embeddings are stored, or nothing is decoded, nobody needs them.
        and not (name in LAYOUT.dispensable and lacks_weights(path / name))
    }
    require_alike(path, [components[name] for name in layout.denoisers if name in components])
    return WanConfigs(path, read_model_json(path / INDEX_FILE), components)


def require_supported_index(folder: Path, layout: FolderLayout = LAYOUT) -> None:
    """Check model_index.json: a WanPipeline of the denoisers that a layout has.

    Raises:
        ModelFolderError: It is missing, no JSON, or of another kind of model.
    """
    index = require_wan_index(folder)
    if index.get("_class_name") != layout.pipeline_class:
        found = f"_class_name is {index.get('_class_name')!r}"
        raise _unsupported(folder, found, f"_class_name {layout.pipeline_class!r}")
    if LOW_NOISE in layout.experts:
        read_boundary(folder)
    else:
        _require_one_denoiser(folder, index)


def require_wan_index(folder: Path) -> Mapping[str, Any]:
    """Check model_index.json: a WanPipeline of denoisers that take text; return its content.

    Raises:
        ModelFolderError: It is missing, no JSON, or of another kind of model, or a denoiser takes
            an image or a video besides the text.
    """
    index = _read_index(folder)
    pipeline = index.get("_class_name")
    if pipeline not in (_PIPELINE_CLASS, TRANSITION_CLASS):
        kind = OTHER_PIPELINES.get(str(pipeline))
        found = f"_class_name is {pipeline!r}" + (f": {kind}" if kind else "")
        raise _unsupported(folder, found, f"_class_name {_PIPELINE_CLASS!r}, text to video")
    classes = _CLASSES if pipeline == _PIPELINE_CLASS else _CLASSES | TRANSITION_CLASSES
    for component, expected in classes.items():
        require_class(folder, index, component, expected, LAYOUT, REMEDY)
    tokenizer = index.get("tokenizer")
    if not (isinstance(tokenizer, list) and tokenizer[:1] == [_TOKENIZER_LIBRARY]):
        raise _unsupported(
            folder, f"tokenizer is {tokenizer}", f"a tokenizer of {_TOKENIZER_LIBRARY}"
        )
    for part in (folder / TRANSFORMER, folder / LOW_NOISE):
        if (part / CONFIG_FILE).is_file():
            _require_text_input(part, read_model_json(part / CONFIG_FILE))
    return index


def read_boundary(folder: Path) -> float:
    """Read the noise level at which a folder of two experts changes from one to the other.

    Raises:
        ModelFolderError: The folder does not have two experts, or no noise level between them.
    """
    index = require_wan_index(folder)
    second, boundary = index.get(LOW_NOISE), index.get("boundary_ratio")
    if second != _CLASSES[TRANSFORMER]:
        expected = f"{LOW_NOISE} to be {_CLASSES[TRANSFORMER]}"
        raise _unsupported(
            folder, f"{LOW_NOISE} is {second} beside a folder {LOW_NOISE}/", expected
        )
    if not isinstance(boundary, int | float) or not 0 < boundary < 1:
        raise _unsupported(
            folder,
            f"{LOW_NOISE} and a boundary_ratio of {boundary}",
            "boundary_ratio above 0 and below 1, where the experts change",
        )
    return float(boundary)


def require_alike(folder: Path, denoisers: Sequence[Mapping[str, Any]]) -> None:
    """Check that experts are networks of one shape.

    Raises:
        ModelFolderError: A number of their configurations differs; names it.
    """
    first = denoisers[0]
    for other in denoisers[1:]:
        for key in sorted({*first, *other}):
            values = first.get(key), other.get(key)
            if values[0] != values[1] and not key.startswith("_"):
                raise ModelFolderError(
                    f"reading {folder}",
                    f"{key} is {values[0]} in {TRANSFORMER} and {values[1]} in {LOW_NOISE}",
                    "two experts of one shape",
                    REMEDY,
                )


def read_component(folder: Path, component: str) -> Mapping[str, Any]:
    """Read and check the configuration of one component.

    Raises:
        ModelFolderError: It is missing, no JSON, of another class, quantized, an adapter, or takes
            an image.
    """
    part = folder / component
    config = read_model_json(part / CONFIG_FILE)
    denoiser = component in EXPERTS_LAYOUT.denoisers
    _require_class(part, config, _CLASSES[TRANSFORMER if denoiser else component][1])
    require_plain_weights(part, config)
    if denoiser:
        _require_text_input(part, config)
    return config


def _read_index(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise missing_folder(folder, _loading(folder), REMEDY)
    original = None if (folder / INDEX_FILE).exists() else refuse_original_release(folder)
    if original is not None:
        raise original
    return read_model_json(folder / INDEX_FILE)


def refuse_original_release(folder: Path) -> ModelFolderError | None:
    """Refusal of a folder of the original release, or of one component; None for others."""
    if not any((folder / name).exists() for name in (*_ORIGINAL_FILES, CONFIG_FILE)):
        return None
    return ModelFolderError(
        _loading(folder),
        f"no {INDEX_FILE}, but files of the original release or of one component alone",
        f"{INDEX_FILE} beside the folders {', '.join(_CLASSES)}, tokenizer and scheduler",
        "Download the repository whose name ends in -Diffusers, or take the denoiser's file into "
        "a copy of that: sgmd import FILE DST --base FOLDER",
    )


def _loading(folder: Path) -> str:
    return f"loading a Wan model from {folder}"


def _require_one_denoiser(folder: Path, index: Mapping[str, Any]) -> None:
    second = index.get(LOW_NOISE)
    reasons = [
        f"{LOW_NOISE} is {second}" * bool(isinstance(second, list) and any(second)),
        f"boundary_ratio is {index.get('boundary_ratio')}"
        * (index.get("boundary_ratio") is not None),
        f"a folder {LOW_NOISE}/" * (folder / LOW_NOISE).exists(),
    ]
    if any(reasons):
        found = ", ".join(reason for reason in reasons if reason)
        raise _unsupported(
            folder,
            f"{found}: a mixture of two denoisers, one for each range of noise (Wan2.2-A14B)",
            f"one denoiser for all noise levels, or {LOW_NOISE}, its folder and boundary_ratio",
        )


def _require_class(part: Path, config: Mapping[str, Any], expected: str) -> None:
    # diffusers writes `_class_name`; transformers `architectures` and `model_type`.
    found = config.get("_class_name")
    if part.name == TEXT_ENCODER:
        named = config.get("architectures") or []
        architectures = named if isinstance(named, list) else [named]
        found = expected if config.get("model_type") == "umt5" else config.get("model_type")
        if architectures and not all(str(name).startswith("UMT5") for name in architectures):
            found = ", ".join(map(str, architectures))
    if found != expected:
        raise ModelFolderError(
            f"reading {part / CONFIG_FILE}", f"a {found}", f"a {expected}", REMEDY
        )


def _require_text_input(part: Path, config: Mapping[str, Any]) -> None:
    given = [f"{key} = {config[key]}" for key in _IMAGE_KEYS if config.get(key) is not None]
    channels = config.get("in_channels", 16), config.get("out_channels", 16)
    if channels[0] != channels[1]:
        given.append(f"in_channels = {channels[0]} and out_channels = {channels[1]}")
    if given:
        raise ModelFolderError(
            f"reading {part / CONFIG_FILE}",
            f"{', '.join(given)}: a denoiser that takes an image or a video besides the text",
            "a text-to-video denoiser",
            "Give the text-to-video model of the same size",
        )


def _unsupported(folder: Path, found: str, expected: str) -> ModelFolderError:
    return ModelFolderError(f"reading {folder / INDEX_FILE}", found, expected, REMEDY)


def wan_geometry(folder: Path, channels: int, patch_size: tuple[int, int, int]) -> ClipGeometry:
    """Sizes of latents of a Wan folder without a configuration of its autoencoder.

    Raises:
        ModelFolderError: No released Wan has so many channels.
    """
    released = (WAN_GEOMETRY, WIDE_STRIDE_GEOMETRY)
    found = geometry_as_released(folder, VAE, channels, patch_size, released)
    return replace(found, sampled_px=SAMPLED_PX)
