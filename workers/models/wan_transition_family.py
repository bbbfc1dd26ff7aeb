"""Transitions made of Wan models as a model family: a flow head beside the denoiser.

    transformer/      the denoiser, all of its layers
    flow_head/        what its last layers have besides, and the numbers of the inner flow
    model_index.json  _class_name WanTransitionPipeline, which diffusers does not have

No pipeline of diffusers samples a velocity, so the folder has a class of its own: WanPipeline would
take the denoiser alone and answer with means. Everything else is as in `wan_family`.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sgmd_core.collector import paused_collector
from sgmd_core.errors import ModelFolderError
from sgmd_core.schedule import MAX_STEPS
from workers.models.configs import CONFIG_FILE, read_model_json, require_plain_weights
from workers.models.exporting import Components
from workers.models.family import Denoiser
from workers.models.flow_head import is_count, is_shift
from workers.models.folder import ModelFolder
from workers.models.sampling import ClipSampler
from workers.models.shape import ModelShape
from workers.models.transition_arithmetic import TransitionShape
from workers.models.wan_arithmetic import WanShape
from workers.models.wan_configs import (
    LAYOUT,
    REMEDY,
    TRANSFORMER,
    TRANSITION_CLASS,
    require_supported_index,
)
from workers.models.wan_family import WAN, WAN_TRAITS, WanFamily
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
_TRAITS = replace(
    WAN_TRAITS,
    about="text to video by transitions: a flow head samples each step's velocity",
    layout=TRANSITION_LAYOUT,
    sampling=replace(WAN_TRAITS.sampling, source="the folder's family"),
    relatives={},
    released={},
    computes=frozenset({"bf16", "checkpointing"}),
    exchange=None,
    taught_by=frozenset({WAN}),
    limits="the others work on layers that run once in a pass, and those of a flow head run once "
    "in every inner step, on states of their own",
    modules=("workers.models.wan_transition", "workers.models.wan_text"),
)


class WanTransitionFamily(WanFamily):
    """Wan text-to-video models with a flow head; see `ModelFamily`."""

    name = WAN_TRANSITION
    traits = _TRAITS

    def explain_files(self, folder: Path) -> None:
        """None: the family without a flow head speaks for both."""

    def read_shape(self, folder: Path) -> ModelShape:
        """Read the shape from the configurations of denoiser, flow head and autoencoder."""
        require_supported_index(folder, TRANSITION_LAYOUT)
        config, shape = read_head_config(folder), self.read_single(folder)
        assert isinstance(shape.denoiser, WanShape)
        own = TransitionShape(shape.denoiser, config["num_layers"], config["num_steps"])
        return replace(shape, denoiser=own)

    def shape_from_record(self, record: Mapping[str, Any]) -> TransitionShape:
        """Rebuild a shape from the fields of `TransitionShape`."""
        base = super().shape_from_record(record["base"])
        assert isinstance(base, WanShape)
        return TransitionShape(base, record["head_layers"], record["inner_steps"])

    def inspect(self, folder: Path) -> ModelFolder:
        """Check configurations and weight headers."""
        with paused_collector():
            from workers.models.wan_folder import inspect_wan_folder
            from workers.models.wan_transition import check_head

        found = inspect_wan_folder(folder, WAN_TRANSITION, TRANSITION_LAYOUT)
        head = check_head(folder)
        return replace(
            found,
            num_parameters={**found.num_parameters, FLOW_HEAD: head.architecture.num_parameters},
            weights={**found.weights, FLOW_HEAD: head.weights},
        )

    def load_denoiser(
        self,
        folder: Path,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        prepare: Callable[[Denoiser], object] | None = None,
    ) -> Denoiser:
        """Load transformer and flow head as one."""
        with paused_collector():
            from workers.models.wan_transition import load_transition

        return load_transition(folder, dtype, device, prepare)

    def open_sampler(self, folder: Path, device: str) -> ClipSampler:
        """Load what samples clips by outer and inner steps."""
        with paused_collector():
            from workers.models.wan_transition import open_transition_sampler

        return open_transition_sampler(folder, device)

    def export(
        self,
        dst: Path,
        base_folder: Path,
        weights: Mapping[str, Tensor],
        *,
        flow_shift: float | None,
        components: Components = "copy",
    ) -> None:
        """Write a folder of this family."""
        with paused_collector():
            from workers.models.wan_transition import save_transition

        save_transition(dst, base_folder, weights, flow_shift=flow_shift, components=components)


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
