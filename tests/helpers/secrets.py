"""Secrets planted in the environment, and a search for them in all that a program has written."""

import os
from collections.abc import Iterable
from pathlib import Path

import pytest

PLANTED = {
    "AWS_ACCESS_KEY_ID": "AKIAPLANTED0KEY0ID00",
    "AWS_SECRET_ACCESS_KEY": "planted/aws+secret0access0key",
    "AWS_SESSION_TOKEN": "planted-session-token",
    "WANDB_API_KEY": "planted0wandb0api0key0" + "0" * 18,
    "HF_TOKEN": "hf_planted_token_of_the_hub",
}
"""By name of the variable. The token of Ray is that of the tests' own clusters."""


def plant(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Sets all of them for this process, and an endpoint with a user; returns what to search."""
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://planted-user:planted-password@127.0.0.1:9")
    return [*PLANTED.values(), "planted-password", os.environ["RAY_AUTH_TOKEN"]]


def files_with(secrets: Iterable[str], *folders: Path) -> list[str]:
    """Files under some folders that hold one of the secrets, and which."""
    plain = [secret.encode() for secret in secrets]
    # Tune writes pickles as hexadecimal digits.
    wanted = [*plain, *(secret.hex().encode() for secret in plain)]
    return [
        f"{path}: {secret.decode()}"
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink()
        for content in [path.read_bytes()]
        for secret in wanted
        if secret in content
    ]
