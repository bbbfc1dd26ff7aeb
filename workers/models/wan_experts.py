"""Wan 2.2 T2V-A14B as a model family: two experts in one folder.

    transformer/      expert of noise levels from boundary_ratio to 1
    transformer_2/    expert of those below
    model_index.json  boundary_ratio

Everything else is as in `wan_family`.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sgmd_core.collector import paused_collector
from sgmd_core.phases import Expert
from workers.models.exchange import ExchangeFiles
from workers.models.exporting import Components
from workers.models.family import Denoiser
from workers.models.folder import ModelFolder
from workers.models.shape import ModelShape
from workers.models.wan_arithmetic import RELEASED_SHAPES, ExpertsShape, WanShape
from workers.models.wan_configs import (
    EXPERTS_LAYOUT,
    LOW_NOISE,
    TRANSFORMER,
    WAN_GEOMETRY,
    read_component,
    require_alike,
    require_supported_index,
)
from workers.models.wan_family import RELEASED_ENCODERS, WAN_TRAITS, WanFamily

if TYPE_CHECKING:
    from workers.models.experts import ExpertDenoiser

WAN_EXPERTS = "wan-experts"
PREFIXES = {TRANSFORMER: "high.", LOW_NOISE: "low."}
"""Prefix of a parameter's name in the denoiser, by the component that holds it."""


def _exchange() -> ExchangeFiles:
    with paused_collector():
        from workers.models.wan_exchange import EXPERTS, WanExchange

    return WanExchange(EXPERTS)


_TRAITS = replace(
    WAN_TRAITS,
    about="text to video with two experts by noise level",
    layout=EXPERTS_LAYOUT,
    # A batch may go through the layers of both: no one chain.
    computes=WAN_TRAITS.computes - {"joint"},
    # The model's own guidance is 4 above the boundary and 3 below; a folder is sampled with one.
    sampling=replace(WAN_TRAITS.sampling, num_steps=40, guidance_scale=4.0, height=720, width=1280),
    # Relatives are named by the family with one denoiser already.
    relatives={},
    released={
        "a14b": ModelShape(ExpertsShape(RELEASED_SHAPES["14b"]), WAN_GEOMETRY, RELEASED_ENCODERS)
    },
    on_hub={"Wan2.2-T2V-A14B-Diffusers": "a14b"},
    exchange=_exchange,
)


class WanExpertsFamily(WanFamily):
    """Wan 2.2 text-to-video models of two experts; see `ModelFamily`."""

    name = WAN_EXPERTS
    traits = _TRAITS

    def __init__(self, expert: Expert | None = None, companion: torch.dtype | None = None) -> None:
        """Make the family, or what a role knows of it that has one expert alone.

        Args:
            expert: The one expert; None: both.
            companion: Type of the other one's weights where it is there as well, frozen.
        """
        self._expert: Expert | None = expert
        self._companion = companion

    def explain_files(self, folder: Path) -> None:
        """None: the family with one denoiser speaks for both."""

    def read_shape(self, folder: Path) -> ModelShape:
        """Read the shape from the configurations of both experts and the autoencoder."""
        require_supported_index(folder, EXPERTS_LAYOUT)
        experts = [read_component(folder, name) for name in PREFIXES]
        require_alike(folder, experts)
        shape = self.read_single(folder)
        assert isinstance(shape.denoiser, WanShape)
        if self._expert is not None:
            return shape
        return replace(shape, denoiser=ExpertsShape(shape.denoiser))

    def shape_from_record(self, record: Mapping[str, Any]) -> ExpertsShape:
        """Rebuild a shape from the fields of `ExpertsShape`."""
        expert = super().shape_from_record(record["expert"])
        assert isinstance(expert, WanShape)
        return ExpertsShape(expert)

    def inspect(self, folder: Path) -> ModelFolder:
        """Check configurations and weight headers."""
        with paused_collector():
            from workers.models.wan_folder import inspect_wan_folder

        return inspect_wan_folder(folder, WAN_EXPERTS, EXPERTS_LAYOUT)

    def load_denoiser(
        self,
        folder: Path,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        prepare: Callable[[Denoiser], object] | None = None,
    ) -> "ExpertDenoiser":
        """Load both transformers, or those of the one expert."""
        with paused_collector():
            from workers.models.wan import load_experts

        return load_experts(folder, dtype, device, prepare, self._expert, self._companion)

    def export(
        self,
        dst: Path,
        base_folder: Path,
        weights: Mapping[str, Tensor],
        *,
        flow_shift: float | None,
        components: Components = "copy",
    ) -> None:
        """Write a folder that WanPipeline loads, with both experts and their boundary.

        Of an expert that `weights` have nothing of, the base's files are linked or copied.
        """
        with paused_collector():
            from workers.models.wan import save_generator_pipeline

        save_generator_pipeline(
            dst,
            base_folder,
            weights,
            flow_shift=flow_shift,
            components=components,
            layout=EXPERTS_LAYOUT,
            prefixes={
                part: prefix
                for part, prefix in PREFIXES.items()
                if any(name.startswith(prefix) for name in weights)
            },
        )
