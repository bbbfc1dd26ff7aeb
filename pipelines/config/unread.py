"""Settings that are given, and that no part of the run reads because of another setting.

Recipes that ship have every section, so only what stands on the command line is meant.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import reduce
from typing import Any

from pipelines.config.roles import DISCRIMINATOR
from pipelines.config.topology_check import unread_in_mode
from sgmd_core.errors import ConfigError

_MODE = "topology.mode"
_COMMAND_SECTIONS = ("sweep", "study")
"""Sections that the command of their name alone reads."""
_log = logging.getLogger(__name__)


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
    """Value of a dotted key; of one below a value that is not a section, that value."""
    return reduce(lambda section, name: getattr(section, name, section), key.split("."), config)


def unread_settings(config: Any, given: Iterable[str]) -> Iterator[str]:  # noqa: ANN401
    """Names settings that the run does not read, with what leaves them out, as sentences.

    What the recipe's sweep searches may be read by some of its trials, and what a trial or a
    variant of the study has otherwise may make it read more than the recipe does.

    Args:
        config: The recipe, a `pipelines.config.recipe.DistillConfig`.
        given: Dotted keys that stand on the command line.
    """
    keys = list(given)
    left_out = _left_out(config, keys)
    others = [_left_out(other, keys) for other in _other_runs(config, keys)] if left_out else []
    nowhere = [{key for unread in other.values() for key in unread} for other in others]
    for sentence, unread in left_out.items():
        if still := [key for key in unread if all(key in other for other in nowhere)]:
            yield sentence.format(", ".join(still))


def warn_of_foreign_sections(command: str, overrides: Iterable[str]) -> None:
    """Warns of settings that another command reads.

    Args:
        command: Name of the one that is given them.
        overrides: `KEY=VALUE`.
    """
    keys = [text.partition("=")[0].strip() for text in overrides]
    for section in _COMMAND_SECTIONS:
        foreign = [key for key in keys if key.partition(".")[0] == section]
        if foreign and section != command:
            _log.warning(
                "sgmd %s does not read %s; sgmd %s does",
                command,
                ", ".join(foreign),
                section,
            )


def _left_out(config: Any, keys: Sequence[str]) -> dict[str, list[str]]:  # noqa: ANN401
    """Settings that are left out, by the sentence that says by which other one."""
    mode, searched = config.topology.mode, config.sweep.dimensions
    found = {f"{_MODE} {mode} does not read {{}}": unread_in_mode(mode, keys)}
    for switch in _SWITCHES:
        value = _value(config, switch.key)
        if value == switch.off and switch.key not in searched:
            shown = "null" if value is None else value
            # What is set to nothing agrees with what leaves it out.
            found[f"{switch.key} {shown} leaves {{}} out"] = [
                key for key in keys if switch.leaves_out(key) and _value(config, key)
            ]
    if config.adversary is None and "objective.method" not in searched:
        own = tuple(f"{name}." for name in (DISCRIMINATOR, f"topology.{DISCRIMINATOR}"))
        found[f"objective.method {config.objective.method} does not read {{}}"] = [
            key for key in keys if f"{key}.".startswith(own)
        ]
    return {sentence: unread for sentence, unread in found.items() if unread}


def _other_runs(config: Any, keys: Sequence[str]) -> Iterator[Any]:  # noqa: ANN401
    """The recipe as trials of its sweep and variants of its study change it."""
    sweep, study = config.sweep, config.study
    is_swept = sweep.validate_every or any(key.startswith("sweep.") for key in keys)
    # Trials validate whatever the recipe says.
    every = {"validation.every": sweep.validate_every or sweep.iterations} if is_swept else {}
    for settings in (
        {**every, **sweep.settings},
        *({**study.settings, **variant} for variant in study.variants.values()),
    ):
        # One that is not a run is refused where it is run.
        with suppress(ConfigError):
            yield config.with_settings(settings)
