"""A command, run as a Ray job on a cluster: upload the sources, start, follow, judge.

    submit_job(address, argv, working_dir)  ->  job id  ->  follow_job(address, id, on_log)
                                                        ->  wait_for_job(address, id)

The cluster unpacks the working directory and runs the command there; inside, `start_ray` finds the
cluster through RAY_ADDRESS. A job runs once: to try again is to submit again, with the arguments
that resume it. It stays on the cluster when the follower goes away.

Environment variables of a job are part of its record, which everybody who may list jobs can read.
So only those that hold no secret are forwarded by themselves; a key goes along when it is named.
On a cluster that needs S3, better give the nodes a role or the keys in their own environment.
"""

import asyncio
import logging
import os
import re
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from cluster.errors import JobError
from cluster.job_files import EXCLUDED
from cluster.tokens import offer_token
from sgmd_core.errors import ConfigError

FORWARDED = (
    "AWS_ENDPOINT_URL*",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_*_CHECKSUM_*",
    "WANDB_MODE",
    "WANDB_ENTITY",
    "WANDB_BASE_URL",
)
"""Patterns of variables without secrets that a job needs to find the same services."""

_ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
# Seconds from SIGTERM to SIGKILL when a job is stopped: Ray's own 3 are too few to save a state.
_STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
_TALKATIVE = (
    JobSubmissionClient.__module__,
    "ray.dashboard.modules.dashboard_sdk",
)
_POLL_S = 0.5
_WAIT_POLL_S = 2.0
_POLLS_AFTER_LOG = 20
# A day-long log passes through proxies and restarts of the dashboard.
_RECONNECTS = 10
_RECONNECT_S = 3.0
# Words of Ray's client about a job that the cluster has no record of.
_NOT_KNOWN = "status code 404"
# A cluster that has just started answers before it can run a job.
_NO_AGENT_YET = "No available agent"
_AGENT_TIMEOUT_S = 60.0
_LONGEST_WORDS = 300


