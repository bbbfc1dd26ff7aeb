"""Pretraining: the arithmetic of its stages, resuming, and the whole through Ray Train."""

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import WanPipeline
from ray.util.placement_group import placement_group_table

from cluster.errors import InsufficientResourcesError
from pipelines.media.inference import read_inference_settings
from pipelines.pretraining import networks, vae_stage
from pipelines.pretraining.config import DenoiserSettings, PretrainConfig, VaeSettings
from pipelines.pretraining.data import TrainingClips, collect, open_clips, share_of_clips
from pipelines.pretraining.denoiser_stage import (
    DenoiserTraining,
    RateSchedule,
    draw_flow,
    flow_matching_loss,
)
from pipelines.pretraining.events import EventWriter, PretrainEvent, PretrainEvents
from pipelines.pretraining.loops import build_pretrained_teacher
from pipelines.pretraining.run import checked, pretrain
from pipelines.pretraining.stages import record_stage, require_same_stages, stage_identities
from pipelines.shapes import ClipSplit, captions, render_batch, write_shards
from sgmd_core.errors import CheckpointError, DataError, NonFiniteError
from sgmd_core.schedule import FlowMatchSchedule
from tests.helpers.moves import assert_moves
from workers.models.scheduler import build_scheduler
from workers.models.wan import VideoVae

MICRO_DENOISER = {
    "num_layers": 1,
    "num_heads": 2,
    "head_dim": 12,
    "ffn_dim": 16,
    "batch_size": 4,
    "warmup_steps": 1,
    "watch_every_steps": 2,
    "watch_clips": 2,
    "watch_sampling_steps": 2,
    "max_hold_steps": 4,
    "decay_steps": 4,
}


def micro_config(folder: Path, **sections: dict[str, object]) -> PretrainConfig:
    recipe: dict[str, object] = {
        "name": "micro",
        "run_dir": str(folder / "run"),
        "output": str(folder / "teacher"),
        "world": {"train": str(folder / "train"), "held_out": str(folder / "held_out")},
        "vae": {"base_dim": 4, "latent_channels": 4, "num_steps": 4, "batch_size": 2},
        "text": {"hidden_dim": 16, "num_layers": 1, "num_heads": 2, "ffn_dim": 16},
        "denoiser": MICRO_DENOISER,
        "sampling": {"num_steps": 2, "num_clips": 4},
        "ray": {"report_every_steps": 1, "checkpoint_every_steps": 2},
    }
    return PretrainConfig.model_validate(recipe | sections)


def write_clips(folder: Path) -> None:
    write_shards(str(folder / "train"), num_clips=16, shard_size=8, seed=0)
    write_shards(
        str(folder / "held_out"), num_clips=4, shard_size=4, seed=0, split=ClipSplit.HELD_OUT
    )


def denoiser_training(weights_seed: int = 0) -> DenoiserTraining:
    config = micro_config(Path("unused"))
    torch.manual_seed(weights_seed)
    teacher = build_pretrained_teacher(config, captions(ClipSplit.TRAIN), latent_channels=4)
    return DenoiserTraining(teacher, config.denoiser, config.text, seed=0)


def random_latents() -> tuple[torch.Tensor, list[str]]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(8, 4, 2, 2, 2, generator=generator), captions(ClipSplit.TRAIN)[:8]


# ----------------------------------------------------------------------------- learning rate


def test_the_rate_is_held_until_the_score_is_reached_and_then_falls_to_zero() -> None:
    settings = DenoiserSettings(
        learning_rate=1.0, warmup_steps=10, hold_until_score=0.9, max_hold_steps=999, decay_steps=20
    )
    schedule = RateSchedule(settings)
    assert [schedule.rate(step) for step in (0, 4, 9, 10, 500)] == [0.1, 0.5, 1.0, 1.0, 1.0]
    schedule = schedule.after_step(100, 0.89).after_step(101, None)
    assert schedule.decay_start is None
    schedule = schedule.after_step(200, 0.9)
    assert [schedule.rate(step) for step in (200, 210, 220, 230)] == [1.0, 0.5, 0.0, 0.0]
    assert not schedule.is_over(219)
    assert schedule.is_over(220)


