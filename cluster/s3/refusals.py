"""Refusals of an S3 server that are about the request itself, each with what to do.

The client words an error by its kind, such as PermissionError, and keeps the server's code in its
cause.
"""

from collections.abc import Mapping
from typing import Any

from botocore.exceptions import ClientError

_REGION = (
    "a request to the region in which the bucket is",
    "Set AWS_DEFAULT_REGION to that region; `aws s3api get-bucket-location` names it",
)
_CLOCK = (
    "a clock that agrees with the server's",
    "Set the clock of this machine: S3 refuses requests that are a quarter of an hour off",
)
_KEYS = (
    "keys that are still valid",
    "Fetch new ones, with their AWS_SESSION_TOKEN, and give the command again; a run goes on with "
    "--resume",
)
_WORDLESS = (
    "a request that the server takes; to one for a file's size alone it does not say why not",
    "Check that AWS_SESSION_TOKEN has not expired, AWS_DEFAULT_REGION is the bucket's region and "
    "this machine's clock is right",
)
_BUSY = (
    "a server that is not overloaded",
    "Try again later, or have fewer processes ask at once",
)
_TOO_MANY_REQUESTS = 429
_BY_CODE = {
    "PermanentRedirect": _REGION,
    "AuthorizationHeaderMalformed": _REGION,
    "IllegalLocationConstraintException": _REGION,
    "RequestTimeTooSkewed": _CLOCK,
    "RequestExpired": _CLOCK,
    "ExpiredToken": _KEYS,
    "TokenRefreshRequired": _KEYS,
    "InvalidToken": _KEYS,
    # Answers to HEAD have no body: the SDK takes the status for a code.
    "301": _REGION,
    "400": _WORDLESS,
}


def refusal_remedy(error: BaseException) -> tuple[str, str] | None:
    """Returns what the server expected and what to do; None if the refusal is another one.

    Args:
        error: The client's error.
    """
    if asks_for_fewer_requests(error):
        return _BUSY
    answer = _answer(error)
    return _BY_CODE.get(str(answer.get("Error", {}).get("Code", "")))


def asks_for_fewer_requests(error: BaseException) -> bool:
    """Returns True for the status 429, of which the SDK and s3fs know nothing."""
    status = _answer(error).get("ResponseMetadata", {}).get("HTTPStatusCode")
    return bool(status == _TOO_MANY_REQUESTS)


def _answer(error: BaseException) -> Mapping[str, Any]:
    """The server's answer, from the error that it has made; empty where it has made none."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ClientError):
            return cause.response
        cause = cause.__cause__
    return {}
