"""What recorded quantities are called on the page, and what they mean."""

from collections.abc import Iterable, Mapping
from typing import Any

_TITLES = {
    "colour": "colour right",
    "shape": "shape right",
    "direction": "direction right",
    "speed_spearman": "speed rank",
    "mean_speed_px_per_frame": "speed, px/frame",
    "frechet": "distance",
    "above_floor": "distance above floor",
    "ratio": "distance ÷ few-step teacher's",
    "seconds_per_clip": "seconds a video",
    "frechet_floor": "floor of the distance",
    "flow": "flow, px/frame",
    "flow_top": "flow of fastest 5 %",
    "dynamic": "dynamic share",
    "smoothness": "motion smoothness",
    "diversity": "diversity of seeds",
    "generator": "generator loss",
    "fisher_norm": "Fisher gradient",
    "nr_norm": "negative residual gradient",
}
_ABOUT = {
    "fisher": "How far the fake score is from the teacher on the generator's clips",
    "negative_residual": "The fake score's error on the clips, which the generator pushes up",
    "residual_contraction": "The same error, which the fake score's tracking pushes down",
    "generator": "What the generator minimises",
    "tracking": "What the fake score minimises",
    "fisher_norm": "Norm of the Fisher term's gradient at the clips",
    "nr_norm": "Norm of the negative residual's gradient at the clips",
    "frechet": "Fréchet distance to the teacher's clips; its floor is not taken off",
    "above_floor": "Distance to the teacher's clips, less what other seeds alone make of it",
    "ratio": "Distance above the floor, over that of the teacher in as few unguided steps",
    "colour": "Share of clips in the caption's colour",
    "shape": "Share of clips with the caption's shape",
    "direction": "Share of clips that move the caption's way",
    "speed_spearman": "Rank correlation of measured and captioned speed",
    "mean_speed_px_per_frame": "Mean measured speed",
    "flow_top": "Optical flow of the fastest 5 % of each frame",
    "flow": "Optical flow, mean over all pixels",
    "dynamic": "Share of clips that move enough (the rule of VBench, on this flow)",
    "smoothness": "How evenly things move; 1 is a constant velocity",
    "flicker": "Change of colour that motion does not explain",
    "saturation": "Distance between the strongest and the weakest colour of a pixel",
    "contrast": "Spread of brightness within a frame",
    "sharpness": "Departure of brightness from its neighbours' mean",
    "diversity": "Distance between two clips of a caption, made from different noise",
    "seconds_per_clip": "From caption to pixels, decoding included",
}


_RATIO = "_ratio"


def title(name: str) -> str:
    """A name for a reader; one that is not known here is only freed of its underscores."""
    if name.endswith(_RATIO) and name not in _TITLES:
        return f"{title(name.removesuffix(_RATIO)).partition(',')[0]} ÷ teacher's"
    return _TITLES.get(name, name.replace("_", " "))


def about(name: str) -> str:
    """One line on what it means; empty where nothing is known."""
    if name.endswith(_RATIO) and name not in _ABOUT:
        meant = _ABOUT.get(name.removesuffix(_RATIO), "")
        return f"{meant}; 1 is the teacher's, of the same captions and noise" if meant else ""
    return _ABOUT.get(name, "")


def in_order(groups: Iterable[Mapping[str, Any]]) -> list[str]:
    """All keys; those explained here first, in the order of the explanations."""
    found = dict.fromkeys(name for group in groups for name in group)
    known = [name for name in _ABOUT if name in found]
    return [*known, *(name for name in found if name not in _ABOUT)]


def duration(seconds: float) -> str:
    """Seconds as a reader says them."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
