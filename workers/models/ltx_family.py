"""LTX-Video as a model family.

    transformer/     LTXVideoTransformer3DModel      model_index.json says LTXPipeline
    text_encoder/    T5EncoderModel
    vae/             AutoencoderKLLTXVideo

    ltx_configs  checks by configurations
    ltx          networks and pipeline        ltx_text      captions

No network library is imported before a method needs one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sgmd_core.collector import paused_collector
from sgmd_core.errors import ModelFolderError
from workers.models.configs import INDEX_FILE
from workers.models.exporting import Components
from workers.models.family import Denoiser, FamilyTraits
from workers.models.folder import EncoderSizes, ModelFolder
from workers.models.ltx_configs import (
    CLASSES,
    FRAME_RATE,
    LAYOUT,
    LTX,
    LTX_GEOMETRY,
    REMEDY,
    TEXT_ENCODER,
    TOKENIZER,
    TRANSFORMER,
    ltx_geometry,
    read_ltx_component,
    require_ltx_index,
)
from workers.models.sampling import SamplingRules
from workers.models.shape import ModelShape
from workers.models.vocabulary import CaptionTokenizer, LibraryTokenizer
from workers.models.wan_arithmetic import WanShape
from workers.models.weights import lacks_weights

if TYPE_CHECKING:
    from workers.models.ltx import LtxCodec, LtxSampler
    from workers.models.ltx_text import LtxCaptions


# Without slots, as what it is made of: `super()` needs that.
@dataclass(frozen=True)
class LtxShape(WanShape):
    """The numbers that fix an LTX-Video denoiser.

    The products of its layers are those of a Wan with a feed-forward part of four times the width
    and a patch of one cell. Two vectors a layer fewer: its norms have no weights. The bytes are
    those of such a Wan, and were not counted on LTX-Video.
    """

    @property
    def num_parameters(self) -> int:
        """Parameters, biases and norms included."""
        return super().num_parameters - 2 * self.num_layers * self.width

    @property
    def parameters_per_layer(self) -> int:
        """Parameters of one layer."""
        return super().parameters_per_layer - 2 * self.width

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """Linear projections of one layer: sizes in and out by name."""
        named = super().projections
        return {name.replace("ffn.", "ff."): sizes for name, sizes in named.items()}


def ltx_shape(num_layers: int, width: int, text_width: int, channels: int) -> LtxShape:
    """Shape of a denoiser of these sizes."""
    return LtxShape(
        num_layers, width, 4 * width, text_width, 256, channels, channels, patch_size=(1, 1, 1)
    )


_TRAITS = FamilyTraits(
    about="text to video",
    layout=LAYOUT,
    sampling=SamplingRules(
        source="LTXPipeline",
        # LTXPipeline refuses other sizes, whatever the networks could do.
        multiple_px=32,
        num_steps=50,
        guidance_scale=3.0,
        flow_shift=1.0,
        text_length=128,
        num_frames=161,
        height=512,
        width=704,
        fps=FRAME_RATE,
    ),
    computes=frozenset({"bf16", "checkpointing", "selective", "offload", "compile", "lora"}),
    relatives={
        "LTXConditionPipeline": "a model that takes images or videos besides the text",
        "LTXLatentUpsamplePipeline": "an upscaler of latents",
    },
    released={
        "ltx-2b": ModelShape(
            ltx_shape(num_layers=28, width=2048, text_width=4096, channels=128),
            LTX_GEOMETRY,
            # T5-XXL's encoder, and AutoencoderKLLTXVideo as it is released.
            EncoderSizes(text=4_762_310_656, autoencoder=419_193_649),
        )
    },
    on_hub={"LTX-Video": "ltx-2b"},
    modules=("workers.models.ltx", "workers.models.ltx_text"),
)


class LtxFamily:
    """LTX-Video text-to-video models; see `ModelFamily`."""

    name = LTX
    traits = _TRAITS

    def explain_files(self, folder: Path) -> ModelFolderError | None:
        """None: no other layout of it is known here."""
        del folder
        return None

    def read_shape(self, folder: Path) -> ModelShape:
        """Read the shape from the configurations of denoiser and autoencoder."""
        if (folder / INDEX_FILE).exists():
            require_ltx_index(folder)
        config = read_ltx_component(folder, TRANSFORMER)
        shape = ltx_shape(
            config["num_layers"],
            config["num_attention_heads"] * config["attention_head_dim"],
            config["caption_channels"],
            config["in_channels"],
        )
        return ModelShape(shape, ltx_geometry(folder, config))

    def shape_from_record(self, record: Mapping[str, Any]) -> LtxShape:
        """Rebuild a shape from the fields of `LtxShape`."""
        return LtxShape(**{**record, "patch_size": tuple(record["patch_size"])})

    def inspect(self, folder: Path) -> ModelFolder:
        """Check configurations and weight headers."""
        with paused_collector():
            from workers.models.ltx import check_ltx_component

        require_ltx_index(folder)
        left_out = [name for name in LAYOUT.dispensable if lacks_weights(folder / name)]
        own = [name for name in CLASSES if name not in left_out]
        parts = {name: check_ltx_component(folder, name) for name in own}
        transformer = parts[TRANSFORMER].config
        geometry = ltx_geometry(folder, transformer)
        for found, expected in (
            (
                ("transformer in_channels", transformer["in_channels"]),
                ("vae latent_channels", geometry.latent_channels),
            ),
            *(
                (
                    ("transformer caption_channels", transformer["caption_channels"]),
                    (f"{name} d_model", parts[name].config["d_model"]),
                )
                for name in own
                if name == TEXT_ENCODER
            ),
        ):
            if found[1] != expected[1]:
                raise ModelFolderError(
                    f"reading {folder}",
                    f"{found[0]} {found[1]} and {expected[0]} {expected[1]}",
                    "the same number: components of one text-to-video model",
                    REMEDY,
                )
        return ModelFolder(
            path=folder,
            family=LTX,
            layout=LAYOUT,
            geometry=geometry,
            text_width=transformer["caption_channels"],
            num_parameters={name: part.architecture.num_parameters for name, part in parts.items()},
            weights={name: part.weights for name, part in parts.items()},
        )

    def load_denoiser(
        self,
        folder: Path,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        prepare: Callable[[Denoiser], object] | None = None,
    ) -> Denoiser:
        """Load the transformer."""
        with paused_collector():
            from workers.models.ltx import load_ltx_transformer

        return load_ltx_transformer(folder, dtype, device, prepare)

    def load_text(self, folder: Path, dtype: torch.dtype | None = None) -> "LtxCaptions":
        """Load tokenizer and T5 encoder."""
        with paused_collector():
            from workers.models.ltx_text import load_ltx_text

        return load_ltx_text(folder, dtype)

    def load_autoencoder(self, folder: Path, dtype: torch.dtype = torch.float32) -> "LtxCodec":
        """Load the autoencoder."""
        with paused_collector():
            from workers.models.ltx import load_ltx_vae

        return load_ltx_vae(folder, dtype)

    def load_tokenizer(self, folder: Path) -> CaptionTokenizer:
        """Load the tokenizer; LTXPipeline takes captions as they are."""
        with paused_collector():
            from workers.models.loading import load_tokenizer

        require_ltx_index(folder)
        return LibraryTokenizer(load_tokenizer(folder / TOKENIZER), str)

    def open_sampler(self, folder: Path, device: str) -> "LtxSampler":
        """Load an LTXPipeline."""
        with paused_collector():
            from workers.models.ltx import LtxSampler

        return LtxSampler(folder, device)

    def export(
        self,
        dst: Path,
        base_folder: Path,
        weights: Mapping[str, Tensor],
        *,
        flow_shift: float | None,
        components: Components = "copy",
    ) -> None:
        """Write a folder that LTXPipeline loads."""
        with paused_collector():
            from workers.models.ltx import save_ltx_generator

        save_ltx_generator(dst, base_folder, weights, flow_shift, components)
