"""Features of clips by a network from a file, for a Frechet video distance of the usual kind.

The file is a TorchScript archive, such as the I3D that video papers share. Loading one runs no
Python code from it: its own operators are all it can do. A pickled module could do anything, and is
not accepted. Nothing is downloaded.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from sgmd_core.errors import ModelFolderError, ShapeError
from sgmd_core.metrics.frechet import Features

FeatureExtractor = Callable[[Tensor], Features]
"""Clips (b, 3, t, h, w) in [0, 1] to features (b, f)."""

_I3D_OPTIONS = {"rescale": False, "resize": True, "return_features": True}
_EXPECTED = "a TorchScript archive that takes clips (b, 3, t, h, w) in [-1, 1]"
_REMEDY = "Save one with torch.jit.save, or leave the features out for the built-in ones"


class FeatureNetwork:
    """A network that describes clips by one row of numbers each.

    Args:
        path: TorchScript archive. Its forward takes clips (b, 3, t, h, w) in [-1, 1]; one that
            also takes `rescale`, `resize` and `return_features`, as the shared I3D does, is told
            not to rescale, to resize, and to return features.
        device: Where it runs.

    Raises:
        ModelFolderError: The file is missing or no such archive.
    """

    def __init__(self, path: Path, device: torch.device | str = "cpu") -> None:
        attempted = f"loading the feature network {path}"
        if not path.is_file():
            raise ModelFolderError(attempted, "no such file", _EXPECTED, _REMEDY)
        try:
            self._network = torch.jit.load(str(path), map_location=device).eval()
            arguments = {argument.name for argument in self._network.forward.schema.arguments}
        except (RuntimeError, ValueError) as error:
            found = str(error).splitlines()[0]
            raise ModelFolderError(attempted, found, _EXPECTED, _REMEDY) from error
        self._options = _I3D_OPTIONS if arguments.issuperset(_I3D_OPTIONS) else {}
        self._path, self._device = path, device

    @torch.no_grad()
    def __call__(self, video: Tensor) -> Features:
        """Describes clips.

        Args:
            video: Clips (b, 3, t, h, w) in [0, 1].

        Returns:
            Features (b, f) in float32, on the CPU; what the network gives beyond two axes is
            laid out in a row.

        Raises:
            ShapeError: The network cannot take such clips, or gives no row for each.
        """
        try:
            found = self._network(video.float().to(self._device) * 2 - 1, **self._options)
        except RuntimeError as error:
            raise self._refusal(video, str(error).strip().splitlines()[-1]) from error
        if not isinstance(found, Tensor) or found.ndim < 2 or len(found) != len(video):
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise self._refusal(video, f"it gives {shape}")
        return found.float().cpu().flatten(1)

    def _refusal(self, video: Tensor, found: str) -> ShapeError:
        return ShapeError(
            f"describing clips of shape {tuple(video.shape)} by {self._path}",
            found,
            "one row of features a clip",
            "I3D needs about ten frames or more; longer clips or another network help",
        )