def test_the_rate_is_not_held_for_ever() -> None:
    settings = DenoiserSettings(max_hold_steps=300)
    assert RateSchedule(settings).after_step(299, 0.1).decay_start is None
    assert RateSchedule(settings).after_step(300, 0.1).decay_start == 300


# ------------------------------------------------------------------------------ flow matching


def test_the_true_velocity_has_no_flow_matching_loss() -> None:
    x0, texts = random_latents()
    draws = draw_flow(len(x0), x0.shape[1:], DenoiserSettings(), seed=1)

    def true_velocity(x_t: torch.Tensor, sigma: torch.Tensor, *_: object) -> torch.Tensor:
        level = sigma[:, None, None, None, None]
        noise = (x_t - (1 - level) * x0) / level
        return noise - x0

    loss = flow_matching_loss(true_velocity, x0, texts, draws, text_length=6)
    assert float(loss) == pytest.approx(0.0, abs=1e-6)


def test_noise_levels_are_spread_and_shifted_and_a_tenth_of_captions_is_dropped() -> None:
    draws = draw_flow(20_000, (1, 1, 1, 1), DenoiserSettings(sigma_shift=3.0), seed=0)
    median = float(draws.sigma.median())
    assert median == pytest.approx(3 * 0.5 / (1 + 2 * 0.5), abs=1e-3)
    assert float(draws.dropped.double().mean()) == pytest.approx(0.1, abs=0.01)
    assert float(draws.noise.std()) == pytest.approx(1.0, abs=0.02)


