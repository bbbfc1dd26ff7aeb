"""Features of clips by an I3D network from a file, for a Fréchet video distance of the usual kind.

The file holds tensors only (safetensors), and the architecture is ours: nothing in the file can
run. Pickled modules and TorchScript archives are refused, because both can: operators of a script
read and write any file. Nothing is downloaded.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from sgmd_core.errors import ModelFolderError, ShapeError
from sgmd_core.metrics.frechet import Features
from workers.i3d import UNITS, I3d

FeatureExtractor = Callable[[Tensor], Features]
"""Clips (b, 3, t, h, w) in [0, 1] to features (b, f)."""

_SIDE_PX = 224
_MIN_FRAMES = 9
_EXPECTED = "a .safetensors file with the parameters of an I3D, named as in pytorch-i3d"
_REMEDY = (
    "Convert the network where you trust its file: safetensors.torch.save_file("
    "network.state_dict(), FILE); or leave --features out for the built-in features"
)


class FeatureNetwork:
    """An I3D that describes clips by its logits.

    Args:
        path: Parameters, as safetensors.
        device: Where it runs.

    Raises:
        ModelFolderError: The file is missing, of another format or of another network.
    """

    def __init__(self, path: Path, device: torch.device | str = "cpu") -> None:
        attempted = f"loading the feature network {path}"
        if not path.is_file():
            raise ModelFolderError(attempted, "no such file", _EXPECTED, _REMEDY)
        try:
            weights = load_file(path)
        except (OSError, SafetensorError) as error:
            found = f"no safetensors file ({error}); pickles and TorchScript are never loaded"
            raise ModelFolderError(attempted, found, _EXPECTED, _REMEDY) from error
        try:
            widths = {unit: len(weights[f"{unit}.conv3d.weight"]) for unit in UNITS}
            network = I3d(widths, len(weights["logits.conv3d.weight"]))
            network.load_state_dict(weights)
        except KeyError as error:
            raise ModelFolderError(attempted, f"no tensor {error}", _EXPECTED, _REMEDY) from error
        except RuntimeError as error:
            found = " ".join(str(error).split())[:300]
            raise ModelFolderError(attempted, found, _EXPECTED, _REMEDY) from error
        self._network = network.eval().to(device)
        self._path, self._device = path, device

    @torch.no_grad()
    def __call__(self, video: Tensor) -> Features:
        """Describes clips.

        Args:
            video: Clips (b, 3, t, h, w) in [0, 1]; scaled to 224 x 224 pixels.

        Returns:
            Logits (b, f) in float32, on the CPU.

        Raises:
            ShapeError: The clips have fewer than nine frames.
        """
        if video.shape[2] < _MIN_FRAMES:
            raise ShapeError(
                f"describing clips of shape {tuple(video.shape)} by {self._path}",
                f"{video.shape[2]} frames",
                f"{_MIN_FRAMES} frames or more",
                "Sample longer clips, or leave --features out for the built-in features",
            )
        rows = [self._network(self._prepared(clip)) for clip in video]
        return torch.cat(rows).float().cpu()

    def _prepared(self, clip: Tensor) -> Tensor:
        """One clip as the network takes it: (1, 3, t, 224, 224) in [-1, 1]."""
        frames = clip.float().to(self._device).movedim(1, 0)
        size = (_SIDE_PX, _SIDE_PX)
        scaled = functional.interpolate(frames, size, mode="bilinear", align_corners=False)
        return scaled.movedim(0, 1)[None] * 2 - 1
