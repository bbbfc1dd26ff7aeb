"""Settings of `pretrain` that cannot work are refused before anything is started."""

import itertools
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.config.recipe_files import load
from pipelines.embedded_worlds import embedded_world
from pipelines.pretraining.config import ROPE_LENGTH, PretrainConfig, latent_problems
from pipelines.pretraining.data import open_clips
from pipelines.pretraining.networks import build_transformer, build_vae
from pipelines.pretraining.quality import QualityReport, held_out_captions
from pipelines.pretraining.run import checked
from pipelines.pretraining.stages import stage_identities
from pipelines.pretraining.vae_stage import to_unit_video
from pipelines.shapes import ClipSplit
from sgmd_core.errors import ConfigError, DataError
from sgmd_core.worlds import WorldName
from sgmd_core.worlds.open_shapes import OpenScores
from tests.pipelines.pretraining.test_pretrain import micro_config, write_clips


def problems_of(*overrides: str) -> str:
    with pytest.raises(ConfigError) as refused:
        load(PretrainConfig, "pretrain-tiny", overrides)
    return str(refused.value)


IMPOSSIBLE = [
    ("seed=-1", "seed is -1, expected greater than or equal to 0"),
    ("seed=4294967296", "seed is 4294967296, expected less than or equal to 4294967295"),
    ("name=''", 'name is "", expected'),
    ("run_dir=''", 'run_dir is "", expected'),
    (
        "world.num_frames=12",
        "world.num_frames is 12, expected 1 + a multiple of 4",
    ),
    ("world.num_frames=1", "world.num_frames is 1, expected at least 5"),
    ("world.num_frames=301", "more than 64 patches"),
    ("world.frame_px=33", "world.frame_px is 33, expected a multiple of 8"),
    ("world.fps=70000", "world.fps is 70000, expected less than or equal to 65535"),
    ("vae.patch_size=3", "vae.patch_size is 3, expected one of [1, 2, 4, 8]"),
    ("vae.dim_mult=[1, 2]", "vae.dim_mult.2 is missing"),
    ("vae.dim_mult=[1, 3, 2]", "vae.dim_mult [1, 3, 2] has no shortcuts"),
    ("vae.short_clip_frames=4", "vae.short_clip_frames is 4, expected 1 + a multiple of 4"),
    ("vae.batch_size=2000000", "vae.batch_size is 2000000, expected less than"),
    ("text.num_heads=65", "text.num_heads 65 is more than text.hidden_dim 64"),
    ("text.long_length=20000", "text.long_length is 20000, expected less than"),
    ("denoiser.head_dim=31", "denoiser.head_dim is 31, expected a multiple of 2"),
    ("denoiser.patch_size=[1, 3, 1]", "denoiser.patch_size [1, 3, 1] does not divide the latents"),
    ("denoiser.betas=[0.9, 1.0]", "denoiser.betas.1 is 1.0, expected less than 1"),
    ("sampling.guidance_scale=20000", "sampling.guidance_scale is 20000, expected less than"),
]


@pytest.mark.parametrize(("override", "sentence"), IMPOSSIBLE)
def test_an_impossible_value_is_refused_in_one_sentence(override: str, sentence: str):
    assert sentence in problems_of(override)


def test_all_impossible_values_are_named_at_once():
    chosen = [pair for pair in IMPOSSIBLE if not pair[0].startswith(("name", "run_dir"))]
    by_key = {override.partition("=")[0]: (override, words) for override, words in chosen}
    # With a patch size of 3, what divides the frame is another question.
    by_key.pop("world.frame_px"), by_key.pop("denoiser.patch_size")
    overrides, sentences = zip(*by_key.values(), strict=True)
    found = problems_of(*overrides)
    assert [words for words in sentences if words not in found] == ["more than 64 patches"]


def test_the_command_refuses_before_it_looks_for_clips():
    arguments = ["pretrain", "pretrain-tiny", "--dry-run", "seed=-1", "world.num_frames=12"]
    found = CliRunner().invoke(app, [*arguments, "world.frame_px=33"])
    assert found.exit_code == 2
    for key in ("seed is -1", "world.num_frames is 12", "world.frame_px is 33"):
        assert key in found.stderr