def test_the_stored_scheduler_is_our_euler_sampler() -> None:
    scheduler = build_scheduler(3.0)
    x = torch.randn(1, 2, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    grid = FlowMatchSchedule(shift=3.0).few_step_grid(4)
    scheduler.set_timesteps(4)
    assert scheduler.sigmas.tolist() == pytest.approx(grid.tolist(), abs=1e-3)
    stepped, sigmas = x.clone(), scheduler.sigmas
    for index, time in enumerate(scheduler.timesteps):
        velocity = torch.sin(3 * stepped)
        x = x + (sigmas[index + 1] - sigmas[index]) * velocity
        stepped = scheduler.step(velocity, time, stepped).prev_sample
        torch.testing.assert_close(stepped, x, rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------------- stages


@pytest.mark.slow
def test_the_denoiser_learns() -> None:
    latents, texts = random_latents()
    training = denoiser_training()
    losses = [training.step(latents, texts)["loss"] for _ in range(60)]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


@pytest.mark.slow
def test_a_resumed_denoiser_repeats_the_uninterrupted_one_bitwise() -> None:
    latents, texts = random_latents()
    whole, first = denoiser_training(), denoiser_training()
    second = denoiser_training(weights_seed=9)
    for _ in range(6):
        whole.step(latents, texts)
        whole.watched(None)
    for _ in range(3):
        first.step(latents, texts)
        first.watched(None)
    second.load_state_dict(first.state_dict())
    for _ in range(3):
        second.step(latents, texts)
        second.watched(None)
    assert second.schedule == whole.schedule
    assert_moves(whole.networks.state_dict(), first.networks.state_dict())
    with whole.averaged() as expected, first.averaged() as earlier:
        assert_moves(*(dict(one.named_parameters()) for one in (expected, earlier)))
    for name, value in whole.networks.state_dict().items():
        assert torch.equal(second.networks.state_dict()[name], value), name
    with whole.averaged() as expected, second.averaged() as found:
        for name, value in expected.named_parameters():
            assert torch.equal(dict(found.named_parameters())[name], value), name


@pytest.mark.slow
def test_a_resumed_autoencoder_repeats_the_uninterrupted_one_bitwise() -> None:
    settings = VaeSettings(base_dim=4, latent_channels=4, num_steps=4, batch_size=1)
    clips = torch.from_numpy(render_batch(0, range(4), ClipSplit.TRAIN)[0])

    def start() -> vae_stage.VaeTraining:
        torch.manual_seed(0)
        return vae_stage.VaeTraining(networks.build_vae(settings), settings, seed=0)

    whole, first, second = start(), start(), start()
    for _ in range(4):
        whole.step(clips)
    for _ in range(2):
        first.step(clips)
    second.load_state_dict(first.state_dict())
    for _ in range(2):
        second.step(clips)
    assert_moves(whole.vae.state_dict(), first.vae.state_dict())
    for name, value in whole.vae.state_dict().items():
        assert torch.equal(second.vae.state_dict()[name], value), name


def test_lending_the_average_leaves_the_trained_weights() -> None:
    latents, texts = random_latents()
    training = denoiser_training()
    training.step(latents, texts)
    before = {name: value.clone() for name, value in training.networks.named_parameters()}
    with training.averaged() as averaged:
        changed = [
            not torch.equal(before[name], value) for name, value in averaged.named_parameters()
        ]
    assert any(changed)
    for name, value in training.networks.named_parameters():
        assert torch.equal(before[name], value), name


def test_a_loss_that_is_not_finite_stops_the_training_unchanged() -> None:
    latents, texts = random_latents()
    training = denoiser_training()
    before = {name: value.clone() for name, value in training.networks.named_parameters()}
    with pytest.raises(NonFiniteError, match="step 0"):
        training.step(latents * float("nan"), texts)
    for name, value in training.networks.named_parameters():
        assert torch.equal(before[name], value), name


def test_latent_statistics_normalise_the_training_latents() -> None:
    settings = VaeSettings(base_dim=4, latent_channels=4)
    vae = networks.build_vae(settings)
    clips = torch.from_numpy(render_batch(0, range(6), ClipSplit.TRAIN)[0])
    vae_stage.store_latent_statistics(vae, vae_stage.encode_clips(vae, clips))
    latents = VideoVae(vae).encode(vae_stage.to_unit_video(clips))
    assert latents.mean(dim=(0, 2, 3, 4)).tolist() == pytest.approx([0.0] * 4, abs=1e-4)
    assert latents.std(dim=(0, 2, 3, 4)).tolist() == pytest.approx([1.0] * 4, abs=1e-3)


# --------------------------------------------------------------------------------------- data


def test_clips_come_in_the_order_of_their_ids() -> None:
    batches = [
        {
            "sample_id": np.array(["c", "a"]),
            "caption": np.array(["third", "first"], dtype=object),
            "pixels": np.array([[3], [1]], np.uint8),
        },
        {
            "sample_id": np.array(["b"]),
            "caption": np.array(["second"], dtype=object),
            "pixels": np.array([[2]], np.uint8),
        },
    ]
    clips = collect(batches, "pixels")
    assert clips.captions == ["first", "second", "third"]
    assert clips.values.flatten().tolist() == [1, 2, 3]


def test_a_worker_without_clips_says_so() -> None:
    with pytest.raises(DataError, match=r"lower ray\.num_workers"):
        collect([], "pixels")


def test_a_folder_without_shards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="sgmd shapes"):
        open_clips(str(tmp_path), micro_config(tmp_path).world)


def test_captions_alone_are_refused(tmp_path: Path) -> None:
    shard = tmp_path / "a.parquet"
    pq.write_table(pa.table({"sample_id": ["a"], "caption": ["a red circle"]}), shard)
    with pytest.raises(DataError, match=r"kind captions.*video or encoded"):
        open_clips(str(tmp_path), micro_config(tmp_path).world)


def test_a_corrupt_and_an_incomplete_shard_are_named_and_an_empty_one_does_no_harm(
    tmp_path: Path,
) -> None:
    write_clips(tmp_path)
    folder, world = str(tmp_path / "train"), micro_config(tmp_path).world
    first, shard = sorted((tmp_path / "train").glob("*.parquet"))
    table = pq.read_table(shard)
    (tmp_path / "train" / "_index.json").unlink()
    # Rows that a command did not take lie beside its shards, and are none of them.
    pq.write_table(pa.table({"reason": ["torn"]}), tmp_path / "train" / "quarantine.parquet")
    assert open_clips(folder, world).paths == [first.name, shard.name]
    pq.write_table(table.slice(0, 0), shard)
    assert open_clips(folder, world).paths == [first.name]
    pq.write_table(table.drop_columns(["caption"]), shard)
    with pytest.raises(DataError, match=rf"{shard.name}: missing column caption"):
        open_clips(folder, world)
    shard.write_bytes(b"PAR1 torn")
    with pytest.raises(DataError, match=rf"{shard.name}: no readable footer"):
        open_clips(folder, world)


@pytest.mark.slow
def test_at_most_so_many_clips_are_read_the_first_ones(tmp_path: Path) -> None:
    write_clips(tmp_path)
    world = micro_config(tmp_path).world
    every = collect(share_of_clips(open_clips(world.train, world)), "pixels")
    few = world.model_copy(update={"max_clips": 11})
    some = collect(share_of_clips(open_clips(world.train, few)), "pixels")
    assert (len(every.values), len(some.values)) == (16, 11)
    assert torch.equal(some.values, every.values[:11])
    assert some.captions == every.captions[:11]


@pytest.mark.slow
def test_workers_share_the_clips_row_by_row_and_none_is_read_twice(tmp_path: Path) -> None:
    write_clips(tmp_path)
    world = micro_config(tmp_path).world.model_copy(update={"max_clips": 13})
    clips = open_clips(world.train, world)
    every = collect(share_of_clips(clips), "pixels")
    shares = [collect(share_of_clips(clips, rank, 3), "pixels") for rank in range(3)]
    assert [len(share.captions) for share in shares] == [4, 4, 5]
    assert torch.equal(torch.cat([share.values for share in shares]), every.values)
    assert [text for share in shares for text in share.captions] == every.captions


def test_two_rows_with_one_id_are_both_trained_on_and_what_is_beyond_the_last_clip_is_not_looked_at(
    tmp_path: Path,
) -> None:
    write_clips(tmp_path)
    shard = min((tmp_path / "train").glob("*.parquet"))
    rows = pq.read_table(shard).to_pylist()
    rows[1]["sample_id"] = rows[0]["sample_id"]
    rows[5]["video"] = b"torn"
    pq.write_table(pa.Table.from_pylist(rows, schema=pq.read_schema(shard)), shard)
    (tmp_path / "train" / "_index.json").unlink()
    world = micro_config(tmp_path).world.model_copy(update={"max_clips": 5})
    clips = open_clips(world.train, world)
    assert len(collect(share_of_clips(clips), "pixels").values) == 5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"caption": ""}, "row 0 of row group 0.*empty_caption"),
        ({"video": b"torn"}, "row 0 of row group 0.*undecodable"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, change: dict[str, object], complaint: str) -> None:
    write_clips(tmp_path)
    shard = next((tmp_path / "train").glob("*.parquet"))
    table = pq.read_table(shard)
    rows = table.to_pylist()
    rows[0] |= change
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), shard)
    (tmp_path / "train" / "_index.json").unlink()
    world = micro_config(tmp_path).world
    with pytest.raises(DataError, match=complaint):
        list(share_of_clips(open_clips(world.train, world)))


