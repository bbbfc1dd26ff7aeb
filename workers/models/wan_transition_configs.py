"""Layout and configurations of a Wan folder with a flow head, whose networks are not looked at."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sgmd_core.errors import ModelFolderError
from sgmd_core.schedule import MAX_STEPS
from workers.models.configs import CONFIG_FILE, read_model_json, require_plain_weights
from workers.models.flow_head import is_count, is_shift
from workers.models.wan_arithmetic import WanShape
from workers.models.wan_configs import LAYOUT, REMEDY, TRANSFORMER, TRANSITION_CLASS
from workers.models.weights import DIFFUSERS_STEM

WAN_TRANSITION = "wan-transition"
FLOW_HEAD = "flow_head"
PREFIXES = {TRANSFORMER: "velocity.transformer.", FLOW_HEAD: "head."}
"""Prefix of a parameter's name in the denoiser, by the component that holds it."""
TRANSITION_LAYOUT = replace(
    LAYOUT,
    pipeline_class=TRANSITION_CLASS,
    experts=(FLOW_HEAD,),
    weights={**LAYOUT.weights, FLOW_HEAD: DIFFUSERS_STEM},
)


def read_head_config(folder: Path) -> Mapping[str, Any]:
    """Read and check the configuration of a folder's flow head.

    Raises:
        ModelFolderError: It is missing, no JSON, of another class, or has more layers than the
            denoiser, or another width.
    """
    part = folder / FLOW_HEAD
    config = read_model_json(part / CONFIG_FILE)
    if config.get("_class_name") != "FlowHead":
        found = f"a {config.get('_class_name')}"
        raise ModelFolderError(f"reading {part / CONFIG_FILE}", found, "a FlowHead", REMEDY)
    require_plain_weights(part, config)
    denoiser = WanShape.from_config(read_model_json(folder / TRANSFORMER / CONFIG_FILE))
    layers, width = config.get("num_layers"), config.get("width")
    steps, shift = config.get("num_steps"), config.get("shift")
    fits = is_count(layers, denoiser.num_layers) and width == denoiser.width
    if not fits or not is_count(steps, MAX_STEPS) or not is_shift(shift):
        raise ModelFolderError(
            f"reading {part / CONFIG_FILE}",
            f"num_layers {layers}, width {width}, num_steps {steps} and shift {shift}",
            f"1 to {denoiser.num_layers} layers of width {denoiser.width}, 1 to {MAX_STEPS} steps "
            "and a finite shift above 0",
            REMEDY,
        )
    return {name: value for name, value in config.items() if not name.startswith("_")}