@pytest.mark.slow
def test_the_shortcuts_that_settings_allow_are_those_that_the_networks_have():
    config = load(PretrainConfig, "pretrain-tiny")
    seen = set()
    for widths in itertools.product((1, 3, 8), repeat=3):
        try:
            with torch.device("meta"):
                build_vae(config.vae.model_copy(update={"dim_mult": widths, "base_dim": 1}))
            works = True
        except ValueError:
            works = False
        try:
            load(PretrainConfig, "pretrain-tiny", [f"vae.dim_mult={list(widths)}"])
            allowed = True
        except ConfigError:
            allowed = False
        assert works == allowed, widths
        seen.add(works)
    assert seen == {True, False}


@pytest.mark.parametrize(
    ("sizes", "patch", "fits"),
    [
        ((1, ROPE_LENGTH, 2), (1, 1, 1), True),
        ((1, ROPE_LENGTH + 1, 2), (1, 1, 1), False),
        ((1, 2 * ROPE_LENGTH, 2), (1, 2, 1), True),
        ((3, 2, 2), (2, 1, 1), False),
    ],
)
def test_the_latents_that_settings_allow_are_those_that_the_denoiser_takes(sizes, patch, fits):
    config = micro_config(Path("unused"))
    settings = config.denoiser.model_copy(update={"patch_size": patch})
    assert (not list(latent_problems((4, *sizes), patch))) == fits
    network = build_transformer(settings, config.text, 4)
    latents, text = torch.zeros(1, 4, *sizes), torch.zeros(1, 2, config.text.hidden_dim)
    try:
        velocity = network(latents, torch.zeros(1), text, return_dict=False)[0]
        assert (velocity.shape == latents.shape) == fits
    except RuntimeError:
        assert not fits


def test_more_workers_than_clips_are_refused_and_a_dry_run_starts_nothing(tmp_path: Path):
    write_clips(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    config = micro_config(tmp_path, ray={"num_workers": 5})
    with pytest.raises(ConfigError, match=r"4 clips and ray\.num_workers 5"):
        checked(config)
    assert checked(micro_config(tmp_path)).clips.num_rows == 16
    with pytest.raises(DataError, match="no such folder"):
        checked(micro_config(tmp_path / "elsewhere"))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_the_recipe_of_the_open_world_samples_and_scores_in_it():
    config = load(PretrainConfig, "pretrain-open")
    world = embedded_world(config.world.name)
    captions = held_out_captions(world, 64, 7)
    pixels, drawn = world.draw(7, range(64), ClipSplit.HELD_OUT)
    assert captions == drawn
    scores = world.score(to_unit_video(torch.from_numpy(pixels)), captions)
    assert isinstance(scores, OpenScores)
    assert min(scores.colour, scores.shape, scores.count) == 1
    longest = max(len(text.split()) for text in world.captions(0, range(2048), ClipSplit.TRAIN))
    assert longest < config.text.max_length


def test_a_teacher_of_another_world_is_another_stage(tmp_path: Path):
    config = micro_config(tmp_path)
    write_clips(tmp_path)
    other = config.model_copy(
        update={"world": config.world.model_copy(update={"name": WorldName.OPEN})}
    )
    clips = open_clips(config.world.train, config.world)
    first, second = (stage_identities(each, clips) for each in (config, other))
    assert first["vae"] == second["vae"]
    assert second["denoiser"] == {**first["denoiser"], "world.name": "open"}


@pytest.mark.parametrize("name", WorldName)
def test_a_report_names_the_scores_of_its_world(name: WorldName):
    world = embedded_world(name)
    pixels, captions = world.draw(7, range(16), ClipSplit.HELD_OUT)
    scores = world.score(to_unit_video(torch.from_numpy(pixels)), captions)
    words = QualityReport(scores, scores, scores, 30.0, scores, scores).in_words()
    assert words.startswith("16 held-out captions: colour 1.000, shape 1.000, direction ")
    assert ("count 1.000" in words) == (name is WorldName.OPEN)
    assert ("rank correlation" in words) == (name is WorldName.SHAPES)
