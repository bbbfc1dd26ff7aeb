"""A wrong number is refused where it is written, by its name."""

import pickle

import pytest

from sgmd_core.errors import ConfigError
from workers.clip_settings import Bucket, VideoSettings
from workers.network_settings import ComputeSettings, OptimizerSettings
from workers.settings import (
    DiscriminatorSettings,
    DiversitySettings,
    FakeScoreSettings,
    GeneratorSettings,
    ModelSettings,
    TeacherSettings,
)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: ModelSettings("m", text_length=0), "model.text_length"),
        (lambda: VideoSettings(0, 32, 32, 8), "video.num_frames"),
        (lambda: VideoSettings(9, 0, 32, 8), "video.height"),
        (lambda: VideoSettings(9, 32, 0, 8), "video.width"),
        (lambda: VideoSettings(9, 32, 32, 0), "video.fps"),
        (lambda: VideoSettings(9, 32, 32, 8, (Bucket(9, 32, 16),)), "video.buckets"),
        (lambda: Bucket(9, 32, 32, -1.0), "video.buckets.weight"),
        (lambda: Bucket(9, 0, 32), "video.buckets.height"),
        (lambda: OptimizerSettings(lr=0.0), "optimizer.lr"),
        (lambda: OptimizerSettings(lr=float("nan")), "optimizer.lr"),
        (lambda: OptimizerSettings(lr=1e-4, betas=(0.0, 1.0)), "optimizer.betas"),
        (lambda: OptimizerSettings(lr=1e-4, weight_decay=-1.0), "optimizer.weight_decay"),
        (lambda: OptimizerSettings(lr=1e-4, eps=0.0), "optimizer.eps"),
        (lambda: OptimizerSettings(lr=1e-4, max_grad_norm=0.0), "optimizer.max_grad_norm"),
        (lambda: OptimizerSettings(lr=1e-4, warmup_iterations=-1), "optimizer.warmup_iterations"),
        (lambda: OptimizerSettings(lr=1e-4, decay="step"), "optimizer.decay"),  # type: ignore
        (lambda: OptimizerSettings(lr=1e-4, decay="cosine"), "optimizer.decay_iterations"),
        (lambda: OptimizerSettings(lr=1e-4, decay_iterations=9), "optimizer.decay_iterations"),
        (lambda: OptimizerSettings(lr=1e-4, final_lr_ratio=1.5), "optimizer.final_lr_ratio"),
        (lambda: OptimizerSettings(lr=1e-4, moments="disk"), "optimizer.moments"),
        (lambda: OptimizerSettings(lr=1e-4, moment_bits=4), "optimizer.moment_bits"),  # type: ignore
        (
            lambda: OptimizerSettings(lr=1e-4, betas=(0.9, 0.999), moment_bits=8),
            "optimizer.moment_bits",
        ),
        (
            lambda: OptimizerSettings(lr=1e-4, moments="cpu", moment_bits=8),
            "optimizer.moment_bits",
        ),
        (lambda: GeneratorSettings(ema_device="disk"), "generator.ema_device"),
        (lambda: GeneratorSettings(num_steps=0), "generator.num_steps"),
        (lambda: GeneratorSettings(ema_decay=1.0), "generator.ema_decay"),
        (lambda: GeneratorSettings(ema_start=-1), "generator.ema_start"),
        (lambda: DiversitySettings(weight=-0.1), "generator.diversity.weight"),
        (lambda: DiversitySettings(anchor_step=0), "generator.diversity.anchor_step"),
        (lambda: DiversitySettings(teacher_steps=4), "generator.diversity.anchor_step"),
        (
            lambda: GeneratorSettings(num_steps=1, diversity=DiversitySettings(0.05)),
            "generator.num_steps",
        ),
        (lambda: ComputeSettings(checkpointing="half"), "compute.checkpointing"),
        (
            lambda: ComputeSettings(checkpointing="selective", compile=True),
            "compute.checkpointing",
        ),
        (lambda: ComputeSettings(weights="int4"), "compute.weights"),
        (lambda: ComputeSettings(attention="flash"), "compute.attention"),
        (lambda: ComputeSettings(ulysses=0), "compute.ulysses"),
        (lambda: ComputeSettings(ulysses=2, compile=True), "compute.ulysses"),
        (lambda: ComputeSettings(ulysses=2, checkpointing="selective"), "compute.ulysses"),
        (lambda: ComputeSettings("bf16", weights="fp8", ulysses=2), "compute.ulysses"),
        (lambda: ComputeSettings(ulysses=2, attention="xformers"), "compute.ulysses"),
        (
            lambda: DiscriminatorSettings(compute=ComputeSettings(ulysses=2)),
            "discriminator.compute.ulysses",
        ),
        (
            lambda: ComputeSettings(checkpointing="selective", attention="xformers"),
            "compute.attention",
        ),
        (
            lambda: GeneratorSettings(compute=ComputeSettings("bf16", attention="sage")),
            "generator.compute.attention",
        ),
        (
            lambda: FakeScoreSettings(compute=ComputeSettings("bf16", attention="_flash_3")),
            "fake_score.compute.attention",
        ),
        (lambda: ComputeSettings(weights="fp8"), "compute.weights"),
        (lambda: ComputeSettings("bf16", checkpointing=True, weights="fp8"), "compute.weights"),
        (
            lambda: GeneratorSettings(compute=ComputeSettings("bf16", weights="fp8")),
            "generator.compute.weights",
        ),
        (lambda: FakeScoreSettings(tracking="sometimes"), "fake_score.tracking"),
        (lambda: FakeScoreSettings(ida_decay=0.0), "fake_score.ida_decay"),
        (lambda: FakeScoreSettings(gap="other"), "fake_score.gap"),
        (lambda: TeacherSettings(guidance_scale=0.5), "teacher.guidance_scale"),
    ],
)
def test_a_wrong_setting_is_named(make, name):
    with pytest.raises(ConfigError) as caught:
        make()
    assert name in str(caught.value)


def test_defaults_are_those_of_the_released_training():
    generator, fake_score = GeneratorSettings(), FakeScoreSettings()
    assert (generator.num_steps, generator.optimizer.lr, fake_score.optimizer.lr) == (4, 2e-6, 4e-7)
    assert generator.optimizer.betas == (0.0, 0.999)
    assert generator.optimizer.max_grad_norm == 10.0
    assert fake_score.tracking == "shared"


def test_settings_travel_between_processes():
    settings = GeneratorSettings(optimizer=OptimizerSettings(lr=3e-5))
    assert pickle.loads(pickle.dumps(settings)) == settings
