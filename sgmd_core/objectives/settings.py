"""Checks of an objective's own numbers."""

import math

from sgmd_core.errors import ConfigError


def require_number(name: str, value: float, *, zero_allowed: bool) -> None:
    """Checks a weight or a floor of an objective.

    Args:
        name: Name of the setting.
        value: Its value.
        zero_allowed: Whether 0 has a meaning.

    Raises:
        ConfigError: It is negative, not finite, or 0 without a meaning.
    """
    if not math.isfinite(value) or value < 0 or (value == 0 and not zero_allowed):
        raise ConfigError(
            "reading the objective",
            f"{name} is {value}",
            "a number of at least 0" if zero_allowed else "a number above 0",
        )


def require_updates(fake_updates: int) -> None:
    """Checks the number of fake-score updates per iteration.

    Args:
        fake_updates: The number.

    Raises:
        ConfigError: It is below 1.
    """
    if fake_updates < 1:
        raise ConfigError(
            "reading the objective", f"fake_updates is {fake_updates}", "a count of at least 1"
        )
