"""Measures of clips: one list from which figures, names, titles and tables are made.

    MEASURES -> figures of validation, evaluation and study      (`pipelines.run.records`)
             -> titles and explanations of the report, table of docs/judging.md

A new measure of single clips is one entry with its function. A measure from another package comes
in by the entry point group `sgmd.measures`, whose values are objects of `Measure`:

    [project.entry-points."sgmd.measures"]
    brightness = "my_package.brightness:BRIGHTNESS"

The package must be installed wherever a clip is measured. One that cannot be used costs a warning,
and its figures are unknown. No measure here needs a trained network.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sgmd_core.errors import ShapeError
from sgmd_core.extensions import Extension, load_extensions
from sgmd_core.metrics.appearance import contrast, saturation, sharpness
from sgmd_core.metrics.distributions import (
    count_distance,
    direction_distance,
    direction_entropy,
    speed_distance,
    still_share,
    texture_distance,
)
from sgmd_core.metrics.motion import (
    dynamic_clips,
    flicker,
    mean_magnitude,
    smoothness,
    top_magnitude,
)
from workers.measure import ClipView, Measure

ENTRY_POINTS = "sgmd.measures"
MIN_FRAMES = 3
"""Smoothness compares two successive steps of a motion."""
_MADE_OF_OTHERS = ("above_floor", "ratio", "speed_ratio")
"""Figures of an evaluation that are no measures of their own."""

_OWN: tuple[Measure, ...] = (
    Measure(
        "frechet",
        "distance",
        "Fréchet distance to the teacher's clips; the floor is not subtracted",
        known="a set against itself is 0; grows with noise",
        has_ratio=False,
        leads=True,
    ),
    Measure(
        "frechet_floor",
        "floor of the distance",
        "Fréchet distance between the teacher's clips of two seeds",
        has_ratio=False,
    ),
    Measure(
        "colour",
        "colour right",
        "Share of clips in the caption's colour",
        known="1 for rendered clips",
        needs_shapes=True,
        leads=True,
    ),
    Measure(
        "shape",
        "shape right",
        "Share of clips with the caption's shape",
        known="1 for rendered clips",
        needs_shapes=True,
        leads=True,
    ),
    Measure(
        "direction",
        "direction right",
        "Share of clips that move the caption's way",
        known="1 for rendered clips",
        needs_shapes=True,
        leads=True,
    ),
    Measure(
        "mean_speed_px_per_frame",
        "speed, px/frame",
        "Mean measured speed",
        unit="px/frame",
        known="that of rendered clips",
        needs_shapes=True,
    ),
    Measure(
        "speed_spearman",
        "speed rank",
        "Rank correlation of measured and captioned speed",
        known="above 0.99 for rendered clips",
        has_ratio=False,
        needs_shapes=True,
    ),
    Measure(
        "flow",
        "flow, px/frame",
        "Optical flow, mean over all pixels",
        unit="px/frame",
        known="a shift of 2 px is 2 px; a still clip is 0",
        function=lambda view: mean_magnitude(view.flow),
    ),
    Measure(
        "flow_top",
        "flow of fastest 5 %",
        "Optical flow of the fastest 5 % of each frame",
        unit="px/frame",
        known="grows with speed",
        function=lambda view: top_magnitude(view.flow),
        leads="ratio",
    ),
    Measure(
        "dynamic",
        "dynamic share",
        "Share of clips that move enough (the rule of VBench, on this flow)",
        known="still clips 0, shifted ones 1",
        function=lambda view: dynamic_clips(view.thinned_flow).float(),
    ),
    Measure(
        "smoothness",
        "motion smoothness",
        "Evenness of the motion; 1 is a constant velocity",
        known="1 for a constant shift",
        function=lambda view: smoothness(view.flow),
    ),
    Measure(
        "flicker",
        "flicker",
        "Change of colour that motion does not explain, of a range of 1",
        known="0 for still clips; grows with noise",
        function=lambda view: flicker(view.clip, view.flow),
    ),
    Measure(
        "saturation",
        "saturation",
        "Distance between the strongest and the weakest colour of a pixel",
        known="0 for grey",
        function=lambda view: saturation(view.clip),
        leads="ratio",
    ),
    Measure(
        "contrast",
        "contrast",
        "Spread of brightness within a frame",
        known="that of a chessboard",
        function=lambda view: contrast(view.clip),
    ),
    Measure(
        "sharpness",
        "sharpness",
        "Departure of brightness from its neighbours' mean",
        known="0 for a ramp",
        function=lambda view: sharpness(view.clip),
        leads="ratio",
    ),
    Measure(
        "diversity",
        "diversity of seeds",
        "Distance between two clips of a caption, made from different noise",
        known="equal clips 0",
        leads="ratio",
    ),
    Measure(
        "speed_distance",
        "speed distance",
        "Wasserstein distance of the objects' speeds to those of the teacher's clips",
        unit="px/frame",
        known="that of shifted speeds is the shift",
        of_motion=speed_distance,
        ranks=False,
    ),
    Measure(
        "direction_distance",
        "direction distance",
        "Total variation of the sectors, of eight, in which objects start, to the teacher's",
        known="equal sets 0; other sectors 1",
        of_motion=direction_distance,
        ranks=False,
    ),
    Measure(
        "direction_entropy",
        "direction entropy",
        "Entropy of the sectors in which objects start",
        unit="bits",
        known="one sector 0, all eight alike 3",
        of_motion=direction_entropy,
        ranks=False,
    ),
    Measure(
        "still_share",
        "still clips",
        "Share of the clips in which nothing moves",
        known="that of drawn speeds",
        of_motion=still_share,
        ranks=False,
    ),
    Measure(
        "count_distance",
        "count distance",
        "Total variation of the numbers of objects to the teacher's",
        known="equal sets 0; other numbers 1",
        of_motion=count_distance,
        ranks=False,
    ),
    Measure(
        "texture_distance",
        "texture distance",
        "Wasserstein distance of the contrasts of backgrounds to the teacher's; world `open`",
        known="that of shifted contrasts is the shift",
        of_motion=texture_distance,
        ranks=False,
    ),
    Measure(
        "seconds_per_clip",
        "seconds a video",
        "From caption to pixels, decoding included",
        unit="s",
        has_ratio=False,
        ranks=False,
    ),
)


def load_measure(point: EntryPoint, others: Sequence[Measure]) -> Measure:
    """Loads a measure of another package.

    Args:
        point: Its entry point.
        others: Measures that have a name already.

    Raises:
        ConfigError: It cannot be imported, is no `Measure` with a function, has a function without
            a source file, or takes the name of another figure, ratios included.
    """
    extension = Extension("measure", point)
    expected = "an object of sgmd.Measure with a function of single clips"
    measure = extension.load(expected)
    if not isinstance(measure, Measure) or measure.function is None:
        raise extension.refusal(repr(measure), expected)
    if measure_source(measure.function) is None:
        found = f"the function {measure.function!r}"
        raise extension.refusal(found, "a function of a module with a source file")
    taken = {name for other in others for name in _figure_names(other)} | {*_MADE_OF_OTHERS}
    if twice := sorted(taken.intersection(_figure_names(measure))):
        raise extension.refusal(f"a second {', '.join(twice)}", "names of its own")
    return measure


def measure_source(function: Callable[..., Any]) -> Path | None:
    """File of the module that a measure's function is defined in; None where there is none."""
    while isinstance(function, partial):
        function = function.func
    module = sys.modules.get(str(getattr(function, "__module__", "")))
    file = getattr(module, "__file__", None)
    return Path(file) if file and Path(file).is_file() else None


