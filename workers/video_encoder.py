"""Clips to latents.

A clip is encoded alone, never beside others: the shape of a batch changes the rounding, and latents
must not depend on which clips came with them.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workers.models.family import Autoencoder
from workers.placement import device_of

_PIXEL_LEVELS = 255.0


class VideoEncoder:
    """Encodes clips with a frozen autoencoder.

    Args:
        vae: The autoencoder.
    """

    def __init__(self, vae: Autoencoder) -> None:
        self._vae = vae

    def encode(self, pixels: NDArray[np.uint8]) -> Tensor:
        """Encodes one clip.

        Args:
            pixels: (frames, height, width, 3), RGB.

        Returns:
            Normalised latents (channels, frames, rows, columns), float32, on the CPU.

        Raises:
            ShapeError: the autoencoder cannot encode clips of this size.
        """
        # A copy: what Ray hands over is read-only.
        video = torch.from_numpy(pixels.copy()).to(device_of(self._vae.network))
        video = video.permute(3, 0, 1, 2)[None].float() / _PIXEL_LEVELS
        return self._vae.encode(video)[0].cpu()