@pytest.mark.slow
def test_clips_of_another_size_are_refused(tmp_path: Path) -> None:
    write_clips(tmp_path)
    world = micro_config(tmp_path).world
    for change in ({"frame_px": 48}, {"num_frames": 9}):
        with pytest.raises(DataError, match="wrong_size"):
            list(share_of_clips(open_clips(world.train, world.model_copy(update=change))))


def identities(config: PretrainConfig) -> dict[str, dict[str, object]]:
    return stage_identities(config, open_clips(config.world.train, config.world))


def begun(folder: Path) -> PretrainConfig:
    """A run with a finished autoencoder and a denoiser that was interrupted."""
    write_clips(folder)
    config = micro_config(folder)
    run_dir = Path(config.run_dir)
    (run_dir / "vae").mkdir(parents=True)
    (run_dir / "ray" / "denoiser").mkdir(parents=True)
    for stage, identity in identities(config).items():
        record_stage(run_dir, stage, identity)
    return config


def refusal(config: PretrainConfig) -> str:
    with pytest.raises(CheckpointError) as caught:
        pretrain(config)
    return str(caught.value)


@pytest.mark.slow
def test_stages_go_on_with_the_same_clips_elsewhere_and_other_figures(tmp_path: Path) -> None:
    config = begun(tmp_path)
    recorded = identities(config)
    (tmp_path / "train").rename(tmp_path / "moved")
    moved = config.model_copy(
        update={
            "world": config.world.model_copy(update={"train": str(tmp_path / "moved")}),
            "sampling": config.sampling.model_copy(update={"num_clips": 8}),
        }
    )
    assert identities(moved) == recorded
    require_same_stages(Path(config.run_dir), identities(moved))


