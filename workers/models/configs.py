"""JSON files of a model folder."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sgmd_core.errors import ModelFolderError

INDEX_FILE = "model_index.json"
CONFIG_FILE = "config.json"
REMEDY = "Give a complete diffusers folder of a supported text-to-video model"


def read_model_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ModelFolderError: The file is missing, or holds no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _unreadable(path, f"the file {path} is missing or unreadable ({error})") from error
    except (ValueError, RecursionError) as error:
        raise _unreadable(path, f"the file {path} is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise _unreadable(path, f"the file {path} holds a {type(content).__name__}")
    return content


def _unreadable(path: Path, found: str) -> ModelFolderError:
    return ModelFolderError(f"reading {path}", found, "a JSON object", REMEDY)


def require_plain_weights(part: Path, config: Mapping[str, Any]) -> None:
    """Check that a component holds the weights of its network, and those alone.

    Raises:
        ModelFolderError: An adapter lies beside them, or they are quantized.
    """
    if (part / "adapter_config.json").exists():
        raise ModelFolderError(
            f"reading {part}",
            "adapter_config.json: a LoRA adapter beside the weights",
            "the weights of the network alone",
            "Merge it first: load_lora_weights(...), fuse_lora(), save_pretrained(...)",
        )
    for key in ("quantization_config", "transformers_weights"):
        if config.get(key) is not None:
            raise ModelFolderError(
                f"reading {part / CONFIG_FILE}",
                f"{key} = {config[key]!r}",
                "weights in float32, bfloat16 or float16 under their usual name",
                "Use the folder as it was released, before quantization",
            )
