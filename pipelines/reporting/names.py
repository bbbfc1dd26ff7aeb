"""Titles and meanings of recorded quantities, for the report."""

from collections.abc import Iterable, Mapping
from typing import Any

from sgmd_core.objectives.adversarial import NOISE_THIRDS
from workers.measures import MEASURES

_TITLES = {
    "logit_gap": "gap of the logits",
    **{f"logit_gap_{name}": f"gap of the logits, {name} noise" for name in NOISE_THIRDS},
    "above_floor": "distance above floor",
    "ratio": "distance ÷ few-step teacher's",
    "generator": "generator loss",
    "fisher_norm": "Fisher gradient",
    "nr_norm": "negative residual gradient",
    "tracking_lag": "lag of the fake score",
    "held_tracking": "held tracking loss",
    "copy_rate": "rate of the best copy",
    "generator_rate": "rate of the generator",
    **{each.name: each.title for each in MEASURES},
}
_ABOUT = {
    "fisher": "How far the fake score is from the teacher on the generator's clips",
    "negative_residual": "The fake score's error on the clips, which the generator pushes up",
    "residual_contraction": "The same error, which the fake score's tracking pushes down",
    "generator": "What the generator minimises",
    "tracking": "What the fake score minimises",
    "fisher_norm": "Norm of the Fisher term's gradient at the fake score's prediction",
    "nr_norm": "Norm of the negative residual's gradient at the fake score's prediction",
    "logit_gap": "Mean logit of what the discriminator should accept, minus what it should refuse",
    "tracking_lag": "Share of the tracking loss that goes away while the generator waits",
    "held_tracking": "Tracking loss on held batches of the present generator",
    "copy_rate": "Learning rate of the copy whose loss drops most, over the fake score's own",
    "generator_rate": "Share of its learning rate that the governor leaves the generator",
    "above_floor": "Distance to the teacher's clips, less what other seeds alone make of it",
    "ratio": "Distance above the floor, over that of the teacher in as few unguided steps",
    **{each.name: each.about for each in MEASURES},
}
"""Meanings, in the order in which a reader meets the figures."""


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


def measures_table() -> str:
    """Table of docs/judging.md: every measure with its unit, meaning and known answer."""
    rows = [
        f"| `{each.name}` | {each.about} | {each.unit} | {'yes' if each.has_ratio else ''} "
        f"| {each.known} |"
        for each in MEASURES
    ]
    heads = "| figure | meaning | unit | ratio | known answer in the tests |"
    return "\n".join([heads, "|---|---|---|---|---|", *rows])


def duration(seconds: float) -> str:
    """Seconds as a reader says them."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
