"""Parameters, operations and bytes of a Wan denoiser of a given shape; no network is made.

    tokens n = latent frames * rows * columns / patch      d width    f feed-forward    l text

    one layer, one sample    6 n d^2 + 2 l d^2             self- and cross-attention's projections
    (multiplications,        2 n^2 d + 2 n l d             scores and values of both
    each one addition too)   2 n d f                       feed-forward

Operations are counted as everybody counts them, two for a multiplication and its addition, matrix
products alone. A backward pass makes, for each projection, one product for the gradient of its
input and one for that of its weights; and for each product inside attention two, because both of
its factors are activations. So a backward pass to the network's input costs a forward pass and
attention's share of one, `pass_flops` says exactly how much.

The numbers of parameters and operations are exact; the bytes of graphs were fitted to counted ones.
The tests hold all of them against networks.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any, Self

from workers.models.shape import PassFlops

_TIME_CHANNELS = 6
"""Shift, scale and gate before self-attention and before feed-forward."""


# Without slots: a search for a plan asks for its sums millions of times.
@dataclass(frozen=True)
class WanShape:
    """The numbers that fix a Wan denoiser.

    Attributes:
        num_layers: Transformer layers.
        width: Width of the residual stream, heads times their size.
        ffn_width: Inner width of the feed-forward part.
        text_width: Width of a caption embedding.
        freq_width: Width of the sinusoidal embedding of the noise level.
        in_channels: Latent channels that come in.
        out_channels: Latent channels that go out.
        patch_size: Latent cells a token, along time, height and width.
        num_heads: Heads of attention; they decide no cost.
        cross_attn_norm: Whether the norm before cross-attention has weights and does something.
    """

    num_layers: int
    width: int
    ffn_width: int
    text_width: int = 4096
    freq_width: int = 256
    in_channels: int = 16
    out_channels: int = 16
    patch_size: tuple[int, int, int] = (1, 2, 2)
    num_heads: int = field(default=1, compare=False)
    cross_attn_norm: bool = True

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """The shape that a `transformer/config.json` of diffusers describes."""
        frames, rows, columns = config["patch_size"]
        return cls(
            num_layers=config["num_layers"],
            width=config["num_attention_heads"] * config["attention_head_dim"],
            ffn_width=config["ffn_dim"],
            text_width=config["text_dim"],
            freq_width=config["freq_dim"],
            in_channels=config["in_channels"],
            out_channels=config["out_channels"],
            patch_size=(frames, rows, columns),
            num_heads=config["num_attention_heads"],
            # As WanTransformer3DModel has it where its file does not say.
            cross_attn_norm=bool(config.get("cross_attn_norm", True)),
        )

    @property
    def num_passed_layers(self) -> int:
        """Layers that one sample passes through: all of them, once."""
        return self.num_layers

    @property
    def num_parameters(self) -> int:
        """Parameters, biases and norms included."""
        return self._num_parameters

    @cached_property
    def _num_parameters(self) -> int:
        d, f = self.width, self.ffn_width
        attention = 4 * _linear(d, d) + 2 * d
        layer = 2 * attention + _linear(d, f) + _linear(f, d) + _TIME_CHANNELS * d
        layer += 2 * d * self.cross_attn_norm
        embeddings = (
            _linear(self.in_channels * prod(self.patch_size), d)
            + _linear(self.freq_width, d)
            + _linear(d, d)
            + _linear(d, _TIME_CHANNELS * d)
            + _linear(self.text_width, d)
            + _linear(d, d)
        )
        head = _linear(d, self.out_channels * prod(self.patch_size)) + 2 * d
        return self.num_layers * layer + embeddings + head

    @property
    def parameters_per_layer(self) -> int:
        """Parameters of one layer: what is gathered at a time when the network is sharded."""
        d, f = self.width, self.ffn_width
        norms = (4 + 2 * self.cross_attn_norm + _TIME_CHANNELS) * d
        return 8 * _linear(d, d) + _linear(d, f) + _linear(f, d) + norms

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """Linear projections of one layer: sizes in and out by name."""
        d, f = self.width, self.ffn_width
        square = {
            f"{part}.{name}": (d, d)
            for part in ("attn1", "attn2")
            for name in ("to_q", "to_k", "to_v", "to_out.0")
        }
        return {**square, "ffn.net.0.proj": (d, f), "ffn.net.2": (f, d)}

    def num_tokens(self, latent_shape: tuple[int, int, int, int]) -> int:
        """Tokens of one sample.

        Args:
            latent_shape: Channels, frames, rows, columns of its latents.
        """
        return prod(latent_shape[1:]) // prod(self.patch_size)

    def forward_flops(self, latent_shape: tuple[int, int, int, int], text_length: int) -> int:
        """Operations of one forward pass of one sample; see `pass_flops`."""
        return self.pass_flops(latent_shape, text_length).forward

    def pass_flops(self, latent_shape: tuple[int, int, int, int], text_length: int) -> PassFlops:
        """Operations of one forward pass of one sample, and of the backward passes after it.

        The way to the latents passes by neither the text nor the noise level: keys and values of
        the cross-attention, and the embeddings of both, take no part in `to_input`.

        Args:
            latent_shape: Channels, frames, rows, columns of its latents.
            text_length: Text positions.
        """
        d, f, n, patch = self.width, self.ffn_width, self.num_tokens(latent_shape), self.patch_size
        stream = self.num_layers * (6 * n * d * d + 2 * n * d * f)
        text_in_layers = self.num_layers * 2 * text_length * d * d
        attention = self.num_layers * 2 * n * n * d
        cross_attention = self.num_layers * 2 * n * text_length * d
        patches = n * d * prod(patch) * self.in_channels
        head = n * d * prod(patch) * self.out_channels
        # Of each embedding the first projection, whose input is data and needs no gradient.
        firsts = d * self.freq_width + text_length * d * self.text_width
        time = d * (d + _TIME_CHANNELS * d)
        text = text_length * d * d
        products = stream + text_in_layers + patches + head + firsts + time + text
        inside = attention + cross_attention
        return PassFlops(
            forward=2 * (products + inside),
            to_input=2 * (stream + patches + head + 2 * attention + cross_attention),
            to_parameters=2 * (2 * products - patches - firsts + 2 * inside),
            attention=2 * inside,
        )

    def graph_bytes(
        self,
        latent_shape: tuple[int, int, int, int],
        text_length: int,
        *,
        bf16: bool,
        checkpointing: bool,
    ) -> int:
        """Bytes that the graph of one forward pass of one sample keeps for its backward pass.

        Args:
            latent_shape: Channels, frames, rows, columns of its latents.
            text_length: Text positions.
            bf16: Matrix products in bfloat16; otherwise all in float32.
            checkpointing: Of a layer, only its input is kept.
        """
        n, d = self.num_tokens(latent_shape), self.width
        if checkpointing:
            layer = (2 if bf16 else 4) * n * d
        else:
            layer = self.layer_graph_bytes(latent_shape, text_length, bf16=bf16)
        size = 2 if bf16 else 4
        ends = (10 if bf16 else 12) * n * d + 4 * n * self.in_channels * prod(self.patch_size)
        ends += size * text_length * (self.text_width + 3 * d)
        # Weights that were cast for a product are kept with it.
        cast = 2 * (self.num_parameters - self.num_layers * self.parameters_per_layer) * bf16
        return self.num_layers * layer + ends + cast

    def layer_graph_bytes(
        self, latent_shape: tuple[int, int, int, int], text_length: int, *, bf16: bool
    ) -> int:
        """Bytes of one layer's part of a graph: what checkpointing makes again, layer by layer.

        Norms and residuals stay in float32; a fused attention keeps no n * n matrix.
        """
        n, d, f = self.num_tokens(latent_shape), self.width, self.ffn_width
        if bf16:
            cast = 2 * self.parameters_per_layer
            return (137 * n * d) // 2 + 4 * n * f + 8 * text_length * d + cast
        return (177 * n * d) // 2 + 8 * n * f + 16 * text_length * d

    def transient_bytes(self, latent_shape: tuple[int, int, int, int], *, bf16: bool) -> int:
        """Bytes that a pass without a graph holds at its widest place, for one sample.

        The feed-forward part before and after its activation, and some copies of the stream.
        """
        n, size = self.num_tokens(latent_shape), 2 if bf16 else 4
        return 2 * size * n * self.ffn_width + 24 * n * self.width


class DerivedShape(ABC):
    """A shape whose layers are those of one Wan denoiser; what is the denoiser's own."""

    __slots__ = ()

    @property
    @abstractmethod
    def denoiser(self) -> WanShape:
        """The denoiser that the layers are of."""

    @property
    def width(self) -> int:
        """Width of the residual stream between layers."""
        return self.denoiser.width

    @property
    def text_width(self) -> int:
        """Width of a caption embedding."""
        return self.denoiser.text_width

    @property
    def num_heads(self) -> int:
        """Heads of attention."""
        return self.denoiser.num_heads

    @property
    def parameters_per_layer(self) -> int:
        """Parameters of one layer."""
        return self.denoiser.parameters_per_layer

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """Linear projections of one layer: sizes in and out by name."""
        return self.denoiser.projections

    def num_tokens(self, latent_shape: tuple[int, int, int, int]) -> int:
        """Tokens of one sample."""
        return self.denoiser.num_tokens(latent_shape)

    def layer_graph_bytes(
        self, latent_shape: tuple[int, int, int, int], text_length: int, *, bf16: bool
    ) -> int:
        """Bytes of one layer's part of a graph without checkpointing."""
        return self.denoiser.layer_graph_bytes(latent_shape, text_length, bf16=bf16)


