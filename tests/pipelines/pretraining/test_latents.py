"""Pretraining from latents that `sgmd encode` has stored: the numbers of training from videos."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipelines.data.clips.clip_format import ClipFormat
from pipelines.data.making.encode import encode
from pipelines.data.making.encode_options import EncodeOptions
from pipelines.pretraining.config import PretrainConfig
from pipelines.pretraining.data import (
    MemoryClips,
    collect,
    distinct_captions,
    latent_dataset,
    open_clips,
)
from pipelines.pretraining.denoiser_stage import DenoiserTraining
from pipelines.pretraining.events import PretrainEvent
from pipelines.pretraining.loops import build_pretrained_teacher
from pipelines.pretraining.run import pretrain
from pipelines.pretraining.stages import autoencoder_of, require_autoencoder, stage_identities
from sgmd_core.errors import ConfigError, DataError
from tests.helpers.moves import assert_moves, relative_error
from tests.pipelines.pretraining.test_pretrain import micro_config, write_clips

MODEL = str(Path(__file__).parents[3] / "assets" / "tiny-wan")
NUM_STEPS = 8
# Training encodes some clips at once and `encode` one by one, which rounds otherwise.
TOLERANCE = 1e-5

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Path:
    """`train/` and `held_out/` with videos, `latents/` with what `encode` makes of `train/`."""
    folder = tmp_path_factory.mktemp("clips")
    write_clips(folder)
    options = EncodeOptions(ClipFormat(13, 32, 32, 8), text_length=16, shard_clips=8)
    encode(str(folder / "train"), str(folder / "latents"), MODEL, options)
    return folder


def config_of(clips: Path, out: Path, train: str, **vae: object) -> PretrainConfig:
    """A recipe that takes an autoencoder, and ends after eight steps whatever it has learnt."""
    world = {"train": str(clips / train), "held_out": str(clips / "held_out")}
    config = micro_config(out, world=world, vae={"folder": MODEL, **vae})
    denoiser = config.denoiser.model_copy(update={"hold_until_score": 1.0})
    return config.model_copy(update={"denoiser": denoiser})


def clips_of(config: PretrainConfig) -> MemoryClips:
    """Latents as a training worker gathers them."""
    rows = latent_dataset(open_clips(config.world.train, config.world), Path(MODEL) / "vae")
    return collect(list(rows.iter_batches(batch_size=256)), "latents")


def trained(config: PretrainConfig, clips: MemoryClips) -> dict[str, torch.Tensor]:
    """The averaged networks after all steps, without Ray Train."""
    vocabulary = distinct_captions(open_clips(config.world.train, config.world))
    torch.manual_seed(config.seed)
    teacher = build_pretrained_teacher(config, vocabulary, clips.values.shape[1])
    training = DenoiserTraining(teacher, config.denoiser, config.text, seed=config.seed)
    for _ in range(NUM_STEPS):
        training.step(clips.values, clips.captions)
        training.watched(None)
    assert training.is_over
    with training.averaged() as averaged:
        return {name: value.clone() for name, value in averaged.state_dict().items()}


def test_stored_latents_train_the_denoiser_that_the_videos_train(
    folder: Path, tmp_path: Path
) -> None:
    videos, latents = (config_of(folder, tmp_path, name) for name in ("train", "latents"))
    computed, stored = clips_of(videos), clips_of(latents)
    expected = trained(videos, computed)
    # Other latents, and the same ones in another order, move the networks.
    other = replace(computed, values=1.01 * computed.values)
    assert_moves(expected, trained(videos, other), TOLERANCE)
    turned = MemoryClips(computed.values.flip(0), computed.captions[::-1])
    assert_moves(expected, trained(videos, turned), TOLERANCE)
    assert stored.captions == computed.captions
    assert relative_error({"latents": stored.values}, {"latents": computed.values}) < TOLERANCE
    assert relative_error(trained(latents, stored), expected) < TOLERANCE


@pytest.mark.timeout(900)
def test_a_run_on_stored_latents_trains_no_autoencoder_and_exports_the_one_that_made_them(
    folder: Path, tmp_path: Path
) -> None:
    config = config_of(folder, tmp_path, "latents")
    heard: list[PretrainEvent] = []
    result = pretrain(config, heard.append)
    assert {event.stage for event in heard} == {"denoiser", "quality"}
    assert autoencoder_of(str(result.output)) == autoencoder_of(MODEL)
    found = torch.load(tmp_path / "run" / "teacher" / "networks.pt", weights_only=True)
    assert relative_error(found, trained(config, clips_of(config))) < TOLERANCE


def test_latents_of_another_autoencoder_or_size_or_without_one_are_refused(
    folder: Path, tmp_path: Path
) -> None:
    config = config_of(folder, tmp_path, "latents")
    clips = open_clips(config.world.train, config.world)
    require_autoencoder(config, clips)
    without = config_of(folder, tmp_path, "latents", folder=None)
    with pytest.raises(ConfigError, match=r"no videos to train an autoencoder on.*Set vae\.folder"):
        pretrain(without)
    world = config.world.model_copy(update={"frame_px": 16})
    with pytest.raises(DataError, match=r"latents of \(16, 4, 4, 4\).*\(16, 4, 2, 2\)"):
        pretrain(config.model_copy(update={"world": world}))
    other = replace(clips.source.encoding, vae="0123456789abcdef")
    source = replace(clips.source, encoding=other)
    with pytest.raises(DataError, match=r"the autoencoder 0123456789abcdef.*Set vae\.folder"):
        require_autoencoder(config, replace(clips, source=source))
    assert not (tmp_path / "run").exists()


def test_the_content_of_the_autoencoder_counts_and_not_the_settings_that_would_train_one(
    folder: Path, tmp_path: Path
) -> None:
    config = config_of(folder, tmp_path, "latents")
    clips = open_clips(config.world.train, config.world)
    now = stage_identities(config, clips)
    assert now["vae"] == {"the content of vae.folder": autoencoder_of(MODEL)}
    assert now == stage_identities(config_of(folder, tmp_path, "latents", num_steps=99), clips)
    assert now["denoiser"]["the content of vae.folder"] == autoencoder_of(MODEL)