@pytest.mark.slow
def test_a_stage_of_other_settings_is_refused_with_both_values(tmp_path: Path) -> None:
    config = begun(tmp_path)
    vae = config.vae.model_copy(update={"num_steps": 5})
    message = refusal(config.model_copy(update={"vae": vae}))
    assert "stage vae: vae.num_steps is 5, and was 4" in message
    assert "stage denoiser: vae.num_steps is 5, and was 4" in message
    denoiser = config.denoiser.model_copy(update={"ema_decay": 0.5})
    message = refusal(config.model_copy(update={"denoiser": denoiser}))
    assert "stage denoiser: denoiser.ema_decay is 0.5, and was 0.998" in message
    assert "stage vae" not in message


@pytest.mark.slow
def test_a_stage_of_other_clips_or_without_a_record_is_refused(tmp_path: Path) -> None:
    config = begun(tmp_path)
    write_shards(str(tmp_path / "other"), num_clips=16, shard_size=8, seed=1)
    other = min((tmp_path / "other").glob("*.parquet"))
    shard = min((tmp_path / "train").glob("*.parquet"))
    key = f"the content of {shard.name} in world.train"
    before = identities(config)["vae"][key]
    shard.write_bytes(other.read_bytes())
    after = identities(config)["vae"][key]
    assert f'stage vae: {key} is "{after}", and was "{before}"' in refusal(config)
    (tmp_path / "run" / "identity.json").unlink()
    assert "stage vae: no record of what it was made from" in refusal(config)


def test_events_are_told_and_written_down_in_order(tmp_path: Path) -> None:
    heard: list[PretrainEvent] = []
    path = tmp_path / "events.jsonl"
    path.write_text("{}\n")
    events = PretrainEvents(path, heard.append)
    writer = EventWriter(micro_config(tmp_path), "vae", 9, events.add)
    for step in range(1, 4):
        writer.step(step, {"loss": 1.0 / step})
    assert [event.step for event in heard] == [1, 2, 3]
    assert heard[1].metrics == {"loss": 0.5}
    # They are added to those of an earlier run.
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line.get("step") for line in lines] == [None, 1, 2, 3]


@pytest.mark.parametrize(("every_s", "written"), [(0.0, [1, 2, 3]), (3600.0, [3])])
def test_slow_steps_are_written_down_before_their_number_is_due(
    tmp_path: Path, every_s: float, written: list[int]
) -> None:
    config = micro_config(tmp_path)
    rare = config.ray.model_copy(update={"report_every_steps": 100})
    told: list[PretrainEvent] = []
    slow = config.model_copy(update={"ray": rare})
    writer = EventWriter(slow, "vae", 3, told.append, every_s=every_s)
    for step in range(1, 4):
        writer.step(step, {})
    assert [event.step for event in told] == written


# ---------------------------------------------------------------------------------- Ray Train


