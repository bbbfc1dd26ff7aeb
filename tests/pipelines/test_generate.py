"""`generate`: real files from a real WanPipeline, the same for the same prompt and seed."""

import contextlib
import io
import json
import shutil
from dataclasses import fields
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from pipelines.cli import app
from pipelines.data.clips.clip_decoding import decode_video
from pipelines.generate import SamplingOptions, generate
from pipelines.media.inference import (
    SETTINGS_FILE,
    InferenceSettings,
    read_inference_settings,
    write_inference_settings,
)
from sgmd_core.errors import ConfigError, ModelFolderError, ShapeError
from sgmd_core.rollout import euler_sample
from sgmd_core.schedule import FlowMatchSchedule
from sgmd_core.seeds import random_generator
from tests.helpers.logs import record_warnings
from tests.helpers.tiny_wan import (
    HEIGHT,
    LATENT_SHAPE,
    NUM_FRAMES,
    TEXT_LENGTH,
    WIDTH,
    write_tiny_wan,
)
from workers.models.scheduler import at_levels, build_scheduler

PROMPT = "a red circle moves left"
FPS = 8


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = write_tiny_wan(tmp_path_factory.mktemp("wan") / "model", PROMPT.split())
    settings = InferenceSettings(
        num_steps=2,
        guidance_scale=1.0,
        flow_shift=5.0,
        text_length=TEXT_LENGTH,
        num_frames=NUM_FRAMES,
        height=HEIGHT,
        width=WIDTH,
        fps=FPS,
    )
    write_inference_settings(folder, settings)
    return folder


def asked(settings: dict[str, object]) -> dict[str, object]:
    """Arguments of `generate`, those of `SamplingOptions` as its `options`."""
    names = {each.name for each in fields(SamplingOptions)} & settings.keys()
    options = SamplingOptions(**{name: settings[name] for name in names})
    return {name: settings[name] for name in settings.keys() - names} | {"options": options}


def frames_of(model: Path, output: Path, prompts=(PROMPT,), **settings) -> np.ndarray:
    return list(generate(model, prompts, output=output, **asked(settings)))[-1].frames


