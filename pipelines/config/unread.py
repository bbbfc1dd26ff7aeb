"""Settings that are given, and that no part of the run reads because of another setting.

Recipes that ship have every section, so only what stands on the command line is meant.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any

from pipelines.config.roles import DISCRIMINATOR
from pipelines.config.topology import unread_in_mode

_MODE = "topology.mode"


@dataclass(frozen=True, slots=True)
class _Switch:
    """A setting that leaves others out where it has one value.

    Attributes:
        key: The setting.
        off: That value.
        unread: What it leaves out: settings and whole sections.
    """

    key: str
    off: Any
    unread: tuple[str, ...]

    def leaves_out(self, key: str) -> bool:
        return key != self.key and any(f"{key}.".startswith(f"{name}.") for name in self.unread)


_SWITCHES = (
    _Switch("lag.every", 0, ("lag",)),
    _Switch("validation.every", 0, ("checkpoint.keep_best", "checkpoint.score", "checkpoint.mode")),
    _Switch("tracker.wandb", "off", ("tracker.project",)),
    _Switch("generator.diversity.weight", 0, ("generator.diversity",)),
    _Switch("generator.ema_decay", 0, ("generator.ema_start", "generator.ema_device")),
    *(
        _Switch(
            f"{role}.optimizer.decay",
            "constant",
            (f"{role}.optimizer.decay_iterations", f"{role}.optimizer.final_lr_ratio"),
        )
        for role in ("generator", "fake_score", DISCRIMINATOR)
    ),
    _Switch("data.read_ahead.readers", 0, ("data.read_ahead.store_mb",)),
    _Switch("guards.spike_factor", None, ("guards.spike_window",)),
    _Switch(
        _MODE,
        "local",
        (
            "data.read_ahead",
            *(f"topology.{name}" for name in ("text", "feed", "validator")),
            *("topology.watch_s", "topology.start_timeout_s"),
        ),
    ),
)


def _value(config: Any, key: str) -> Any:  # noqa: ANN401
    """Value of a dotted key; of one below a value that is no section, that value."""
    return reduce(lambda section, name: getattr(section, name, section), key.split("."), config)


def unread_settings(config: Any, given: Iterable[str]) -> Iterator[str]:  # noqa: ANN401
    """Names settings that the run does not read, with what leaves them out, as sentences.

    What the recipe's sweep searches may be read by some of its trials.

    Args:
        config: The recipe, a `pipelines.config.recipe.DistillConfig`.
        given: Dotted keys that stand on the command line.
    """
    keys, searched = list(given), set(config.sweep.dimensions)
    if unread := unread_in_mode(config.topology.mode, keys):
        yield f"{_MODE} {config.topology.mode} does not read {', '.join(unread)}"
    for switch in _SWITCHES:
        value = _value(config, switch.key)
        # What is set to nothing agrees with what leaves it out.
        unread = [key for key in keys if switch.leaves_out(key) and _value(config, key)]
        if unread and value == switch.off and switch.key not in searched:
            shown = "null" if value is None else value
            yield f"{switch.key} {shown} leaves {', '.join(unread)} out"
    own = tuple(f"{name}." for name in (DISCRIMINATOR, f"topology.{DISCRIMINATOR}"))
    unread = [key for key in keys if f"{key}.".startswith(own)]
    if unread and config.adversary is None and "objective.method" not in searched:
        yield f"objective.method {config.objective.method} does not read {', '.join(unread)}"
