"""Text for logs, errors and files, with secrets blotted out."""

import os
import re

_SECRET_NAME = re.compile(
    r"(^|_)(KEY|SECRET|TOKEN|PASSWORD|PASSWD|CREDENTIALS?)(_ID)?($|_)", re.IGNORECASE
)
_USER_IN_URL = re.compile(r"//[^/@\s]+@")
_SHORTEST = 6
"""Shorter values, such as `true`, are no secrets and may occur in any text."""


def without_secrets(text: str) -> str:
    """The text with every key of the environment, and users in addresses, blotted out."""
    values = {
        value
        for name, value in os.environ.items()
        if len(value) >= _SHORTEST
        and _SECRET_NAME.search(name)
        and not name.endswith(("_PATH", "_FILE", "_DIR"))
    }
    # The longest first: one value may be a part of another.
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, "***")
    return _USER_IN_URL.sub("//***@", text)
