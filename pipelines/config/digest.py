"""Settings that decide a run's numbers, and those that may change when it is resumed."""

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from pipelines.dotted import dotted_items

# What may change between a run and its resumption: it decides no number but by rounding, or the
# numbers come after those that were made.
_NOT_IN_DIGEST: dict[str, Any] = {
    "name": True,
    "output": True,
    # Compared by content: `workers.models.content`.
    "model": {"folder"},
    "iterations": True,
    "topology": True,
    "checkpoint": True,
    "recovery": True,
    "validation": True,
    "alarms": True,
    "guards": {"max_skipped", "window"},
    "export": True,
    "trace": True,
    "tracker": True,
    "sweep": True,
    "study": True,
    # The draws of exit steps must stay; `pipelines.distillation.position` sees to it.
    "batch": {"micro_batches", "exit_draws"},
    "generator": {
        "ema_device": True,
        "optimizer": {"moments", "log_block_norms"},
        "compute": {"checkpointing", "compile", "ulysses"},
    },
    "fake_score": {
        "optimizer": {"moments", "log_block_norms"},
        "compute": {"checkpointing", "compile", "ulysses"},
        "walk": True,
    },
    "discriminator": {
        "optimizer": {"moments", "log_block_norms"},
        "compute": {"checkpointing", "compile", "ulysses"},
    },
    # Its content, too.
    "teacher": {
        "model": True,
        "batched_guidance": True,
        "sharded": True,
        "compute": {"checkpointing", "compile", "ulysses"},
    },
    # Compared by content: `pipelines.data.stream.content`.
    "data": {
        "train": True,
        "validation": True,
        "columns": True,
        "validation_columns": True,
        "text_cache": True,
        "max_bad_fraction": True,
        "read_ahead": True,
        "s3": True,
        "also": {"__all__": {"source", "columns"}},
    },
}

_MEASURING = {"every", "updates", "batches", "rates", "slowest"}
"""Settings of the lag that decide numbers only where a governor acts on it."""


def deciding_settings_of(config: BaseModel, *, acts_on_lag: bool) -> dict[str, Any]:
    """Returns the settings of a distillation that decide its numbers, by dotted key.

    Args:
        config: The recipe.
        acts_on_lag: Whether a governor acts on the measured lag; otherwise it decides nothing.
    """
    measuring = {} if acts_on_lag else {"lag": _MEASURING}
    decide = config.model_dump(mode="json", exclude={**_NOT_IN_DIGEST, **measuring})
    return dict(dotted_items(decide))


def _keys(settings: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The settings that a table such as the one above names, written with dots."""
    for name, part in settings.items():
        if part is True:
            yield prefix + name
        elif isinstance(part, Mapping):
            yield from _keys(part, f"{prefix}{name}.")
        else:
            yield from (f"{prefix}{name}.{one}" for one in sorted(part))


MAY_CHANGE = tuple(
    key.replace(".__all__", "[]") for key in _keys(_NOT_IN_DIGEST) if key != "batch.exit_draws"
)
"""Settings that may change between a run and its resumption."""
