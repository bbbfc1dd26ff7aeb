"""How different clips of one caption are: what a generator keeps of the noise it starts from.

Distributions can agree caption by caption in their means and still have lost their spread; and
scores that look at one clip at a time do not see that all clips of a caption are the same one.
"""

from collections.abc import Hashable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from sgmd_core.metrics.frechet import Features


def seed_diversity(features: Features, captions: Sequence[Hashable]) -> Float[Tensor, " g"]:
    """Mean distance between two clips of a caption, for each caption that has at least two.

        mean over pairs i < j of |features_i - features_j|

    Args:
        features: One row a clip.
        captions: What each clip should show; equal ones make a group.

    Returns:
        One value a group, in the order in which the captions first come, in units of the features:
        0 where all clips of a caption are alike. Empty where every caption is its own.
    """
    groups: dict[Hashable, list[int]] = {}
    for index, caption in enumerate(captions):
        groups.setdefault(caption, []).append(index)
    found = [
        torch.nn.functional.pdist(features[rows].double()).mean()
        for rows in groups.values()
        if len(rows) > 1
    ]
    return torch.stack(found) if found else torch.zeros(0, dtype=torch.float64)
