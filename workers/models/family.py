"""Tell a Wan text-to-video folder from every other model, by its configurations alone.

    model_index.json            WanPipeline, one denoiser, no boundary between experts
    COMPONENT/config.json       the class of the component, no image input, no quantization

No weight is opened and no network library is imported, so `sgmd plan` can ask before anything is
downloaded.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sgmd_core.errors import ModelFolderError

INDEX_FILE = "model_index.json"
CONFIG_FILE = "config.json"
TRANSFORMER, VAE, TEXT_ENCODER = "transformer", "vae", "text_encoder"
REMEDY = "Give a complete diffusers folder of a Wan text-to-video model with one denoiser"

_PIPELINE_CLASS = "WanPipeline"
_CLASSES = {
    TRANSFORMER: ["diffusers", "WanTransformer3DModel"],
    VAE: ["diffusers", "AutoencoderKLWan"],
    TEXT_ENCODER: ["transformers", "UMT5EncoderModel"],
}
_TOKENIZER_LIBRARY = "transformers"
_CONVERT = "https://github.com/huggingface/diffusers/blob/main/scripts/convert_wan_to_diffusers.py"
# What another kind of model is for, so that the sentence says why it cannot be distilled.
_OTHER_PIPELINES = {
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


@dataclass(frozen=True, slots=True)
class WanConfigs:
    """The configurations of a Wan text-to-video folder.

    Attributes:
        path: The folder.
        index: Content of model_index.json.
        components: Content of config.json by component.
    """

    path: Path
    index: Mapping[str, Any]
    components: Mapping[str, Mapping[str, Any]]


def read_configs(folder: str | Path) -> WanConfigs:
    """Read the configurations of a folder and refuse every model that is not supported.

    Raises:
        ModelFolderError: A file is missing or no JSON, or the folder is not a text-to-video Wan
            with one denoiser; says which kind of model it is where that is known.
    """
    path = Path(folder)
    require_supported_index(path)
    components = {name: read_component(path, name) for name in _CLASSES}
    return WanConfigs(path, read_model_json(path / INDEX_FILE), components)


def require_supported_index(folder: Path) -> None:
    """Check model_index.json: a WanPipeline of one text-to-video denoiser.

    Raises:
        ModelFolderError: It is missing, no JSON, or of another kind of model.
    """
    index = _read_index(folder)
    pipeline = index.get("_class_name")
    if pipeline != _PIPELINE_CLASS:
        kind = _OTHER_PIPELINES.get(str(pipeline))
        found = f"_class_name is {pipeline!r}" + (f": {kind}" if kind else "")
        raise _unsupported(folder, found, f"_class_name {_PIPELINE_CLASS!r}, text to video")
    _require_one_denoiser(folder, index)
    for component, expected in _CLASSES.items():
        if index.get(component) != expected:
            raise _unsupported(
                folder, f"{component} is {index.get(component)}", f"{component} to be {expected}"
            )
    tokenizer = index.get("tokenizer")
    if not (isinstance(tokenizer, list) and tokenizer[:1] == [_TOKENIZER_LIBRARY]):
        raise _unsupported(
            folder, f"tokenizer is {tokenizer}", f"a tokenizer of {_TOKENIZER_LIBRARY}"
        )


def read_component(folder: Path, component: str) -> Mapping[str, Any]:
    """Read and check the configuration of one component.

    Raises:
        ModelFolderError: It is missing, no JSON, of another class, quantized, an adapter, or takes
            an image.
    """
    part = folder / component
    config = read_model_json(part / CONFIG_FILE)
    _require_class(part, config, _CLASSES[component][1])
    if (part / "adapter_config.json").exists():
        raise ModelFolderError(
            f"reading {part}",
            "adapter_config.json: a LoRA adapter beside the weights",
            "the weights of the network alone",
            "Merge it first: WanPipeline.load_lora_weights(...), fuse_lora(), save_pretrained(...)",
        )
    for key in ("quantization_config", "transformers_weights"):
        if config.get(key) is not None:
            raise ModelFolderError(
                f"reading {part / CONFIG_FILE}",
                f"{key} = {config[key]!r}",
                "weights in float32, bfloat16 or float16 under their usual name",
                "Use the folder as it was released, before quantization",
            )
    if component == TRANSFORMER:
        _require_text_input(part, config)
    return config


def read_model_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ModelFolderError: The file is missing, or holds no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _unreadable(path, f"the file {path} is missing or unreadable ({error})") from error
    except ValueError as error:
        raise _unreadable(path, f"the file {path} is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise _unreadable(path, f"the file {path} holds a {type(content).__name__}")
    return content


def _unreadable(path: Path, found: str) -> ModelFolderError:
    return ModelFolderError(f"reading {path}", found, "a JSON object", REMEDY)


def _read_index(folder: Path) -> dict[str, Any]:
    attempted = f"loading a Wan model from {folder}"
    if not folder.is_dir():
        found = "a file" if folder.is_file() else "no such folder"
        raise ModelFolderError(attempted, found, "a diffusers folder", REMEDY)
    if not (folder / INDEX_FILE).exists() and (
        any((folder / name).exists() for name in _ORIGINAL_FILES) or (folder / CONFIG_FILE).exists()
    ):
        raise ModelFolderError(
            attempted,
            f"no {INDEX_FILE}, but files of the original release or of one component alone",
            f"{INDEX_FILE} beside the folders {', '.join(_CLASSES)}, tokenizer and scheduler",
            f"Download the repository whose name ends in -Diffusers, or convert it: {_CONVERT}",
        )
    return read_model_json(folder / INDEX_FILE)


def _require_one_denoiser(folder: Path, index: Mapping[str, Any]) -> None:
    second = index.get("transformer_2")
    reasons = [
        f"transformer_2 is {second}" * bool(isinstance(second, list) and any(second)),
        f"boundary_ratio is {index.get('boundary_ratio')}"
        * (index.get("boundary_ratio") is not None),
        "a folder transformer_2/" * (folder / "transformer_2").exists(),
    ]
    if any(reasons):
        found = ", ".join(reason for reason in reasons if reason)
        raise _unsupported(
            folder,
            f"{found}: a mixture of two denoisers, one for each range of noise (Wan2.2-A14B)",
            "one denoiser for all noise levels; two experts are not supported yet",
        )


def _require_class(part: Path, config: Mapping[str, Any], expected: str) -> None:
    # diffusers writes `_class_name`; transformers `architectures` and `model_type`.
    found = config.get("_class_name")
    if part.name == TEXT_ENCODER:
        architectures = config.get("architectures") or []
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