def forwarded_environment(
    also: Sequence[str] = (), environment: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """The variables of this process that go along with a job.

    Args:
        also: Names besides `FORWARDED`; the place to name a key such as AWS_SECRET_ACCESS_KEY.
        environment: Where to take them from.

    Raises:
        ConfigError: A named variable is not set.
    """
    missing = [name for name in also if name not in environment]
    if missing:
        raise ConfigError(
            "collecting the environment of a job",
            f"{', '.join(missing)} not set",
            "every variable that is named to be set",
            "Export it, or leave it out",
        )
    forwarded = {
        name: without_user(value)
        for name, value in environment.items()
        if any(fnmatchcase(name, pattern) for pattern in FORWARDED)
    }
    return forwarded | {name: environment[name] for name in also}


def without_user(address: str) -> str:
    """An address without the user and password that may stand before its host."""
    return re.sub(r"(?<=//)[^/?#]*@", "", address)


def submit_job(
    address: str,
    argv: Sequence[str],
    working_dir: Path,
    env_vars: Mapping[str, str] | None = None,
    excludes: Sequence[str] = EXCLUDED,
    num_cpus: float | None = None,
    metadata: Mapping[str, str] | None = None,
) -> str:
    """Uploads a folder and starts a command in it.

    Args:
        address: The cluster's dashboard, such as http://head:8265.
        argv: The command, one word an entry.
        working_dir: What the command needs beside installed packages, at most 512 MiB.
        env_vars: Environment of the command; not for secrets, see above. Where it does not say how
            long a job that is stopped may take to end (RAY_JOB_STOP_WAIT_TIME_S), this is as here,
            or 900 s.
        excludes: Patterns of what is not uploaded, in the syntax of .gitignore.
        num_cpus: Logical CPUs to hold for the command itself; None: it takes none.
        metadata: Words that Ray keeps beside the job; `job_metadata` reads them.

    Returns:
        The job's id.

    Raises:
        JobError: The cluster cannot be reached, refuses us, or refuses the job.
    """
    client = job_client(address)
    runtime_env = {
        "working_dir": str(working_dir),
        "excludes": list(excludes),
        "env_vars": {_STOP_WAIT: os.environ.get(_STOP_WAIT, "900"), **(env_vars or {})},
    }
    deadline = time.monotonic() + _AGENT_TIMEOUT_S
    while True:
        try:
            return client.submit_job(
                entrypoint=shlex.join(argv),
                runtime_env=runtime_env,
                entrypoint_num_cpus=num_cpus,
                metadata=dict(metadata or {}),
            )
        except (RuntimeError, ValueError, OSError) as error:
            if _NO_AGENT_YET in str(error) and time.monotonic() < deadline:
                time.sleep(_POLL_S)
                continue
            raise _refused(working_dir, address, error) from error


def follow_job(
    address: str, job_id: str, on_log: Callable[[str], None], timeout_s: float | None = None
) -> None:
    """Passes on what a job prints from its beginning, and waits until it has ended.

    A connection that breaks is made again, and nothing is passed on twice.

    Args:
        address: The cluster's dashboard.
        job_id: What `submit_job` returned.
        on_log: Called with each piece of output; pieces need not be whole lines.
        timeout_s: How long to follow; None: to the end. The job itself goes on after a timeout.

    Raises:
        JobError: The job failed, was stopped, or has not ended in time.
    """
    client = job_client(address)
    try:
        asyncio.run(_followed(client, address, job_id, on_log, timeout_s))
    except TimeoutError as error:
        raise JobError(
            f"following job {job_id}",
            f"it has not ended within {timeout_s:g} s",
            "an end in time",
            f"It goes on; `ray job logs {job_id}` shows what it does, `ray job stop` ends it",
        ) from error
    _require_success(_details(client, address, job_id), job_id)


def wait_for_job(address: str, job_id: str) -> None:
    """Waits until a job has ended.

    Raises:
        JobError: The job failed or was stopped.
    """
    client = job_client(address)
    while not (found := _details(client, address, job_id)).status.is_terminal():
        time.sleep(_WAIT_POLL_S)
    _require_success(found, job_id)


def job_metadata(address: str, job_id: str) -> dict[str, str]:
    """The metadata that a job was submitted with, such as the folder of its run.

    Raises:
        JobError: The cluster cannot be reached, or knows no such job.
    """
    return dict(_details(job_client(address), address, job_id).metadata or {})


def _details(client: JobSubmissionClient, address: str, job_id: str) -> JobDetails:
    """Asks for a job, as often as a log that breaks off is asked for again."""
    breaks = 0
    while True:
        try:
            return client.get_job_info(job_id)
        except (RuntimeError, OSError) as error:
            if _NOT_KNOWN in str(error):
                raise JobError(
                    f"asking for job {job_id}",
                    first_words(str(error)),
                    "a job that this cluster knows",
                    "`ray job list` shows them; a cluster that was started again knows none of "
                    "before",
                ) from error
            breaks += 1
            if breaks > _RECONNECTS:
                raise _unanswered(address, job_id, error, breaks) from error
            time.sleep(_RECONNECT_S)


def _unanswered(address: str, job_id: str, error: Exception, times: int) -> JobError:
    return JobError(
        f"following job {job_id} at {address}",
        f"{type(error).__name__}: {first_words(str(error))}, {times} times",
        "a dashboard that answers",
        f"The job may go on: come back to it with sgmd submit --follow {job_id} "
        f"--address {address}",
    )


def _require_success(found: JobDetails, job_id: str) -> None:
    if found.status is JobStatus.SUCCEEDED:
        return
    # Ray adds up to 20,000 characters of the log, which has been passed on already.
    message = first_words(found.message or "").removesuffix(
        ", last available logs (truncated to 20,000 chars):"
    )
    if found.status is JobStatus.STOPPED:
        expected, remedy = "a job that nobody stops", "Submit it again with -- --resume auto"
    else:
        expected, remedy = "the command to succeed", "Its output says why"
    code = found.driver_exit_code
    raise JobError(
        f"running job {job_id}",
        f"{found.status}: {message}",
        expected,
        f"{remedy}: ray job logs {job_id}" if code is None else remedy,
        exit_code=code if code is None or code >= 0 else 128 - code,
    )


def first_words(text: str) -> str:
    """The first line of a text, cut where it is long."""
    line = text.strip().partition("\n")[0]
    return line if len(line) <= _LONGEST_WORDS else line[:_LONGEST_WORDS] + " ..."


async def _followed(
    client: JobSubmissionClient,
    address: str,
    job_id: str,
    on_log: Callable[[str], None],
    timeout_s: float | None,
) -> None:
    passed_on = 0
    breaks = 0
    async with asyncio.timeout(timeout_s):
        while True:
            to_skip = passed_on
            try:
                async for piece in client.tail_job_logs(job_id):
                    news, to_skip = piece[to_skip:], max(0, to_skip - len(piece))
                    if news:
                        on_log(news)
                        passed_on, breaks = passed_on + len(news), 0
                # The log may end a moment before the cluster has taken note of the end.
                for _ in range(_POLLS_AFTER_LOG):
                    if client.get_job_status(job_id).is_terminal():
                        return
                    await asyncio.sleep(_POLL_S)
            except (RuntimeError, OSError, aiohttp.ClientError) as error:
                breaks += 1
                if breaks > _RECONNECTS:
                    raise _unanswered(address, job_id, error, breaks) from error
                await asyncio.sleep(_RECONNECT_S)


def _refused(working_dir: Path, address: str, error: Exception) -> JobError:
    return JobError(
        f"submitting a job from {working_dir} to {address}",
        f"{type(error).__name__}: {error}",
        "a folder of less than 512 MiB and a command that the cluster accepts",
        "Name what is not needed in .rayignore",
    )


def job_client(address: str) -> JobSubmissionClient:
    """A connection to the job server of a cluster, with its token where it asks for one.

    Raises:
        JobError: Nobody answers there, the token is missing, or the environment names another one.
    """
    attempted = f"reaching the job server at {address}"
    for name in _ADDRESS_VARIABLES:
        if os.environ.get(name, address) != address:
            raise JobError(
                attempted,
                f"{name}={os.environ[name]}, which Ray would take instead",
                "one address",
                f"Unset {name}, or give the same address",
            )
    # They report how the connection of a log was closed.
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        try:
            return JobSubmissionClient(address)
        except AuthenticationError:
            if not offer_token():
                raise
            return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise JobError(
            attempted,
            f"{type(error).__name__}: {error.message}",
            "RAY_AUTH_MODE=token, and the cluster's token in RAY_AUTH_TOKEN or ~/.ray/auth_token",
            "Export both before the program starts: Ray reads the mode when it is imported",
        ) from error
    except (RuntimeError, ValueError, OSError) as error:
        raise JobError(
            attempted,
            f"{type(error).__name__}: {error}",
            "the address of a dashboard, such as http://127.0.0.1:8265, and ray[default] both here"
            " and there",
            "`ray start --head --dashboard-host=...` prints the address;"
            " `pip install 'ray[default]'` brings what job submission needs",
        ) from error