def _figure_names(measure: Measure) -> tuple[str, ...]:
    return (measure.name, f"{measure.name}_ratio") if measure.has_ratio else (measure.name,)


_FROM_OUTSIDE = load_extensions(ENTRY_POINTS, "a measure", load_measure, _OWN).usable

OUTSIDE_ORIGINS = tuple(
    (measure.name, point.value, *((point.dist.name, point.dist.version) if point.dist else ()))
    for point, measure in _FROM_OUTSIDE.items()
)
"""Origin of each measure of another package: its name, object, package and version."""

MEASURES = (*_OWN, *_FROM_OUTSIDE.values())
"""Every measure, ours first, in the order in which readers meet them."""

CLIP_MEASURES = {measure.name: measure.function for measure in MEASURES if measure.function}
"""Functions of the measures of single clips, by name."""

MOTION_MEASURES = {measure.name: measure.of_motion for measure in MEASURES if measure.of_motion}
"""Functions of the measures of sets of clips of an embedded world, by name."""


def measure_clip_figures(video: Tensor, fps: int) -> dict[str, Tensor]:
    """Measures clips one by one, so that only one clip's flow is in memory.

    Args:
        video: Clips (b, 3, f, h, w) in [0, 1], at least `MIN_FRAMES` frames of 12 x 12 pixels.
        fps: Frames a second.

    Returns:
        One value a clip (b,), by the names of `CLIP_MEASURES`.

    Raises:
        ShapeError: The clips are too short or too small.
    """
    rows = [_figures(ClipView(clip[None].float().cpu(), fps)) for clip in video]
    return {name: torch.cat([row[name] for row in rows]) for name in CLIP_MEASURES}


def _figures(view: ClipView) -> dict[str, Tensor]:
    return {name: one_figure(name, function(view)) for name, function in CLIP_MEASURES.items()}


def one_figure(name: str, value: Any) -> Tensor:  # noqa: ANN401  (whatever a function returns)
    """The value of a measure for one clip, checked.

    Several values a clip would be averaged without an error, and have the interval of more clips or
    of fewer.

    Raises:
        ShapeError: It is not a tensor of one element, (1,).
    """
    if isinstance(value, Tensor) and value.shape == (1,):
        return value
    shape = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
    # Package and version, or the object that it is where no package has it.
    origins = [" ".join(each[2:]) or each[1] for each in OUTSIDE_ORIGINS if each[0] == name]
    raise ShapeError(
        f"measuring {' of '.join([name, *origins])} on a clip",
        shape,
        "a tensor of shape (1,), one value for the clip",
        "Correct the function of the measure",
    )
