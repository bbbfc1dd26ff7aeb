"""Name every value in which two records differ, so that nothing resumes with other settings."""

import json
from collections.abc import Mapping
from typing import Any


def value_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Every key whose value is another one, with both values.

    Args:
        before: Recorded values by dotted key.
        now: Values now.
    """
    keys = sorted({*before, *now})
    # A section in place of null: its own keys are listed.
    sections = {key for key in keys for other in keys if other.startswith(f"{key}.")}
    return [
        f"{key} is {format_value(now, key)}, and was {format_value(before, key)}"
        for key in keys
        if key not in sections and format_value(before, key) != format_value(now, key)
    ]


def format_value(values: Mapping[str, Any], key: str) -> str:
    """A value as JSON; `not set` where there is none."""
    return json.dumps(values[key]) if key in values else "not set"
