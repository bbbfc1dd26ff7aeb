"""Three numbers of the pictures of a clip that drift when a distillation fails.

    saturation  mean over pixels of max - min of red, green, blue
    contrast    standard deviation of brightness within a frame, averaged over frames
    sharpness   root mean square of the Laplacian of brightness

All are in units of the video, whose range is 1, and have no meaning of their own: compare them with
the same numbers of the teacher's clips of the same captions and seeds. Few-step generators tend to
grow too colourful and too contrasty with training, or to blur.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from sgmd_core.errors import ShapeError

RgbVideo = Float[Tensor, "b 3 t h w"]
PerClip = Float[Tensor, " b"]

_LUMA = (0.299, 0.587, 0.114)


def brightness(video: RgbVideo) -> Float[Tensor, "b t h w"]:
    """Luma of ITU-R BT.601: what 8-bit video calls Y, in units of the video."""
    weights = torch.tensor(_LUMA, dtype=video.dtype, device=video.device)
    return torch.einsum("bcthw,c->bthw", video, weights)


def saturation(video: RgbVideo) -> PerClip:
    """Mean distance between the strongest and the weakest colour of a pixel; 0 for grey."""
    return (video.amax(dim=1) - video.amin(dim=1)).flatten(1).mean(dim=1)


def contrast(video: RgbVideo) -> PerClip:
    """Spread of brightness within a frame; 0 for plain frames, at most 0.5."""
    return brightness(video).flatten(2).std(dim=2, correction=0).mean(dim=1)


def sharpness(video: RgbVideo) -> PerClip:
    """Returns how much brightness departs from the mean of its four neighbours; 0 for plain frames.

    Raises:
        ShapeError: The frames have no inner pixel.
    """
    if min(video.shape[3:]) < 3:
        raise ShapeError(
            "measuring sharpness",
            f"frames of {video.shape[3]} x {video.shape[4]} pixels",
            "at least 3 x 3 pixels",
        )
    kernel = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])
    kernel = (kernel / 4).to(video).reshape(1, 1, 3, 3)
    frames = brightness(video).flatten(0, 1)[:, None]
    squared = functional.conv2d(frames, kernel).square()
    return squared.reshape(len(video), -1).mean(dim=1).sqrt()
