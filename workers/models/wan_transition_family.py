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
from workers.models.exporting import Components
from workers.models.family import Denoiser
from workers.models.folder import ModelFolder
from workers.models.sampling import ClipSampler
from workers.models.shape import ModelShape
from workers.models.transition_arithmetic import TransitionShape
from workers.models.wan_arithmetic import WanShape
from workers.models.wan_configs import WAN, require_supported_index
from workers.models.wan_family import WAN_TRAITS, WanFamily
from workers.models.wan_transition_configs import (
    FLOW_HEAD,
    TRANSITION_LAYOUT,
    WAN_TRANSITION,
    read_head_config,
)

_TRAITS = replace(
    WAN_TRAITS,
    about="text to video by transitions: a flow head samples each step's velocity",
    layout=TRANSITION_LAYOUT,
    sampling=replace(WAN_TRAITS.sampling, source="the folder's family"),
    relatives={},
    released={},
    on_hub={},
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
