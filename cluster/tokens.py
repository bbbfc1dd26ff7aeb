"""Tokens by which Ray's clusters admit processes: this process's own, and a cluster's answer."""

import logging
import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Literal

from ray._raylet import Config  # pyright: ignore[reportAttributeAccessIssue] - compiled

_log = logging.getLogger(__name__)

PROBE_TIMEOUT_S = 5.0
"""Seconds that a cluster has for an answer."""


def create_token() -> None:
    """Gives this process a random token, unless it has one or a mode without tokens is chosen."""
    if not own_token() and os.environ.get("RAY_AUTH_MODE", "token") == "token":
        # It stays for the life of the process: Ray reads it once and keeps it.
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


Answer = Literal["open", "refused", "silent", "none", "unknown"]
"""Answer of a control service to a token; `silent`: none in time, `none`: it is not one."""


def asked_with(gcs_address: str, token: str = "") -> Answer:
    """Answer of a cluster to a token, or to none.

    Args:
        gcs_address: Address of its control service, `host:port`.
        token: The token; empty: none.
    """
    if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        # The question goes in clear, and so would the token.
        return "unknown"
    try:
        import grpc
    except ImportError:
        return "unknown"
    # As Ray does, whatever proxy the environment names.
    options = (("grpc.enable_http_proxy", 0),)
    with grpc.insecure_channel(gcs_address, options) as channel:
        call = channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")
        try:
            # An empty message, which is a valid request.
            call(
                b"",
                timeout=PROBE_TIMEOUT_S,
                metadata=(("authorization", f"Bearer {token}"),) if token else None,
            )
        except grpc.RpcError as error:
            code = getattr(error, "code", lambda: None)()
            meanings: dict[object, Answer] = {
                grpc.StatusCode.UNAUTHENTICATED: "refused",
                grpc.StatusCode.DEADLINE_EXCEEDED: "silent",
                grpc.StatusCode.UNAVAILABLE: "none",
            }
            return meanings.get(code, "unknown")
    return "open"


def offer_token() -> bool:
    """Sends the token of this process from here on, to a server that has asked for one.

    Returns:
        False if nothing is changed: there is no token, or a mode is chosen, RAY_AUTH_MODE.
    """
    if "RAY_AUTH_MODE" in os.environ or not own_token():
        return False
    send_token()
    return True


def send_token() -> None:
    """Makes Ray send the token of this process, which it does in its mode `token` alone.

    Where no mode is set, Ray takes that one for a new cluster, and none for one that it joins.
    """
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        # Ray has read its settings already.
        Config.initialize("")


def warn_without_token(gcs_address: str) -> None:
    """Warns of a cluster that asks for no token, unless RAY_AUTH_MODE is `disabled` here."""
    if os.environ.get("RAY_AUTH_MODE") != "disabled" and asked_with(gcs_address) == "open":
        _log.warning(
            "the Ray cluster at %s asks for no token: whoever reaches its ports can run code on "
            "it. Start it with RAY_AUTH_MODE=token and RAY_AUTH_TOKEN on every node, or set "
            "RAY_AUTH_MODE=disabled here where its network is trusted",
            gcs_address,
        )


def own_token() -> str:
    """Token of this process, where Ray looks for it; empty without one."""
    if os.environ.get("RAY_AUTH_MODE", "token") != "token":
        return ""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token.strip()
    path = os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token"
    with suppress(OSError):
        return Path(path).read_text().strip()
    return ""
