"""Arithmetic of a model by its configuration alone: parameters, operations and bytes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from workers.models.folder import ClipGeometry, EncoderSizes, LatentShape


@dataclass(frozen=True, slots=True)
class PassFlops:
    """Operations of the passes of one sample, without what checkpointing makes again.

    Attributes:
        forward: A forward pass.
        to_input: A backward pass to the latents alone.
        to_parameters: A backward pass to all parameters and not to the latents.
        attention: What of `forward` lies inside attention: scores and values.
    """

    forward: int
    to_input: int
    to_parameters: int
    attention: int


class DenoiserShape(Protocol):
    """Costs of a denoiser by its configuration: parameters, operations, bytes."""

    @property
    def num_layers(self) -> int:
        """Layers: `Denoiser.blocks`."""
        ...

    @property
    def num_passed_layers(self) -> int:
        """Layers that one sample passes through, each as often as it does."""
        ...

    @property
    def width(self) -> int:
        """Width of the residual stream between layers."""
        ...

    @property
    def text_width(self) -> int:
        """Width of a caption embedding."""
        ...

    @property
    def num_heads(self) -> int:
        """Heads of self-attention."""
        ...

    @property
    def num_parameters(self) -> int:
        """Parameters, biases and norms included."""
        ...

    @property
    def parameters_per_layer(self) -> int:
        """Parameters of one layer."""
        ...

    @property
    def projections(self) -> Mapping[str, tuple[int, int]]:
        """Linear projections of one layer, which adapters can change: sizes in and out by name."""
        ...

    def num_tokens(self, latent_shape: LatentShape) -> int:
        """Tokens of one sample."""
        ...

    def forward_flops(self, latent_shape: LatentShape, text_length: int) -> int:
        """Operations of one forward pass of one sample."""
        ...

    def pass_flops(self, latent_shape: LatentShape, text_length: int) -> PassFlops:
        """Operations of one forward pass of one sample, and of the backward passes after it."""
        ...

    def graph_bytes(
        self, latent_shape: LatentShape, text_length: int, *, bf16: bool, checkpointing: bool
    ) -> int:
        """Bytes that one sample's forward pass keeps for its backward pass."""
        ...

    def layer_graph_bytes(self, latent_shape: LatentShape, text_length: int, *, bf16: bool) -> int:
        """Bytes of one layer's part of a graph without checkpointing."""
        ...

    def transient_bytes(self, latent_shape: LatentShape, *, bf16: bool) -> int:
        """Bytes that a pass without a graph holds at its widest place, for one sample."""
        ...


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Arithmetic of a model: its denoiser, sizes of its latents, and encoders where known."""

    denoiser: DenoiserShape
    geometry: ClipGeometry
    encoders: EncoderSizes | None = None
