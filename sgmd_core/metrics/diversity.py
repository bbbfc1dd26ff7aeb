"""Diversity of clips of one caption: what a generator keeps of its initial noise.

Distributions can agree caption by caption in their means and still have lost their spread; and
scores that look at one clip at a time do not see that all clips of a caption are the same one.
"""

from jaxtyping import Float
from torch import Tensor

from sgmd_core.metrics.frechet import Features


def seed_diversity(features: Features, other_seed: Features) -> Float[Tensor, " g"]:
    """Distance between the two clips of a caption, made in the same way from two seeds.

        |features_i - other_seed_i|

    Args:
        features: One row a clip.
        other_seed: Those of clips of the same captions in the same order, from other noise.

    Returns:
        One value a caption, in units of the features: 0 where both clips are alike.
    """
    return (features.double() - other_seed.double()).square().sum(dim=1).sqrt()
