"""What a module's logger is told, whatever the libraries of other tests have done to logging."""

import logging

import pytest


def record_warnings(module: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The warnings of a module from now on, formatted; grows as they come.

    `caplog` stays empty where a library that an earlier test has used turned logging off.
    """
    messages: list[str] = []
    logger = logging.getLogger(module)
    monkeypatch.setattr(logger, "warning", lambda text, *args: messages.append(text % args))
    return messages
