"""I3D: an Inception network inflated to video, whose features Fréchet video distances use.

    stem 7x7x7 /2 -> pool -> 1x1x1, 3x3x3 -> pool -> 3b 3c -> pool -> 4b..4f -> pool -> 5b 5c
    -> mean over time and space -> logits

A block `Mixed` joins four branches: 1x1x1; 1x1x1 and 3x3x3; 1x1x1 and 3x3x3; pool and 1x1x1. Every
convolution is followed by batch normalisation and a ReLU. Names of parameters are those of
pytorch-i3d, in which the Kinetics weights are shared. Widths are read from the weights.

Source: Quo Vadis, Action Recognition? (arXiv:1705.07750), figure 3.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

_BATCH_NORM_EPS = 1e-3
_STEM = ("Conv3d_1a_7x7", "Conv3d_2b_1x1", "Conv3d_2c_3x3")
_MIXED = ("3b", "3c", "4b", "4c", "4d", "4e", "4f", "5b", "5c")
_BRANCHES = ("b0", "b1a", "b1b", "b2a", "b2b", "b3b")
UNITS = (*_STEM, *(f"Mixed_{block}.{branch}" for block in _MIXED for branch in _BRANCHES))
"""Names of the convolution units, each with a `conv3d.weight`."""


class I3d(nn.Module):
    """Logits of clips.

    Args:
        widths: Output channels of each of `UNITS`.
        num_classes: Logits; 400 for Kinetics.
    """

    def __init__(self, widths: Mapping[str, int], num_classes: int) -> None:
        super().__init__()
        self.Conv3d_1a_7x7 = _Unit(3, widths[_STEM[0]], kernel=7, stride=2)
        self.Conv3d_2b_1x1 = _Unit(widths[_STEM[0]], widths[_STEM[1]], kernel=1)
        self.Conv3d_2c_3x3 = _Unit(widths[_STEM[1]], widths[_STEM[2]], kernel=3)
        channels = widths[_STEM[2]]
        for block in _MIXED:
            own = {branch: widths[f"Mixed_{block}.{branch}"] for branch in _BRANCHES}
            self.add_module(f"Mixed_{block}", _Mixed(channels, own))
            channels = own["b0"] + own["b1b"] + own["b2b"] + own["b3b"]
        self.logits = _Logits(channels, num_classes)

    def forward(self, video: Tensor) -> Tensor:
        """Computes logits.

        Args:
            video: Clips (b, 3, t, h, w) in [-1, 1], at 224 x 224 pixels and ten frames or more.

        Returns:
            Logits (b, classes), means over time and space.
        """
        x = _pool(self.Conv3d_1a_7x7(video), (1, 3, 3), (1, 2, 2))
        x = _pool(self.Conv3d_2c_3x3(self.Conv3d_2b_1x1(x)), (1, 3, 3), (1, 2, 2))
        for block in _MIXED:
            if block == "4b":
                x = _pool(x, (3, 3, 3), (2, 2, 2))
            if block == "5b":
                x = _pool(x, (2, 2, 2), (2, 2, 2))
            x = self.get_submodule(f"Mixed_{block}")(x)
        return self.logits(x).mean(dim=(2, 3, 4))


class _Unit(nn.Module):
    """Convolution, batch normalisation, ReLU; padded like TensorFlow's SAME."""

    def __init__(self, channels: int, width: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(channels, width, kernel, stride, bias=False)
        self.bn = nn.BatchNorm3d(width, eps=_BATCH_NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.conv3d.kernel_size, self.conv3d.stride
        return functional.relu(self.bn(self.conv3d(_padded(x, kernel, stride))))


class _Mixed(nn.Module):
    """Four branches side by side."""

    def __init__(self, channels: int, widths: Mapping[str, int]) -> None:
        super().__init__()
        self.b0 = _Unit(channels, widths["b0"], kernel=1)
        self.b1a = _Unit(channels, widths["b1a"], kernel=1)
        self.b1b = _Unit(widths["b1a"], widths["b1b"], kernel=3)
        self.b2a = _Unit(channels, widths["b2a"], kernel=1)
        self.b2b = _Unit(widths["b2a"], widths["b2b"], kernel=3)
        self.b3b = _Unit(channels, widths["b3b"], kernel=1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = _pool(x, (3, 3, 3), (1, 1, 1))
        branches = [self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(pooled)]
        return torch.cat(branches, dim=1)


class _Logits(nn.Module):
    """The classifier, a convolution of one cell with a bias."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(channels, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3d(x)


def _padded(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """Zeros around, as many as make the output ceil(size / stride), the odd one at the end."""
    around: list[int] = []
    for size, width, step in zip(
        reversed(x.shape[2:]), reversed(kernel), reversed(stride), strict=True
    ):
        total = max((-(-size // step) - 1) * step + width - size, 0)
        around += [total // 2, total - total // 2]
    return functional.pad(x, around)


def _pool(x: Tensor, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> Tensor:
    return functional.max_pool3d(_padded(x, kernel, stride), kernel, stride)
