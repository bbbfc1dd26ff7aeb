"""Clips that a model can make, by the numbers of its autoencoder and denoiser alone."""

import pytest

from sgmd_core.errors import ShapeError
from workers.models.folder import ClipGeometry


@pytest.mark.parametrize("temporal", [1, 4, 8])
@pytest.mark.parametrize("patch", [1, 2, 3])
def test_clips_are_those_whose_latent_frames_divide_into_patches(temporal: int, patch: int) -> None:
    geometry = ClipGeometry(4, temporal, 4, (patch, 2, 2))
    for num_frames in range(1, 60):
        whole, rest = divmod(num_frames - 1, temporal)
        if rest == 0 and (whole + 1) % patch == 0:
            assert geometry.latent_shape(num_frames, 16, 24) == (4, whole + 1, 4, 6)
        else:
            with pytest.raises(ShapeError, match=r"frames = \d+ \+ a multiple of") as refused:
                geometry.latent_shape(num_frames, 16, 24)
            # Of the sizes that are named each is one.
            words = str(refused.value).partition("the nearest are ")[2].partition(" frames")[0]
            for near in map(int, words.split(" or ")):
                assert geometry.latent_shape(near, 16, 24)
