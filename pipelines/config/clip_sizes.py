"""Sizes of a recipe's clips against the networks: shapes of latents, or a refusal."""

import logging
from collections.abc import Callable, Iterator

from pipelines.config.recipe_sections import RecipeSections
from sgmd_core.buckets import LatentBuckets
from sgmd_core.errors import ShapeError
from workers.clip_settings import VideoSettings
from workers.models.family import SamplingRules
from workers.models.folder import LatentShape

_log = logging.getLogger(__name__)


def trained_shapes(
    video: VideoSettings, latent_shape: Callable[[int, int, int], LatentShape]
) -> LatentBuckets:
    """Shapes of the latents that a run trains, in the order of its buckets.

    Args:
        video: Section `video`.
        latent_shape: Shape of the latents of (frames, height, width), as a `ModelFolder` has it.

    Raises:
        ShapeError: A size does not divide into latent cells and patches; names the nearest ones.
    """
    shapes: list[LatentShape] = []
    for number, bucket in enumerate(video.trained):
        try:
            shapes.append(latent_shape(*bucket.size))
        except ShapeError as error:
            if not video.buckets:
                raise
            raise ShapeError(
                f"{error.attempted}, of video.buckets[{number}]",
                error.found,
                error.expected,
                f"Correct video.buckets[{number}], {bucket.label}",
            ) from error
    return LatentBuckets(tuple(shapes), video.bucket_weights)


def require_samplable(video: VideoSettings, rules: SamplingRules) -> None:
    """Checks that clips of every bucket can be sampled from the exported folder.

    Of the run's own size it warns alone: training and validations do without the pipeline.

    Args:
        video: Section `video`.
        rules: Of the family's pipeline.

    Raises:
        ShapeError: That pipeline refuses the size of a bucket.
    """
    step = rules.multiple_px
    for number, bucket in enumerate(video.buckets):
        if bucket.height % step or bucket.width % step:
            raise ShapeError(
                f"checking that clips of video.buckets[{number}] can be sampled",
                f"frames of {bucket.height}x{bucket.width}",
                f"height and width to be multiples of {step} ({rules.source}'s rule)",
                f"Correct video.buckets[{number}], {bucket.label}",
            )
    if video.height % step or video.width % step:
        _log.warning(
            "%s samples heights and widths that are multiples of %d: it will refuse the generator "
            "at its own %dx%d, and so will sgmd generate; set video.height and video.width to be "
            "able to use it",
            rules.source,
            step,
            video.height,
            video.width,
        )


def compiled_sizes(config: RecipeSections) -> Iterator[str]:
    """Returns a sentence where compiled layers meet several sizes."""
    compiled = [role for role, compute in config.computes.items() if compute.compile]
    if len(config.video.trained) > 1 and compiled:
        yield (
            f"compute.compile of {', '.join(compiled)}: layers are compiled again for the next "
            "sizes of video.buckets, until one code serves them all; which code an iteration runs "
            "depends on those before it, so a resumed run may round otherwise"
        )
