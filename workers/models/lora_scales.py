"""Strength of each layer of a LoRA, as peft's settings beside its matrices state it.

    adapter_config.json                       peft, beside adapter_model.safetensors
    `lora_adapter_metadata` in the header     diffusers

    scale = alpha / rank                      use_rslora: alpha / sqrt(rank)

Without settings alpha is the rank: the scale is 1. Notes that trainers leave in a header, such as
`ss_network_alpha`, are none: they stay there when a converter has put the scale into the matrices.
"""

import json
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from workers.models.configs import read_model_json

ADAPTER_CONFIG, _ADAPTER_FILE = "adapter_config.json", "adapter_model.safetensors"
_HEADER_KEY = "lora_adapter_metadata"
_COMPONENT = re.compile(r"^transformer(_2)?\.")
_log = logging.getLogger(__name__)
_LARGEST = 2**31
# Adapters whose training starts from a base that it has changed: nothing to add to the base itself.
_CHANGED_BASE = re.compile(r"^(pissa|olora|corda|loftq)")


@dataclass(frozen=True, slots=True)
class LoraScales:
    """Settings of a LoRA that decide its strength.

    Attributes:
        rank: Of layers that `ranks` does not name; None: nothing is stated.
        alpha: Of layers that `alphas` does not name; None: each layer's rank.
        ranks: Ranks by pattern of a layer's name, as in peft's `rank_pattern`.
        alphas: Alphas by pattern, as in `alpha_pattern`.
        by_root: Divide by the root of the rank.
    """

    rank: int | None = None
    alpha: float | None = None
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    by_root: bool = False

    def scale(self, layer: str, rank: int, alpha: float | None = None) -> float:
        """Factor of a layer's product.

        Args:
            layer: Its name, as the LoRA's trainer knew it.
            rank: Of its matrices.
            alpha: Stated by a tensor of the layer; None: there is none.

        Raises:
            ValueError: Two statements contradict each other.
        """
        stated = _of_layer(self.ranks, layer, self.rank)
        if stated is not None and stated != rank:
            raise ValueError(f"{layer} has rank {rank}, and the LoRA's settings say {stated}")
        own = _of_layer(self.alphas, layer, self.alpha)
        if alpha is not None and own is not None and alpha != own:
            raise ValueError(
                f"{layer} has an alpha of {alpha:g}, and the LoRA's settings say {own:g}"
            )
        alpha = own if alpha is None else alpha
        if alpha is not None and not 0 < alpha < math.inf:
            raise ValueError(f"{layer} has an alpha of {alpha:g}")
        return 1.0 if alpha is None else alpha / (rank**0.5 if self.by_root else rank)


def read_lora_scales(path: Path, header: Mapping[str, str]) -> LoraScales:
    """Read the settings of a LoRA.

    Args:
        path: The LoRA's file.
        header: Metadata of its header.

    Raises:
        ValueError: They say nothing that can be read, or describe another kind of adapter.
        ModelFolderError: adapter_config.json is not a JSON object.
    """
    raw = header.get(_HEADER_KEY)
    beside = path.parent / ADAPTER_CONFIG
    if raw is not None:
        settings = json.loads(raw)
        if not isinstance(settings, dict):
            raise ValueError(f"{_HEADER_KEY} of the header is not a JSON object")
        settings = {_COMPONENT.sub("", str(name)): value for name, value in settings.items()}
    elif not beside.is_file():
        return LoraScales()
    elif path.name == _ADAPTER_FILE or len(list(path.parent.glob("*.safetensors"))) == 1:
        settings = read_model_json(beside)
    else:
        _log.warning("%s was not read: it is of %s, not of %s", beside, _ADAPTER_FILE, path.name)
        return LoraScales()
    _require_plain(settings)
    return LoraScales(
        rank=_number(settings, "r"),
        alpha=_number(settings, "lora_alpha"),
        ranks=_pattern(settings, "rank_pattern"),
        alphas=_pattern(settings, "alpha_pattern"),
        by_root=bool(settings.get("use_rslora")),
    )


def _require_plain(settings: Mapping[str, Any]) -> None:
    """Refuses settings of adapters that are more than a product beside the base's weight."""
    kind = settings.get("peft_type", "LORA")
    start = str(settings.get("init_lora_weights", "")).lower()
    if str(kind).rsplit(".", 1)[-1] != "LORA":
        raise ValueError(f"its settings say peft_type {kind}")
    if settings.get("use_dora"):
        raise ValueError("its settings say use_dora")
    if _CHANGED_BASE.match(start):
        raise ValueError(f"its settings say init_lora_weights {start}, which changes the base too")


def _number(settings: Mapping[str, Any], name: str) -> Any:  # noqa: ANN401  (whole or not)
    value = settings.get(name)
    if value is None:
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not abs(value) < _LARGEST:
        raise ValueError(f"its settings say {name} {str(value)[:80]}")
    return value


def _pattern(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = settings.get(name) or {}
    if not isinstance(value, dict):
        raise ValueError(f"its settings say {name} {value!r}")
    return {str(key): _number(value, key) for key in value}


def _of_layer(patterns: Mapping[str, Any], layer: str, default: Any) -> Any:  # noqa: ANN401
    """The value of the first pattern that is the whole name of a layer, or its end after a dot."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            return value
    return default
