"""Settings of the connection to an S3 server."""

from dataclasses import dataclass
from typing import Literal

from sgmd_core.errors import ConfigError

DEFAULT_READ_BUDGET_S = 120.0


@dataclass(frozen=True, slots=True)
class S3Settings:
    """Connection to an S3 server.

    Attributes:
        checksums: `when_required` for servers that do not know the checksums which newer clients
            send and ask for; null leaves it to the AWS variables and the SDK (`when_supported`).
        addressing: Place of the bucket, in the path or in the host name; `auto` suits AWS and
            servers that are named by their IP address.
        connect_timeout_s: How long opening a connection may take.
        read_timeout_s: How long the server may stay silent in the middle of an answer.
        max_attempts: Tries of one request, the first one included. After a 5xx, SlowDown, timeout
            or broken connection the SDK waits, at random and twice as long each time, up to 20 s.
        retry_mode: `adaptive` also sends fewer requests after a SlowDown.
        read_attempts: Tries of one read after its answer broke off or the server failed; what is
            not served after them is quarantined while the server serves other files, and stops the
            run if it does not.
        read_budget_s: Time that all tries of one read may take together, and a second more for
            each MiB. A read that takes long is reported at each quarter of it.
        backoff_s: Wait before the second of these tries; it doubles with each, up to 30 s.
        native_reads: Read row groups with Arrow's own clients first, also of local files; what
            they cannot read comes through fsspec, as all the rest does.
    """

    checksums: Literal["when_required", "when_supported"] | None = None
    addressing: Literal["auto", "path", "virtual"] = "auto"
    connect_timeout_s: float = 5.0
    read_timeout_s: float = 30.0
    max_attempts: int = 5
    retry_mode: Literal["standard", "adaptive"] = "standard"
    read_attempts: int = 4
    read_budget_s: float = DEFAULT_READ_BUDGET_S
    backoff_s: float = 0.5
    native_reads: bool = True

    def __post_init__(self) -> None:
        """Checks the values."""
        for name in (
            "connect_timeout_s",
            "read_timeout_s",
            "max_attempts",
            "read_attempts",
            "read_budget_s",
        ):
            value = getattr(self, name)
            if value <= 0:
                raise ConfigError("reading the settings", f"data.s3.{name}: {value}", "above 0")
        if self.backoff_s < 0:
            raise ConfigError(
                "reading the settings", f"data.s3.backoff_s: {self.backoff_s}", "at least 0"
            )