@pytest.mark.timeout(300)
@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_no_worker_trains_on_after_ctrl_c_where_ray_stays(tmp_path: Path) -> None:
    write_clips(tmp_path)
    endless = {"base_dim": 4, "latent_channels": 4, "num_steps": 100_000, "batch_size": 2}
    workers: list[psutil.Process] = []
    interrupted: list[PretrainEvent] = []

    def interrupt(event: PretrainEvent) -> None:
        workers.extend(
            psutil.Process(int(pid))
            for pid in re.findall(r"vae starts .* process (\d+)", event.note)
        )
        if event.step >= 1 and not interrupted:
            interrupted.append(event)
            os.kill(os.getpid(), signal.SIGINT)

    # Processes of pytest-xdist ignore Ctrl-C.
    answer = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            pretrain(micro_config(tmp_path, vae=endless), interrupt)
    finally:
        signal.signal(signal.SIGINT, answer)
    assert len(workers) == 1
    assert not psutil.wait_procs(workers, timeout=20)[1]
    reserved = [each["state"] for each in placement_group_table().values()]
    assert set(reserved) <= {"REMOVED"}, "the next call finds all CPUs"


# Ray Train starts a dozen processes for each stage: minutes on two cores, more on busy ones.
@pytest.mark.timeout(1800)
@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_two_workers_train_one_is_killed_and_the_run_ends_in_a_loadable_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_clips(tmp_path)
    # Relative folders, as in the recipe: workers of Ray Train work in folders of their own.
    monkeypatch.chdir(tmp_path)
    config = micro_config(
        Path(),
        ray={"report_every_steps": 1, "checkpoint_every_steps": 2, "num_workers": 2},
    )
    heard: list[PretrainEvent] = []
    killed: list[int] = []

    def kill_once(event: PretrainEvent) -> None:
        heard.append(event)
        if event.stage == "denoiser" and event.step >= 5 and not killed:
            starts = [e.note for e in heard if e.note.startswith("denoiser starts")]
            killed.append(int(re.findall(r"process (\d+)", starts[-1])[0]))
            os.kill(killed[0], signal.SIGKILL)

    opened: list[str] = []

    def count(folder: str, *settings: Any) -> TrainingClips:
        opened.append(Path(folder).name)
        return open_clips(folder, *settings)

    monkeypatch.setattr("pipelines.pretraining.run.open_clips", count)
    answers = signal.getsignal(signal.SIGINT)
    result = pretrain(checked(config), kill_once)
    assert signal.getsignal(signal.SIGINT) is answers, "Ctrl-C stays this process's to answer"
    assert opened == ["train", "held_out"], "each set is looked over once"
    starts = [event.note for event in heard if " starts at step " in event.note]
    assert [note.split(" in ")[0] for note in starts[:2]] == [
        "vae starts at step 0",
        "denoiser starts at step 0",
    ]
    # From the last checkpoint that Ray Train had taken over when the worker died.
    assert [note.split(" in ")[0] for note in starts[2:]] in (
        ["denoiser starts at step 2"],
        ["denoiser starts at step 4"],
    )
    assert max(event.step for event in heard if event.stage == "denoiser") == 8

    assert read_inference_settings(Path(result.output)).num_steps == config.sampling.num_steps
    pipeline = WanPipeline.from_pretrained(result.output)
    pipeline.set_progress_bar_config(disable=True)
    frames = pipeline(
        "a red circle moves left",
        height=32,
        width=32,
        num_frames=13,
        num_inference_steps=2,
        guidance_scale=2.0,
        max_sequence_length=16,
        output_type="np",
    ).frames
    assert frames.shape == (1, 13, 32, 32, 3)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["guided"]["num_clips"] == 4
    assert summary["measurer"]["colour"] == 1.0

    # Finished stages are not run again.
    again: list[PretrainEvent] = []
    pretrain(config, again.append)
    assert {event.stage for event in again} == {"quality"}


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_cluster_that_is_too_small_is_refused_instead_of_waited_for(tmp_path: Path) -> None:
    write_clips(tmp_path)
    with pytest.raises(InsufficientResourcesError, match="at least 10 CPU"):
        pretrain(micro_config(tmp_path, ray={"num_workers": 2, "cpus_per_worker": 4}))
    assert not (tmp_path / "run").exists()
