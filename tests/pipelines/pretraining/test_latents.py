"""Pretraining from latents that `sgmd encode` has stored: the numbers of training from videos."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import ray
import torch

from cluster.lease import LEASE_OBJECT
from pipelines.data.clips.clip_format import ClipFormat
from pipelines.data.encoding.encode import encode
from pipelines.data.encoding.encode_options import EncodeOptions
from pipelines.pretraining.config import PretrainConfig
from pipelines.pretraining.data import (
    MemoryClips,
    collect,
    distinct_captions,
    open_clips,
    share_of_clips,
)
from pipelines.pretraining.denoiser_stage import DenoiserTraining
from pipelines.pretraining.events import PretrainEvent
from pipelines.pretraining.loops import build_pretrained_teacher
from pipelines.pretraining.run import pretrain
from pipelines.pretraining.stages import (
    autoencoder_of,
    require_fitting_autoencoder,
    stage_identities,
)
from sgmd_core.errors import ConfigError, DataError
from tests.helpers.forked_python import kill
from tests.helpers.moves import assert_moves, relative_error
from tests.helpers.s3_server import S3Access, serve_s3, use_server
from tests.pipelines.pretraining.test_pretrain import micro_config, write_clips
from workers.models.wan import open_autoencoder

ROOT = Path(__file__).parents[3]
MODEL = str(ROOT / "assets" / "tiny-wan")
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


def config_of(
    clips: Path, out: Path, train: str, denoiser: dict[str, int] | None = None, **vae: object
) -> PretrainConfig:
    """A recipe that takes an autoencoder, and ends after all its steps whatever it has learnt."""
    world = {"train": str(clips / train), "held_out": str(clips / "held_out")}
    config = micro_config(out, world=world, vae={"folder": MODEL, **vae})
    whole = config.denoiser.model_copy(update={"hold_until_score": 1.0, **(denoiser or {})})
    return config.model_copy(update={"denoiser": whole})


def clips_of(config: PretrainConfig) -> MemoryClips:
    """Latents as a training worker gathers them."""
    vae = open_autoencoder(f"{MODEL}/vae")
    clips = open_clips(config.world.train, config.world)
    return collect(share_of_clips(clips, encode=vae.encode), "latents")


def trained(config: PretrainConfig, clips: MemoryClips) -> dict[str, torch.Tensor]:
    """The averaged networks after all steps, without Ray Train."""
    vocabulary = distinct_captions(open_clips(config.world.train, config.world))
    torch.manual_seed(config.seed)
    teacher = build_pretrained_teacher(config, vocabulary, clips.values.shape[1])
    training = DenoiserTraining(teacher, config.denoiser, config.text, seed=config.seed)
    while not training.is_over:
        training.step(clips.values, clips.captions)
        training.watched(None)
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
@pytest.mark.usefixtures("forked_libraries")
def test_a_run_at_an_address_goes_on_from_an_empty_disk_after_kill_9_with_the_same_bits(
    folder: Path, tmp_path: Path, s3_access: S3Access, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Long enough to be killed on the way.
    steps = {"max_hold_steps": 146, "decay_steps": 4, "watch_every_steps": 50}
    config = config_of(folder, tmp_path, "latents", denoiser=steps)
    place = {"run_dir": "s3://runs/latents/run", "output": "s3://runs/latents/teacher"}
    # Ray Train looks for a new state every two seconds, and each waits for the one before it.
    rarely = config.ray.model_copy(update={"checkpoint_every_steps": 50})
    config = config.model_copy(update={**place, "ray": rarely})
    (tmp_path / "s3" / "runs").mkdir(parents=True)
    there = tmp_path / "s3" / "runs" / "latents"
    with serve_s3(tmp_path / "s3", s3_access) as server:
        use_server(server.environment, monkeypatch)
        lost = {"XDG_CACHE_HOME": str(tmp_path / "lost")}
        first = begin_elsewhere(config, tmp_path / "recipe.yaml", lost)
        try:
            wait_until(lambda: has_kept_a_state(there / "run" / "ray" / "denoiser"))
        finally:
            kill(first)
        assert not (there / "run" / "teacher").exists(), "it has come to its end"

        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
        heard: list[PretrainEvent] = []
        result = pretrain(config, heard.append)
        assert result.output == place["output"]
        assert {event.stage for event in heard} == {"denoiser", "quality"}
        (start,) = [event.note for event in heard if " starts at step " in event.note]
        assert int(start.split()[4]) > 0
        # Nobody else writes to the run or the model any more.
        assert not [path for path in there.rglob("*") if path.name.endswith(LEASE_OBJECT)]
    assert autoencoder_of(str(there / "teacher")) == autoencoder_of(MODEL)
    found = torch.load(there / "run" / "teacher" / "networks.pt", weights_only=True)
    expected = trained(config, clips_of(config))
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    told = [json.loads(line) for line in (there / "run/events.jsonl").read_text().splitlines()]
    # The lines of the last seconds before a kill are lost.
    assert [line["step"] for line in told][-len(heard) :] == [event.step for event in heard]
    assert json.loads((there / "run/summary.json").read_text()) == asdict(result.quality)
    left = [path for path in (tmp_path / "empty").rglob("*") if path.is_file()]
    assert left == []


def has_kept_a_state(stage: Path) -> bool:
    """Whether Ray Train would go on from a checkpoint of a stage."""
    book = stage / "checkpoint_manager_snapshot.json"
    with suppress(ValueError, FileNotFoundError):
        return bool(json.loads(book.read_text())["checkpoint_results"])
    return False


def begin_elsewhere(
    config: PretrainConfig, recipe: Path, environment: dict[str, str]
) -> subprocess.Popen[bytes]:
    """Runs a recipe in another process, which joins the cluster of this one."""
    recipe.write_text(json.dumps(config.model_dump(mode="json")))
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-m", "pipelines.cli", "pretrain", str(recipe)]
    inherited = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [*command, "--address", address], cwd=recipe.parent, env={**inherited, **environment}
    )


def wait_until(is_so: Callable[[], bool], limit_s: float = 300.0) -> None:
    end_s = time.monotonic() + limit_s
    while not is_so():
        assert time.monotonic() < end_s
        time.sleep(0.05)


def test_latents_of_another_autoencoder_or_size_or_without_one_are_refused(
    folder: Path, tmp_path: Path
) -> None:
    config = config_of(folder, tmp_path, "latents")
    clips = open_clips(config.world.train, config.world)
    require_fitting_autoencoder(config, clips)
    without = config_of(folder, tmp_path, "latents", folder=None)
    with pytest.raises(ConfigError, match=r"no videos to train an autoencoder on.*Set vae\.folder"):
        pretrain(without)
    world = config.world.model_copy(update={"frame_px": 16})
    with pytest.raises(DataError, match=r"latents of \(16, 4, 4, 4\).*\(16, 4, 2, 2\)"):
        pretrain(config.model_copy(update={"world": world}))
    other = replace(clips.source.encoding, vae="0123456789abcdef")
    source = replace(clips.source, encoding=other)
    with pytest.raises(DataError, match=r"the autoencoder 0123456789abcdef.*Set vae\.folder"):
        require_fitting_autoencoder(config, replace(clips, source=source))
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
