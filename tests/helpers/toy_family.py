"""A model family in one file: an MLP over latent cells, hashed words, a linear autoencoder.

    denoiser/   ToyNetwork   model_index.json says ToyPipeline
    words/      ToyWords
    codec/      ToyCodec

It has nothing in common with Wan: other components, no tokenizer files, no pipeline of diffusers.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sgmd import (
    CONFIG_FILE,
    DIFFUSERS_STEM,
    INDEX_FILE,
    CheckedComponent,
    ClipGeometry,
    Components,
    Denoiser,
    EulerSampler,
    FamilyTraits,
    FolderLayout,
    LatentShape,
    ModelFolder,
    ModelFolderError,
    ModelShape,
    NetworkKind,
    PassFlops,
    SamplingRules,
    ShapeError,
    UnknownWords,
    check_network,
    copy_components,
    load_network,
    load_sharded,
    read_model_json,
    whole_folder,
)

DENOISER, WORDS, CODEC = "denoiser", "words", "codec"
_TIME_FEATURES = 3
_MULTIPLE = 2
"""Inner width of a layer over its outer width."""


class _Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, _MULTIPLE * width)
        self.down = nn.Linear(_MULTIPLE * width, width)

    def forward(self, cells: Tensor) -> Tensor:
        # The mean lets every cell hear of all others.
        return cells + self.down(torch.tanh(self.up(cells + cells.mean(dim=1, keepdim=True))))


class ToyNetwork(ModelMixin, ConfigMixin):
    """Velocity of latents (B, C, T, H, W), cell by cell."""

    @register_to_config
    def __init__(self, channels: int, width: int, num_layers: int, text_width: int) -> None:
        super().__init__()
        self.inward = nn.Linear(channels, width)
        self.time = nn.Linear(_TIME_FEATURES, width)
        self.text = nn.Linear(text_width, width)
        self.layers = nn.ModuleList(_Layer(width) for _ in range(num_layers))
        self.outward = nn.Linear(width, channels)
        self.checkpoints = False

    def forward(self, latents: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        features = torch.stack([sigma, (3 * sigma).sin(), (3 * sigma).cos()], dim=1)
        context = self.time(features) + self.text(text).mean(dim=1)
        cells = self.inward(latents.flatten(2).transpose(1, 2)) + context[:, None]
        for layer in self.layers:
            if self.checkpoints and torch.is_grad_enabled():
                cells = checkpoint(layer, cells, use_reentrant=False)
            else:
                cells = layer(cells)
        return self.outward(cells).transpose(1, 2).reshape(latents.shape)


class ToyDenoiser(Denoiser):
    """`ToyNetwork` as a velocity model."""

    def __init__(self, network: ToyNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, x_t: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        channels, dtype = self.network.config["channels"], self.network.dtype
        if x_t.ndim != 5 or x_t.shape[1] != channels:
            raise ShapeError("denoising", f"{tuple(x_t.shape)}", f"(batch, {channels}, T, H, W)")
        with torch.autocast(
            x_t.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None
        ):
            velocity = self.network(x_t.to(dtype), sigma.to(dtype), text.to(dtype))
        return velocity.to(torch.float32, copy=True)

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.network.layers)

    def set_checkpointing(self, enabled: bool) -> None:
        self.network.checkpoints = enabled


class ToyWords(ModelMixin, ConfigMixin):
    """An embedding of words by their hash; token 0 ends a caption."""

    @register_to_config
    def __init__(self, num_tokens: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_tokens, width)


def tokens_of(caption: str, num_tokens: int) -> list[int]:
    """Hashes of the words of a caption, and its end."""
    return [1 + crc32(word.encode()) % (num_tokens - 1) for word in caption.split()] + [0]


class ToyEmbedder:
    """Captions to embeddings."""

    def __init__(self, network: ToyWords) -> None:
        self.network = network

    @torch.no_grad()
    def encode(self, captions: Sequence[str], max_length: int) -> Tensor:
        weight = self.network.embedding.weight
        text = weight.new_zeros(len(captions), max_length, weight.shape[1])
        for row, caption in zip(text, captions, strict=True):
            tokens = torch.tensor(tokens_of(caption, len(weight))[:max_length])
            row[: len(tokens)] = weight[tokens.to(weight.device)]
        return text


class ToyTokenizer:
    """Hashes know every word."""

    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        return [len(caption.split()) + 1 for caption in captions]

    def unknown_words(self, captions: Sequence[str]) -> UnknownWords:
        return UnknownWords(len(captions), 0, ())


class ToyCodec(ModelMixin, ConfigMixin):
    """Squares of pixels to latent cells and back, frame by frame."""

    @register_to_config
    def __init__(self, channels: int, factor: int) -> None:
        super().__init__()
        size = (1, factor, factor)
        self.down = nn.Conv3d(3, channels, size, stride=size)
        self.up = nn.ConvTranspose3d(channels, 3, size, stride=size)


class ToyAutoencoder:
    """Videos in [0, 1] to latents and back."""

    def __init__(self, network: ToyCodec) -> None:
        self.network = network

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        frames, height, width = video.shape[2:]
        geometry_of(self.network.config).latent_shape(frames, height, width)
        return self.network.down(2 * video - 1)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        return self.network.up(latents).sigmoid().float()


def geometry_of(codec: Mapping[str, Any]) -> ClipGeometry:
    """Sizes of latents by the configuration of the autoencoder."""
    return ClipGeometry(codec["channels"], temporal_factor=1, spatial_factor=codec["factor"])


@dataclass(frozen=True)
class ToyShape:
    """Costs of a `ToyNetwork`."""

    channels: int
    width: int
    num_layers: int
    text_width: int
    num_heads = 1

    @property
    def parameters_per_layer(self) -> int:
        inner = _MULTIPLE * self.width
        return 2 * self.width * inner + inner + self.width

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        inner = _MULTIPLE * self.width
        return {"up": (self.width, inner), "down": (inner, self.width)}

    @property
    def num_passed_layers(self) -> int:
        return self.num_layers

    @property
    def num_parameters(self) -> int:
        ends = self.channels + _TIME_FEATURES + self.text_width + 3
        outward = (self.width + 1) * self.channels
        return ends * self.width + outward + self.num_layers * self.parameters_per_layer

    def num_tokens(self, latent_shape: LatentShape) -> int:
        return prod(latent_shape[1:])

    def forward_flops(self, latent_shape: LatentShape, text_length: int) -> int:
        return self.pass_flops(latent_shape, text_length).forward

    def pass_flops(self, latent_shape: LatentShape, text_length: int) -> PassFlops:
        cells = self.num_tokens(latent_shape)
        layers = self.num_layers * 2 * cells * self.width * _MULTIPLE * self.width
        ends = cells * self.channels * self.width
        firsts = (_TIME_FEATURES + text_length * self.text_width) * self.width
        products = layers + 2 * ends + firsts
        return PassFlops(
            forward=2 * products,
            to_input=2 * (layers + 2 * ends),
            to_parameters=2 * (2 * products - ends - firsts),
            attention=0,
        )

    def graph_bytes(
        self, latent_shape: LatentShape, text_length: int, *, bf16: bool, checkpointing: bool
    ) -> int:
        cells = self.num_tokens(latent_shape)
        layer = self.layer_graph_bytes(latent_shape, text_length, bf16=bf16)
        if checkpointing:
            layer = 4 * cells * self.width
        ends = cells * (self.channels + self.width) + text_length * self.text_width
        return self.num_layers * layer + 4 * ends

    def layer_graph_bytes(self, latent_shape: LatentShape, text_length: int, *, bf16: bool) -> int:
        cells = self.num_tokens(latent_shape)
        return (2 if bf16 else 4) * cells * self.width * (1 + _MULTIPLE)

    def transient_bytes(self, latent_shape: LatentShape, *, bf16: bool) -> int:
        cells = self.num_tokens(latent_shape)
        return (2 if bf16 else 4) * cells * self.width * (2 + 2 * _MULTIPLE)


_NETWORKS = {DENOISER: ToyNetwork, WORDS: ToyWords, CODEC: ToyCodec}
_TRAITS = FamilyTraits(
    about="text to short clips, for tests",
    layout=FolderLayout(
        pipeline_class="ToyPipeline",
        denoiser_class="ToyNetwork",
        denoiser=DENOISER,
        autoencoder=CODEC,
        text=(WORDS,),
        weights=dict.fromkeys(_NETWORKS, DIFFUSERS_STEM),
        files=(),
    ),
    sampling=SamplingRules(
        source="ToyFamily",
        multiple_px=1,
        num_steps=8,
        guidance_scale=2.0,
        flow_shift=1.0,
        text_length=6,
        num_frames=5,
        height=16,
        width=16,
        fps=8,
    ),
    computes=frozenset({"bf16", "checkpointing"}),
)


class ToyFamily:
    """See `sgmd.ModelFamily`."""

    name = "toy"
    traits = _TRAITS

    def explain_files(self, folder: Path) -> ModelFolderError | None:
        return None

    def read_shape(self, folder: Path) -> ModelShape:
        config = read_model_json(folder / DENOISER / CONFIG_FILE)
        codec = read_model_json(folder / CODEC / CONFIG_FILE)
        names = ("channels", "width", "num_layers", "text_width")
        return ModelShape(ToyShape(*(config[name] for name in names)), geometry_of(codec))

    def shape_from_record(self, record: Mapping[str, Any]) -> ToyShape:
        return ToyShape(**record)

    def inspect(self, folder: Path) -> ModelFolder:
        parts = {name: _check(folder, name) for name in _NETWORKS}
        return ModelFolder(
            path=folder,
            family=self.name,
            layout=_TRAITS.layout,
            geometry=geometry_of(parts[CODEC].config),
            text_width=parts[DENOISER].config["text_width"],
            num_parameters={name: part.architecture.num_parameters for name, part in parts.items()},
            weights={name: part.weights for name, part in parts.items()},
        )

    def load_denoiser(
        self,
        folder: Path,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        prepare: Callable[[Denoiser], object] | None = None,
    ) -> ToyDenoiser:
        part = _check(folder, DENOISER)
        return load_sharded(ToyNetwork, part, ToyDenoiser, dtype, device, prepare)

    def load_text(self, folder: Path, dtype: torch.dtype | None = None) -> ToyEmbedder:
        return ToyEmbedder(_load(folder, WORDS, dtype or torch.float32).requires_grad_(False))

    def load_autoencoder(self, folder: Path, dtype: torch.dtype = torch.float32) -> ToyAutoencoder:
        return ToyAutoencoder(_load(folder, CODEC, dtype).requires_grad_(False))

    def load_tokenizer(self, folder: Path) -> ToyTokenizer:
        return ToyTokenizer()

    def open_sampler(self, folder: Path, device: str) -> EulerSampler:
        denoiser = self.load_denoiser(folder).to(device)
        text, autoencoder = self.load_text(folder), self.load_autoencoder(folder)
        for network in (text.network, autoencoder.network):
            nn.Module.to(network, device)
        return EulerSampler(denoiser, text, autoencoder, self.inspect(folder).latent_shape)

    def export(
        self,
        dst: Path,
        base_folder: Path,
        weights: Mapping[str, Tensor],
        *,
        flow_shift: float | None,
        components: Components = "copy",
    ) -> None:
        # The shift is in sgmd.json, which every export gets.
        denoiser = self.load_denoiser(base_folder)
        denoiser.load_state_dict(dict(weights), assign=True)
        with whole_folder(dst) as draft:
            copy_components(base_folder, draft, _TRAITS.layout, (WORDS, CODEC), components)
            denoiser.network.save_pretrained(draft / DENOISER)
            (draft / INDEX_FILE).write_text(json.dumps({"_class_name": "ToyPipeline"}))


def _check(folder: Path, name: str) -> CheckedComponent:
    config = read_model_json(folder / name / CONFIG_FILE)
    kind = NetworkKind(_NETWORKS[name].from_config, DIFFUSERS_STEM)
    return check_network(folder / name, config, kind)


def _load(folder: Path, name: str, dtype: torch.dtype) -> Any:
    return load_network(_NETWORKS[name], _check(folder, name), dtype=dtype)


def write_toy(folder: Path, seed: int = 0) -> Path:
    """Write a toy model with seeded random weights; return its folder."""
    torch.manual_seed(seed)
    parts = {
        DENOISER: ToyNetwork(channels=4, width=16, num_layers=2, text_width=8),
        WORDS: ToyWords(num_tokens=64, width=8),
        CODEC: ToyCodec(channels=4, factor=4),
    }
    for name, network in parts.items():
        network.save_pretrained(folder / name)
    (folder / INDEX_FILE).write_text(json.dumps({"_class_name": "ToyPipeline"}))
    return folder
