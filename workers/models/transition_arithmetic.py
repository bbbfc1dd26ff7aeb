"""Parameters, operations and bytes of a Wan denoiser with a flow head, by its shape alone.

    forward    backbone, and N times: embedding of the inner state, flow head, H layers, projection

Counted as in `wan_arithmetic`, to the product. Only a pass's own inner noise needs no gradient: the
states after it do.
"""

from dataclasses import dataclass, replace
from math import prod

from workers.models.flow_head import NUM_FEATURES
from workers.models.shape import PassFlops
from workers.models.wan_arithmetic import DerivedShape, WanShape


@dataclass(frozen=True, slots=True)
class TransitionShape(DerivedShape):
    """The numbers that fix a Wan denoiser with a flow head.

    Attributes:
        base: The denoiser.
        head_layers: Its last layers that belong to the head.
        inner_steps: Steps of the inner flow.
    """

    base: WanShape
    head_layers: int
    inner_steps: int

    @property
    def denoiser(self) -> WanShape:
        """Shape of the base's denoiser, of which backbone and flow head are made."""
        return self.base

    @property
    def num_layers(self) -> int:
        """Layers of backbone and head."""
        return self.base.num_layers

    @property
    def num_passed_layers(self) -> int:
        """Layers that one sample passes through: those of the head in each inner step."""
        return self.base.num_layers + (self.inner_steps - 1) * self.head_layers

    @property
    def num_parameters(self) -> int:
        """Parameters of the denoiser and of what its head has besides."""
        d = self.width
        embedding = NUM_FEATURES * d + d + d * d + d
        return self.base.num_parameters + 2 * embedding + d + 5 * (d * d + d)

    def forward_flops(self, latent_shape: tuple[int, int, int, int], text_length: int) -> int:
        """Operations of one forward pass of one sample: of all inner steps."""
        return self.pass_flops(latent_shape, text_length).forward

    def pass_flops(self, latent_shape: tuple[int, int, int, int], text_length: int) -> PassFlops:
        """Operations of one forward pass of one sample, and of the backward passes after it."""
        base = self.base.pass_flops(latent_shape, text_length)
        # A layer's own passes: what a denoiser of one more layer has more.
        more = replace(self.base, num_layers=self.base.num_layers + 1)
        layer = more.pass_flops(latent_shape, text_length)
        repeated = (self.inner_steps - 1) * self.head_layers
        n, d, steps = self.num_tokens(latent_shape), self.width, self.inner_steps
        patches = n * d * prod(self.base.patch_size) * self.base.in_channels
        out = (steps - 1) * n * d * prod(self.base.patch_size) * self.base.out_channels
        tokens, places = 3 * n * d * d, 4 * d * d
        firsts = 2 * NUM_FEATURES * d
        products = steps * (patches + tokens + places + firsts) + out
        moved = (steps - 1) * (patches + 2 * n * d * d) + steps * n * d * d + out
        return PassFlops(
            forward=base.forward + repeated * (layer.forward - base.forward) + 2 * products,
            to_input=base.to_input + repeated * (layer.to_input - base.to_input) + 2 * moved,
            to_parameters=base.to_parameters
            + repeated * (layer.to_parameters - base.to_parameters)
            + 2 * (2 * products - patches - steps * firsts),
            attention=base.attention + repeated * (layer.attention - base.attention),
        )

    def graph_bytes(
        self,
        latent_shape: tuple[int, int, int, int],
        text_length: int,
        *,
        bf16: bool,
        checkpointing: bool,
    ) -> int:
        """Bytes that one sample's forward pass keeps for its backward pass: of all inner steps."""
        base, more = (
            shape.graph_bytes(latent_shape, text_length, bf16=bf16, checkpointing=checkpointing)
            for shape in (self.base, replace(self.base, num_layers=self.base.num_layers + 1))
        )
        own = self.inner_steps * 40 * self.num_tokens(latent_shape) * self.width
        return base + (self.inner_steps - 1) * self.head_layers * (more - base) + own

    def transient_bytes(self, latent_shape: tuple[int, int, int, int], *, bf16: bool) -> int:
        """Bytes that a pass without a graph holds at its widest place, for one sample."""
        # The backbone's tokens are kept beside the head's.
        kept = 12 * self.num_tokens(latent_shape) * self.width
        return self.base.transient_bytes(latent_shape, bf16=bf16) + kept
