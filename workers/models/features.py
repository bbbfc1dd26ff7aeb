"""Features of a denoiser: what leaves some of its layers, as maps over the latents' tokens.

    (x_t, sigma, text)  ->  outputs of layers (b, tokens, width)  ->  maps (b, width, t, h, w)

The denoiser runs as it is, sharded and checkpointed or not, and hooks of one pass look at its
layers; the graph of what they saw leads back to the latents.
"""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from sgmd_core.errors import ShapeError
from sgmd_core.types import Latents, PerSample, Text
from workers.models.family import Denoiser

Hook = Callable[[nn.Module, object, Tensor], None]


def features_of(
    network: Denoiser, layers: Sequence[int], x_t: Latents, sigma: PerSample, text: Text
) -> list[Tensor]:
    """Maps of what leaves some layers of one pass, in float32, in the order of `layers`.

    Args:
        network: The denoiser.
        layers: Numbers of layers, counted from 1.
        x_t: Noisy latents.
        sigma: Their noise levels.
        text: Captions.

    Raises:
        ShapeError: A layer's output is not a sequence of the latents' tokens.
    """
    found: dict[int, Tensor] = {}

    def watch(layer: int) -> Hook:
        def hook(module: nn.Module, inputs: object, output: Tensor) -> None:
            found[layer] = output

        return hook

    blocks = network.blocks
    handles = [blocks[layer - 1].register_forward_hook(watch(layer)) for layer in layers]
    try:
        network(x_t, sigma, text)
    finally:
        for handle in handles:
            handle.remove()
    return [_as_map(network, x_t, found[layer]) for layer in layers]


def _as_map(network: Denoiser, x_t: Latents, tokens: Tensor) -> Tensor:
    sizes = zip(x_t.shape[2:], network.patch_size, strict=True)
    grid = tuple(size // patch for size, patch in sizes)
    frames, rows, columns = grid
    if tokens.ndim != 3 or tokens.shape[1] != frames * rows * columns:
        raise ShapeError(
            "taking features of a denoiser",
            f"an output of a layer of shape {tuple(tokens.shape)}",
            f"(batch, {frames * rows * columns}, width), a token for each of {grid}",
            "Choose a method without a discriminator for this family",
        )
    return tokens.float().transpose(1, 2).unflatten(2, grid)