@dataclass(frozen=True, slots=True)
class ExpertsShape(DerivedShape):
    """Two denoisers of one shape, of which a sample passes through that of its noise level.

    Parameters are those of both; operations and bytes of a pass are those of one.

    Attributes:
        expert: Shape of each.
    """

    expert: WanShape

    @property
    def denoiser(self) -> WanShape:
        """Shape of each."""
        return self.expert

    @property
    def num_layers(self) -> int:
        """Layers of both."""
        return 2 * self.expert.num_layers

    @property
    def num_passed_layers(self) -> int:
        """Layers that one sample passes through: those of one expert."""
        return self.expert.num_layers

    @property
    def num_parameters(self) -> int:
        """Parameters of both."""
        return 2 * self.expert.num_parameters

    def forward_flops(self, latent_shape: tuple[int, int, int, int], text_length: int) -> int:
        """Operations of one forward pass of one sample."""
        return self.expert.forward_flops(latent_shape, text_length)

    def pass_flops(self, latent_shape: tuple[int, int, int, int], text_length: int) -> PassFlops:
        """Operations of one forward pass of one sample, and of the backward passes after it."""
        return self.expert.pass_flops(latent_shape, text_length)

    def graph_bytes(
        self,
        latent_shape: tuple[int, int, int, int],
        text_length: int,
        *,
        bf16: bool,
        checkpointing: bool,
    ) -> int:
        """Bytes that the graph of one forward pass of one sample keeps; see `WanShape`."""
        return self.expert.graph_bytes(
            latent_shape, text_length, bf16=bf16, checkpointing=checkpointing
        )

    def transient_bytes(self, latent_shape: tuple[int, int, int, int], *, bf16: bool) -> int:
        """Bytes that a pass without a graph holds at its widest place, for one sample."""
        return self.expert.transient_bytes(latent_shape, bf16=bf16)


RELEASED_SHAPES = {
    "1.3b": WanShape(num_layers=30, width=1536, ffn_width=8960, num_heads=12),
    "5b": WanShape(
        num_layers=30,
        width=3072,
        ffn_width=14336,
        in_channels=48,
        out_channels=48,
        num_heads=24,
    ),
    "14b": WanShape(num_layers=40, width=5120, ffn_width=13824, num_heads=40),
}
"""Text-to-video models as released: Wan 2.1, and the 5B of Wan 2.2."""


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs
