"""Text for logs, errors, terminals and files: without secrets, and without control characters."""

import os
import re

_SECRET_NAME = re.compile(
    r"(^|_)(KEY|SECRET|TOKEN|PASSWORD|PASSWD|CREDENTIALS?)(_ID)?($|_)", re.IGNORECASE
)
# A key after a colon may hold a slash; a port before a path that holds an @ is none.
_USER = r"//(?:[^/@\s]+|[^/@\s:]+:(?!\d+/)[^@\s]+)@"
_USER_IN_URL = re.compile(_USER)
_ADDRESS_WITH_USER = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:" + _USER)
_PASSWORD_IN_URL = re.compile(r"//[^/@\s:]+:(?!\d+/)([^@\s]+)@")
# Terminals obey these; lines and tabs are text.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_SHORTEST = 6
"""Shorter values, such as `true`, are not secrets and may occur in any text."""


def has_user(address: str) -> bool:
    """Returns True if an address has a user, and perhaps a password or key, before its host."""
    return _ADDRESS_WITH_USER.search(address) is not None


def without_secrets(text: str) -> str:
    """The text with every key of the environment, and users in addresses, blotted out."""
    values = {
        value
        for name, value in os.environ.items()
        if len(value) >= _SHORTEST
        and _SECRET_NAME.search(name)
        and not name.endswith(("_PATH", "_FILE", "_DIR"))
    }
    values |= {
        found[1]
        for value in os.environ.values()
        for found in _PASSWORD_IN_URL.finditer(value)
        if len(found[1]) >= _SHORTEST
    }
    # The longest first: one value may be a part of another.
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, "***")
    return _USER_IN_URL.sub("//***@", text)


def printable(text: str) -> str:
    """Text that can be stored and shown: what is not a character is written as an escape.

    Names and values of foreign data may hold codes that a terminal would obey.
    """
    text = text.encode("utf-8", errors="backslashreplace").decode()
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)