class TestFiles:
    @pytest.mark.slow
    def test_the_mp4_has_the_frames_the_rate_and_the_enlarged_size(self, model, tmp_path):
        (clip,) = generate(model, [PROMPT], output=tmp_path, formats=["mp4"])
        (path,) = clip.paths
        with av.open(io.BytesIO(path.read_bytes())) as container:
            stream = container.streams.video[0]
            assert stream.codec_context.name == "h264"
            assert stream.codec_context.pix_fmt == "yuv420p"
            assert stream.average_rate == Fraction(FPS)
        assert decode_video(path.read_bytes()).shape == (NUM_FRAMES, 256, 256, 3)

    @pytest.mark.slow
    def test_the_mp4_shows_the_frames(self, model, tmp_path):
        (clip,) = generate(model, [PROMPT], output=tmp_path, formats=["mp4"], zoom=8)
        shown = decode_video(clip.paths[0].read_bytes())[:, 4::8, 4::8].astype(float)
        assert np.abs(shown - clip.frames).mean() < 10

    @pytest.mark.slow
    def test_the_gif_loops_over_every_frame(self, model, tmp_path):
        (clip,) = generate(model, [PROMPT], output=tmp_path, formats=["gif"], zoom=2)
        with Image.open(clip.paths[0]) as gif:
            assert gif.size == (2 * WIDTH, 2 * HEIGHT)
            assert gif.info["loop"] == 0
            # Frames that equal the one before are merged into it.
            assert 1 < gif.n_frames <= NUM_FRAMES

    @pytest.mark.slow
    def test_names_tell_prompt_and_seed(self, model, tmp_path):
        (clip,) = generate(model, ["A red, red circle!"], output=tmp_path, seed=3, zoom=1)
        assert [path.name for path in clip.paths] == [
            "00-a-red-red-circle-seed3.mp4",
            "00-a-red-red-circle-seed3.gif",
        ]

    @pytest.mark.slow
    def test_every_prompt_is_shown_by_one_clip_a_seed_and_names_are_kept_in_any_script(
        self, model, tmp_path
    ):
        coming = generate(
            model, ["Красный круг", PROMPT], output=tmp_path, seed=[5, 6, 5], formats=["mp4"]
        )
        # Sampled as they are asked for.
        assert not any(tmp_path.iterdir())
        clips = list(coming)
        assert [clip.paths[0].name for clip in clips] == [
            "00-красный-круг-seed5.mp4",
            "00-красный-круг-seed6.mp4",
            "01-a-red-circle-moves-left-seed5.mp4",
            "01-a-red-circle-moves-left-seed6.mp4",
        ]
        alone = frames_of(model, tmp_path, seed=6)
        assert np.array_equal(clips[3].frames, alone)
        assert not np.array_equal(clips[2].frames, alone)

    @pytest.mark.slow
    def test_words_that_the_tokenizer_does_not_know_are_said(self, model, tmp_path, monkeypatch):
        warnings = record_warnings("pipelines.generate", monkeypatch)
        generate(model, [PROMPT], output=tmp_path)
        assert warnings == []
        generate(model, [PROMPT, "a zebra moves left"], output=tmp_path)
        (text,) = warnings
        assert text.startswith("1 of the 2 captions read have words")
        assert "'zebra'" in text

    @pytest.mark.slow
    def test_the_command_takes_a_file_of_prompts_and_a_number_of_clips(self, model, tmp_path):
        (tmp_path / "prompts.csv").write_text('prompt\na red circle\n"red, left"\n')
        arguments = ["--prompts", "prompts.csv", "--num-clips", "2", "--seed", "7"]
        result = command(tmp_path, "generate", str(model), *arguments, "--json")
        assert result.exit_code == 0, result.stderr
        found = [(clip["prompt"], clip["seed"]) for clip in json.loads(result.stdout)]
        assert found == [
            ("a red circle", 7),
            ("a red circle", 8),
            ("red, left", 7),
            ("red, left", 8),
        ]
        assert len(list((tmp_path / "clips").glob("*.mp4"))) == 4

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ([], "Give --prompt or --prompts FILE"),
            (["--prompts", "nowhere.txt"], "Check the address"),
            (["--prompt", "a", "--num-clips", "2", "--seed", "1", "--seed", "2"], "one of them"),
        ],
    )
    def test_a_command_without_prompts_or_with_two_kinds_of_seeds_is_refused(
        self, model, tmp_path, arguments, words
    ):
        result = command(tmp_path, "generate", str(model), *arguments)
        assert result.exit_code == 2
        assert words in " ".join(result.stderr.split())


def command(folder: Path, *arguments: str) -> Result:
    with contextlib.chdir(folder):
        return CliRunner().invoke(app, arguments)


