"""Amount and evenness of a clip's motion, and its flicker, from its optical flow.

A flow says where each pixel of a frame is in the next one: (right, down) in pixels a frame. Where
it comes from is not decided here.

    magnitude   |flow|: mean over the clip, and mean over the fastest 5 % of each frame
    dynamic     whether enough frames have a top 5 % above a threshold
    smoothness  how little the flow of a thing changes on its way: 1 for even motion or none
    flicker     change of brightness that is left when motion is taken off
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from sgmd_core.errors import ShapeError

Flow = Float[Tensor, "b t 2 h w"]
PerClip = Float[Tensor, " b"]
Video = Float[Tensor, "b c f h w"]

TOP_SHARE = 0.05
_DYNAMIC_FPS = 8
_DYNAMIC_PX_PER_SIDE_PX = 6 / 256
_DYNAMIC_FRAMES_PER_FRAME = 4 / 16


def mean_magnitude(flow: Flow) -> PerClip:
    """Mean length of the flow over pixels and frames, in pixels a frame."""
    return _magnitude(flow).flatten(1).mean(dim=1)


def top_magnitude(flow: Flow) -> PerClip:
    """Mean length of the flow over the fastest 5 % of each frame, averaged over frames.

    A small thing that moves fast shows here, where the mean over all pixels hides it.
    """
    return _top_by_frame(flow).mean(dim=1)


def dynamic_interval(fps: int) -> int:
    """Frames from one that `dynamic_clips` wants to the next: it looks at 8 frames a second."""
    return max(1, round(fps / _DYNAMIC_FPS))


def dynamic_clips(flow: Flow) -> Bool[Tensor, " b"]:
    """Selects the clips that move, by the rule of VBench's dynamic degree on any flow.

    A clip is dynamic if the top 5 % of at least `round(frames / 4)` steps is faster than 6 pixels
    a step for every 256 pixels of its shorter side. The benchmark takes its flow from a learned
    network; shares that come from another flow are like its shares and not comparable with them.

    Args:
        flow: Between frames that are `dynamic_interval` apart.
    """
    num_frames, side = flow.shape[1] + 1, min(flow.shape[3:])
    fast = _top_by_frame(flow) > _DYNAMIC_PX_PER_SIDE_PX * side
    return fast.sum(dim=1) >= round(_DYNAMIC_FRAMES_PER_FRAME * num_frames)


def smoothness(flow: Flow) -> PerClip:
    """Returns the evenness of motion, in [0, 1].

        1 - sum |flow| * change / sum |flow|
        change = |then - flow| / (|then| + |flow|),   then = flow_next(x + flow(x))

    1 for a constant velocity and for a still clip, 0 where every motion reverses at each frame.
    Pixels count by how fast they move, so a background does not count that something passes over.

    Raises:
        ShapeError: The clips have fewer than three frames.
    """
    if flow.shape[1] < 2:
        raise ShapeError(
            "measuring how smooth motion is",
            f"clips of {flow.shape[1] + 1} frames",
            "at least 3 frames",
        )
    now = flow[:, :-1].flatten(0, 1)
    then, inside = _followed(flow[:, 1:].flatten(0, 1), now)
    speed, tiny = _length(now, dim=1), torch.finfo(flow.dtype).tiny
    change = _length(then - now, dim=1) / (_length(then, dim=1) + speed).clamp_min(tiny)
    weight = (speed * inside).reshape(len(flow), -1)
    uneven = (weight * change.reshape(len(flow), -1)).sum(dim=1)
    return 1 - uneven / weight.sum(dim=1).clamp_min(tiny)


def flicker(video: Video, flow: Flow) -> PerClip:
    """Mean absolute change between successive frames, once motion is taken off.

        mean |video_next(x + flow(x)) - video(x)|     over pixels that stay inside the frame

    Args:
        video: Clips, f = t + 1 frames.
        flow: From each frame to the next.

    Returns:
        One value a clip, in units of the video: 0 for a still clip, and for one that moves as its
        flow says; of 1, the range of brightness, for one that flashes between black and white.
    """
    before = video[:, :, :-1].transpose(1, 2).flatten(0, 1)
    after = video[:, :, 1:].transpose(1, 2).flatten(0, 1)
    followed, inside = _followed(after, flow.flatten(0, 1))
    change = (followed - before).abs().mean(dim=1) * inside
    per_clip = (part.reshape(len(video), -1).sum(dim=1) for part in (change, inside))
    total, count = per_clip
    return total / count.clamp_min(1)


def _magnitude(flow: Flow) -> Float[Tensor, "b t h w"]:
    return _length(flow, dim=2)


def _length(vectors: Tensor, dim: int) -> Tensor:
    return vectors.square().sum(dim=dim).sqrt()


def _top_by_frame(flow: Flow) -> Float[Tensor, "b t"]:
    pixels = _magnitude(flow).flatten(2)
    return pixels.topk(max(1, int(TOP_SHARE * pixels.shape[2])), dim=2).values.mean(dim=2)


def _followed(
    frames: Float[Tensor, "n c h w"], flow: Float[Tensor, "n 2 h w"]
) -> tuple[Float[Tensor, "n c h w"], Float[Tensor, "n h w"]]:
    """Frames looked up where the flow leads, and 1 where that is inside the frame."""
    height, width = frames.shape[2:]
    y, x = torch.meshgrid(
        torch.arange(height, dtype=flow.dtype, device=flow.device),
        torch.arange(width, dtype=flow.dtype, device=flow.device),
        indexing="ij",
    )
    x, y = x + flow[:, 0], y + flow[:, 1]
    inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    # grid_sample counts from -1 at the first pixel's centre to 1 at the last one's.
    grid = torch.stack([2 * x / max(1, width - 1) - 1, 2 * y / max(1, height - 1) - 1], dim=-1)
    followed = functional.grid_sample(frames, grid, padding_mode="border", align_corners=True)
    return followed, inside.to(flow.dtype)
