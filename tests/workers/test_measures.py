"""Figures of real pixels: what is rendered moves as it was told, and the flow finds it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from pipelines.shapes import ClipSplit, render, sample_spec
from sgmd_core.errors import ModelFolderError, ShapeError
from sgmd_core.metrics.frechet import clip_features, fit_gaussian, frechet_distance
from workers.feature_network import FeatureNetwork
from workers.i3d import UNITS, I3d
from workers.measures import CLIP_MEASURES, measure_clip_figures
from workers.optical_flow import optical_flow

SIDE, FRAMES = 32, 13


def texture_moving(right: float, down: float, frames: int = FRAMES, side: int = SIDE):
    """A smooth random picture that shifts by an exact part of a pixel a frame."""
    noise = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    smooth = functional.avg_pool2d(functional.avg_pool2d(noise, 5, 1, 2), 5, 1, 2)
    smooth = (smooth - smooth.min()) / (smooth.max() - smooth.min())
    rows = torch.arange(side, dtype=torch.float32)
    clip = []
    for frame in range(frames):
        y, x = torch.meshgrid(32 + rows - down * frame, 32 + rows - right * frame, indexing="ij")
        grid = torch.stack([2 * x / 95 - 1, 2 * y / 95 - 1], dim=-1)[None]
        clip.append(functional.grid_sample(smooth, grid, mode="bicubic", align_corners=True))
    return torch.stack(clip, dim=2).clamp(0, 1)


@pytest.mark.parametrize("shift", [(2.0, 0.0), (0.0, 2.0), (-2.0, 0.0), (1.2, -1.6)])
def test_a_pure_shift_of_two_pixels_is_a_flow_of_two_pixels(shift):
    video = texture_moving(*shift)
    flow = optical_flow(video)
    assert flow.shape == (1, FRAMES - 1, 2, SIDE, SIDE)
    # Dense Inverse Search errs by about 0.1 at the frame's edge, where things come in.
    torch.testing.assert_close(flow.mean(dim=(0, 1, 3, 4)), torch.tensor(shift), atol=0.03, rtol=0)
    figures = measure_clip_figures(video, fps=8)
    assert figures["flow"].item() == pytest.approx(2.0, abs=0.03)
    assert figures["flow_top"].item() == pytest.approx(2.0, abs=0.15)
    assert figures["dynamic"].item() == 1
    assert figures["smoothness"].item() > 0.97
    assert figures["flicker"].item() < 0.02


def test_a_still_clip_has_no_flow_and_no_flicker():
    figures = measure_clip_figures(texture_moving(0.0, 0.0), fps=8)
    assert (figures["flow"].item(), figures["flow_top"].item()) == (0, 0)
    assert figures["dynamic"].item() == 0
    assert figures["smoothness"].item() == 1
    assert figures["flicker"].item() < 1e-5


def test_flow_grows_with_speed_and_flicker_with_noise():
    speeds = [0.25, 0.5, 1.0, 2.0]
    found = [measure_clip_figures(texture_moving(v, 0.0), 8)["flow"].item() for v in speeds]
    assert found == pytest.approx(speeds, abs=0.03)
    clip = texture_moving(1.0, 0.0)
    noise = torch.randn(clip.shape, generator=torch.Generator().manual_seed(1))
    noisy = [
        measure_clip_figures((clip + level * noise).clamp(0, 1), 8)["flicker"].item()
        for level in (0.0, 0.02, 0.05, 0.1)
    ]
    assert noisy == sorted(noisy)
    assert noisy[-1] > 4 * noisy[0]


def rendered(count: int):
    specs = [sample_spec(0, index, ClipSplit.HELD_OUT) for index in range(count)]
    frames = torch.stack([torch.from_numpy(render(spec)) for spec in specs])
    return specs, frames.permute(0, 4, 1, 2, 3).float() / 255


@pytest.mark.slow
def test_clips_of_shapes_move_as_fast_as_they_were_told():
    specs, video = rendered(32)
    found = measure_clip_figures(video, fps=8)["flow_top"]
    told = torch.tensor([spec.speed_px_per_frame for spec in specs])
    # A few clips hardly differ from their background in brightness, and are read wrongly.
    low, median, high = (found / told).quantile(torch.tensor([0.1, 0.5, 0.8])).tolist()
    assert median == pytest.approx(1.0, abs=0.03)
    assert low > 0.88
    assert high < 1.12


@pytest.mark.slow
def test_clips_are_measured_one_by_one_whatever_the_batch():
    _, video = rendered(3)
    together = measure_clip_figures(video, fps=8)
    assert tuple(together) == tuple(CLIP_MEASURES)
    for name, values in together.items():
        assert values.shape == (3,)
        alone = torch.cat([measure_clip_figures(clip[None], fps=8)[name] for clip in video])
        assert torch.equal(values, alone), name


def test_the_dynamic_rule_is_applied_at_eight_frames_a_second():
    # 0.5 pixels a frame are below the threshold of 0.75; at 16 frames a second they are 1.0.
    clip = texture_moving(0.5, 0.0)
    assert measure_clip_figures(clip, fps=8)["dynamic"].item() == 0
    assert measure_clip_figures(clip, fps=16)["dynamic"].item() == 1


@pytest.mark.parametrize("shape", [(1, 3, 1, 32, 32), (1, 3, 5, 8, 32)])
def test_clips_without_a_flow_are_refused(shape):
    with pytest.raises(ShapeError, match="at least 2 frames of 12 x 12"):
        optical_flow(torch.zeros(shape))


def thin_i3d(folder: Path, seed: int = 0) -> Path:
    """An I3D of few channels with random weights, as a file."""
    torch.manual_seed(seed)
    network = I3d(dict.fromkeys(UNITS, 4), num_classes=5)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm3d):
            # A spread that few random channels keep up through all blocks.
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.05, 0.2)
            module.bias.data.uniform_(0, 0.5)
    path = folder / "i3d.safetensors"
    save_file(network.state_dict(), path)
    return path


KINETICS = {
    **{"Conv3d_1a_7x7": 64, "Conv3d_2b_1x1": 64, "Conv3d_2c_3x3": 192},
    **{
        f"Mixed_{block}.{branch}": width
        for block, widths in {
            "3b": (64, 96, 128, 16, 32, 32),
            "3c": (128, 128, 192, 32, 96, 64),
            "4b": (192, 96, 208, 16, 48, 64),
            "4c": (160, 112, 224, 24, 64, 64),
            "4d": (128, 128, 256, 24, 64, 64),
            "4e": (112, 144, 288, 32, 64, 64),
            "4f": (256, 160, 320, 32, 128, 128),
            "5b": (256, 160, 320, 32, 128, 128),
            "5c": (384, 192, 384, 48, 128, 128),
        }.items()
        for branch, width in zip(("b0", "b1a", "b1b", "b2a", "b2b", "b3b"), widths, strict=True)
    },
}


def test_the_i3d_of_kinetics_has_as_many_parameters_as_its_paper_says():
    with torch.device("meta"):
        network = I3d(KINETICS, num_classes=400)
    # 12.3 million without the classifier of 400 classes and its bias.
    assert sum(value.numel() for value in network.parameters()) == 12_697_264


@pytest.mark.slow
def test_a_feature_network_sees_clips_from_minus_one_to_one(tmp_path):
    extract = FeatureNetwork(thin_i3d(tmp_path))
    video = torch.rand(2, 3, 9, 16, 16)
    network = I3d(dict.fromkeys(UNITS, 4), num_classes=5).eval()
    network.load_state_dict(load_file(tmp_path / "i3d.safetensors"))
    frames = video.movedim(2, 1).flatten(0, 1)
    large = nn.functional.interpolate(frames, (224, 224), mode="bilinear").unflatten(0, (2, 9))
    expected = network(large.movedim(1, 2) * 2 - 1)
    torch.testing.assert_close(extract(video), expected.detach(), rtol=1e-4, atol=1e-5)
    assert extract(video).shape == (2, 5)
    assert (extract(video)[0] - extract(video)[1]).abs().max() > 1e-3


def test_pickles_and_torchscript_are_refused_and_never_loaded(tmp_path):
    written = tmp_path / "written-by-a-script"

    class Writing(nn.Module):
        def __init__(self, path: str) -> None:
            super().__init__()
            self.path = path

        def forward(self, video: torch.Tensor) -> torch.Tensor:
            torch.save(video, self.path)
            return video

    script = tmp_path / "script.pt"
    torch.jit.save(torch.jit.script(Writing(str(written))), str(script))
    pickled = tmp_path / "pickled.pt"
    torch.save(nn.Linear(1, 1), pickled)
    for path in (script, pickled):
        with pytest.raises(ModelFolderError, match="pickles and TorchScript are never loaded"):
            FeatureNetwork(path)
    assert not written.exists()
    with pytest.raises(ModelFolderError, match="no such file"):
        FeatureNetwork(tmp_path / "missing.safetensors")


def test_weights_of_another_network_are_refused(tmp_path):
    other = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(1)}, other)
    with pytest.raises(ModelFolderError, match=r"no tensor 'Conv3d_1a_7x7"):
        FeatureNetwork(other)


def test_clips_that_are_too_short_for_the_network_are_refused(tmp_path):
    with pytest.raises(ShapeError, match="9 frames or more"):
        FeatureNetwork(thin_i3d(tmp_path))(torch.zeros(2, 3, 4, 8, 8))


@pytest.mark.slow
def test_the_distance_of_a_set_to_itself_is_nothing_and_grows_with_noise():
    _, video = rendered(24)
    noise = torch.randn(video.shape, generator=torch.Generator().manual_seed(2))
    reference = fit_gaussian(clip_features(video))
    found = [
        frechet_distance(
            *fit_gaussian(clip_features((video + level * noise).clamp(0, 1))), *reference
        )
        for level in (0.0, 0.05, 0.2)
    ]
    assert found[0] == pytest.approx(0, abs=1e-9)
    assert found == sorted(found)
    assert found[2] > 1e-3
