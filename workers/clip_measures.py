"""The figures of a clip that need no learned network: motion and looks, one value a clip."""

import torch
from torch import Tensor

from sgmd_core.metrics.appearance import contrast, saturation, sharpness
from sgmd_core.metrics.motion import (
    dynamic_clips,
    dynamic_interval,
    flicker,
    mean_magnitude,
    smoothness,
    top_magnitude,
)
from workers.optical_flow import optical_flow

MEASURES = (
    "flow",
    "flow_top",
    "dynamic",
    "smoothness",
    "flicker",
    "saturation",
    "contrast",
    "sharpness",
)
"""What `measure_clip_figures` gives, in this order."""


MIN_FRAMES = 3
"""Evenness of a motion is seen in two steps of it."""


def measure_clip_figures(video: Tensor, fps: int) -> dict[str, Tensor]:
    """Measures clips one by one, so that only one clip's flow is in memory.

    Args:
        video: Clips (b, 3, f, h, w) in [0, 1], at least three frames of 12 x 12 pixels.
        fps: Frames a second.

    Returns:
        By name, one value a clip (b,):

        * `flow`, `flow_top`: length of the optical flow in pixels a frame, mean over all pixels
          and over the fastest 5 % of each frame;
        * `dynamic`: 1 where the clip moves enough by the rule of `motion.dynamic_clips`, else 0;
        * `smoothness`: evenness of the motion in [0, 1];
        * `flicker`: change of colour that motion does not explain, of a range of 1;
        * `saturation`, `contrast`, `sharpness`: see `metrics.appearance`.

    Raises:
        ShapeError: The clips are too short or too small.
    """
    rows = [_figures(clip[None].float().cpu(), fps) for clip in video]
    return {name: torch.cat([row[name] for row in rows]) for name in MEASURES}


def _figures(clip: Tensor, fps: int) -> dict[str, Tensor]:
    flow = optical_flow(clip)
    interval = dynamic_interval(fps)
    # Too short to be thinned: the rule is then applied to every frame.
    thinned = clip[:, :, ::interval] if clip.shape[2] > interval else clip
    between = flow if thinned.shape[2] == clip.shape[2] else optical_flow(thinned)
    return {
        "flow": mean_magnitude(flow),
        "flow_top": top_magnitude(flow),
        "dynamic": dynamic_clips(between).float(),
        "smoothness": smoothness(flow),
        "flicker": flicker(clip, flow),
        "saturation": saturation(clip),
        "contrast": contrast(clip),
        "sharpness": sharpness(clip),
    }