class TestSampling:
    @pytest.mark.slow
    def test_the_same_seed_gives_the_same_clip_whatever_else_is_asked_for(self, model, tmp_path):
        alone = frames_of(model, tmp_path)
        together = frames_of(model, tmp_path, prompts=("a red red left", PROMPT))
        assert np.array_equal(alone, together)

    @pytest.mark.slow
    def test_another_seed_gives_another_clip(self, model, tmp_path):
        assert not np.array_equal(frames_of(model, tmp_path), frames_of(model, tmp_path, seed=1))

    @pytest.mark.slow
    def test_the_folder_says_how_many_steps_and_an_argument_says_otherwise(self, model, tmp_path):
        calls: list[tuple[int, int]] = []
        frames_of(model, tmp_path, on_progress=lambda done, total: calls.append((done, total)))
        assert calls == [(1, 2), (2, 2)]
        calls.clear()
        frames_of(
            model,
            tmp_path,
            prompts=(PROMPT, PROMPT),
            num_steps=1,
            on_progress=lambda done, total: calls.append((done, total)),
        )
        assert calls == [(1, 2), (2, 2)]

    @pytest.mark.slow
    @pytest.mark.parametrize("change", [{"flow_shift": 1.0}, {"guidance_scale": 6.0}])
    def test_an_argument_reaches_the_sampler(self, model, tmp_path, change):
        plain = frames_of(model, tmp_path, num_steps=3)
        assert not np.array_equal(plain, frames_of(model, tmp_path, num_steps=3, **change))

    @pytest.mark.slow
    def test_a_run_stands_for_its_generator(self, model, tmp_path):
        run = tmp_path / "run"
        shutil.copytree(model, run / "generator")
        (run / "config.yaml").write_text("name: run\n")
        assert np.array_equal(frames_of(run, tmp_path), frames_of(model, tmp_path))

    @pytest.mark.parametrize("num_steps", [1, 4, 30])
    @pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
    def test_the_scheduler_of_our_folders_takes_the_steps_that_evaluate_takes(
        self, num_steps, shift
    ):
        def velocity(x_t: torch.Tensor, sigma: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
            return torch.sin(3 * x_t) + sigma[:, None, None, None, None]

        noise = torch.randn((2, *LATENT_SHAPE), generator=random_generator(0, "test"))
        grid = FlowMatchSchedule(shift=shift).few_step_grid(num_steps)
        measured = euler_sample(velocity, grid, noise, torch.zeros(2, 1, 1))
        # Not every scheduler of diffusers takes our grid: FlowMatchEulerDiscreteScheduler does not.
        scheduler = build_scheduler(shift)
        scheduler.set_timesteps(num_steps)
        shown = noise
        for index, time in enumerate(scheduler.timesteps):
            sigma = scheduler.sigmas[index].expand(2)
            shown = scheduler.step(velocity(shown, sigma, noise), time, shown, return_dict=False)[0]
        # Its raw grid runs down to 1/1000 where ours runs to 0.
        assert (shown - measured).abs().max() < 0.01

    @pytest.mark.parametrize(
        "steps", [(1000, 500), (1000, 757, 522), (1000, 300), (999, 500), (1000, 500, 0)]
    )
    def test_listed_steps_are_the_ones_that_the_scheduler_takes(self, steps):
        def velocity(x_t: torch.Tensor, sigma: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
            return torch.sin(3 * x_t) + sigma[:, None, None, None, None]

        noise = torch.randn((2, *LATENT_SHAPE), generator=random_generator(0, "test"))
        grid = FlowMatchSchedule(shift=3.0, steps=steps).sampling_grid(len(steps), 1.0)
        measured = euler_sample(velocity, grid, noise, torch.zeros(2, 1, 1))
        scheduler = at_levels(build_scheduler(3.0), grid)
        scheduler.set_timesteps(len(steps))
        shown = noise
        for index, time in enumerate(scheduler.timesteps):
            sigma = scheduler.sigmas[index].expand(2)
            shown = scheduler.step(velocity(shown, sigma, noise), time, shown, return_dict=False)[0]
        assert (shown - measured).abs().max() < 1e-3

    @pytest.mark.slow
    def test_a_folder_with_listed_steps_takes_them_for_as_many_unguided_steps(
        self, model, tmp_path
    ):
        folder = shutil.copytree(model, tmp_path / "model")
        settings = read_inference_settings(folder)
        plain = frames_of(folder, tmp_path / "plain", num_steps=2, guidance_scale=1.0)
        listed = settings.model_copy(update={"steps": (1000, 300)})
        write_inference_settings(folder, listed)
        assert read_inference_settings(folder) == listed
        shown = frames_of(folder, tmp_path / "listed", num_steps=2, guidance_scale=1.0)
        assert not np.array_equal(shown, plain)
        three = frames_of(folder, tmp_path / "three", num_steps=3, guidance_scale=1.0)
        assert np.array_equal(
            three, frames_of(model, tmp_path / "base", num_steps=3, guidance_scale=1.0)
        )

    @pytest.mark.parametrize(("num_steps", "most"), [(4, 0.001), (30, 0.004)])
    def test_the_grid_of_our_folders_is_as_far_from_the_trained_one_as_its_description_says(
        self, num_steps, most
    ):
        for shift in (1.0, 3.0, 5.0):
            scheduler = build_scheduler(shift)
            scheduler.set_timesteps(num_steps)
            grid = FlowMatchSchedule(shift=shift).few_step_grid(num_steps)
            apart = (scheduler.sigmas - grid).abs()
            # By the formula of the description, except the first one, 1 - 1e-6, and the last, 0.
            place = torch.arange(1, num_steps).double() / num_steps
            raw = 1 - 0.999 * place
            described = shift * raw / (1 + (shift - 1) * raw)
            torch.testing.assert_close(
                scheduler.sigmas[1:-1].double(), described, rtol=0, atol=2e-6
            )
            assert 1e-4 < float(apart.max()) <= most


class TestWrongRequests:
    def test_a_run_without_a_generator_says_so(self, tmp_path):
        (tmp_path / "config.yaml").write_text("name: run\n")
        with pytest.raises(ModelFolderError, match="come to its end"):
            generate(tmp_path, [PROMPT], output=tmp_path)

    def test_a_missing_folder_is_named(self, tmp_path):
        with pytest.raises(ModelFolderError, match="nowhere"):
            generate(tmp_path / "nowhere", [PROMPT], output=tmp_path)

    @pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
    def test_torn_weights_are_named(self, model, tmp_path, part):
        folder = shutil.copytree(model, tmp_path / "model")
        weights = next((folder / part).glob("*.safetensors"))
        weights.write_bytes(weights.read_bytes()[:-100])
        with pytest.raises(ModelFolderError, match=part):
            generate(folder, [PROMPT], output=tmp_path)

    def test_a_settings_file_that_cannot_be_used_is_named(self, model, tmp_path):
        folder = shutil.copytree(model, tmp_path / "model")
        (folder / SETTINGS_FILE).write_text(json.dumps({"num_steps": 0}))
        with pytest.raises(ModelFolderError, match="num_steps = 0"):
            generate(folder, [PROMPT], output=tmp_path)

    @pytest.mark.slow
    def test_a_clip_of_another_size_than_the_folders_own_has_it_in_its_name(self, model, tmp_path):
        options = (asked({}), asked({"height": 2 * HEIGHT}))
        plain, tall = (
            next(generate(model, [PROMPT], output=tmp_path, formats=["gif"], **each)).paths[0]
            for each in options
        )
        assert tall.stem.startswith(f"{plain.stem}-{2 * HEIGHT}x")

    @pytest.mark.parametrize("size", [{"height": 24}, {"width": 20}, {"num_frames": 8}])
    def test_a_clip_that_does_not_fit_is_refused(self, model, tmp_path, size):
        with pytest.raises(ShapeError, match="multiple"):
            generate(model, [PROMPT], output=tmp_path, **asked(size))

    @pytest.mark.parametrize(
        ("request_", "word"),
        [
            ({"prompts": []}, "prompts"),
            ({"prompts": ["  "]}, "prompts"),
            ({"formats": ["avi"]}, "formats"),
            ({"num_steps": 0}, "num_steps"),
            ({"guidance_scale": 0.5}, "guidance_scale"),
            ({"flow_shift": 0.0}, "flow_shift"),
            ({"zoom": 0}, "zoom"),
        ],
    )
    def test_settings_out_of_range_are_named(self, model, tmp_path, request_, word):
        with pytest.raises(ConfigError, match=word):
            generate(model, **asked({"prompts": [PROMPT], "output": tmp_path, **request_}))
