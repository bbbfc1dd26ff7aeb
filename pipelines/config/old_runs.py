"""Settings of runs that are older than a setting."""

from dataclasses import asdict, replace
from typing import Any

from pipelines.config.recipe import DistillConfig
from sgmd_core.objectives.consistency import consistency_of

_OLD_BEHAVIOUR: dict[str, Any] = {"model.encoder_dtype": "fp32"}
"""Behaviour before a setting existed, where that is not the default."""


def settings_before_they_existed(config: DistillConfig) -> dict[str, Any]:
    """Value of each deciding setting in runs that began before it existed: mostly its default.

    Args:
        config: A run, for what has no default.
    """
    needed: dict[str, Any] = {
        "name": config.name,
        "iterations": config.iterations,
        "model": {"folder": config.model.folder},
        "video": asdict(replace(config.video, buckets=())),
        "data": {"train": config.data.train},
        "batch": {"size": config.batch.size},
        "objective": {"method": config.objective.method},
        # Methods with several updates an iteration need one of the two.
        "fake_score": {"tracking": config.fake_score.tracking},
    }
    if consistency_of(config.objective) is not None:
        # Runs with a consistency term are no older than what it needs.
        needed["schedule"] = {"renoise": True}
    return {**DistillConfig.model_validate(needed).deciding_settings, **_OLD_BEHAVIOUR}
