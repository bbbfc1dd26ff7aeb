"""The outermost layer of the command line: how a command that failed ends.

    exit code 0     done
              1     a run failed on the way, something necessary is missing (doctor), a set of
                    shards is not usable (check), a set lacks a whole tar or shard of its source
                    (prepare, encode), samples were lost or repeated (ledger)
              2     the request was wrong: an option, a setting, a folder, a shard; or more of the
                    data is bad than the request allows, so the same command would stop again
              128 + n   stopped by the signal n: 130 Ctrl-C, 143 SIGTERM, 129 SIGHUP, 138 SIGUSR1;
                    a run has saved its state then
    a job that is followed (submit) ends with the exit code of its command

Errors of this project are shown in words. Any other one becomes one sentence, and a file in the
system's folder for temporary files holds the traceback. Neither shows a key of the environment.
"""

import errno
import os
import platform
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.console import Console
from rich.text import Text

from cluster.errors import ClusterError, JobError, LeaseError, StorageError
from cluster.paths import nearest_folder
from cluster.redaction import printable, without_secrets
from cluster.storage_errors import disk_remedy, is_disk_full, room_at, storage_errors
from sgmd_core.errors import (
    AlarmError,
    NonFiniteError,
    SgmdError,
    StaleCallError,
    StopRequestedError,
)

FAILED = 1
WRONG_REQUEST = 2
_RUN_FAILURES = (AlarmError, ClusterError, NonFiniteError, StaleCallError)
_PACKAGES = ("sgmd", "torch", "ray", "diffusers", "transformers", "pydantic", "typer")
_LONGEST = 600
_OF_THE_SYSTEM = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    *(errno.EIO, errno.ESTALE, errno.ELOOP, errno.ENAMETOOLONG),
)
"""Numbers of errors at a path that a disk or its rights give, wherever a command meets them."""
_AGAIN = "The same command begins again."
_GOES_ON = "the same command goes on from there."
_AFTER_STOP = {
    "prepare": f"Shards that are whole are kept: {_GOES_ON}",
    "encode": f"Shards that are whole are kept: {_GOES_ON}",
    "pretrain": f"Finished stages and checkpoints are kept: {_GOES_ON}",
    "study": f"Finished runs and measurements are kept: {_GOES_ON}",
    "sweep": "A sweep that has begun goes on with: sgmd sweep RECIPE --resume",
    "evaluate": "Measurements of the teacher that are finished are kept; evaluation.json has not "
    "been written. The same command goes on with them.",
    "generate": "Clips that are finished are kept; the same command makes all of them again.",
    "report": "The page is as it was before. The same command begins again.",
    "submit": "A job that the cluster has accepted goes on; `ray job list` shows it.",
}
"""Words on what a stopped command keeps and how it goes on, for where no note says so."""


def report_failure(
    error: BaseException, command: str, arguments: Sequence[str], stopped_by: int = 0
) -> int:
    """Shows how a command failed, on standard error.

    Args:
        error: What ended it.
        command: Its name, for example "distill".
        arguments: Arguments of the process, for the file of details.
        stopped_by: Number of the signal that asked the command to stop, of which any error may be
            a consequence; 0 where none has come.

    Returns:
        The exit code.
    """
    if isinstance(error, KeyboardInterrupt) or stopped_by:
        number = stopped_by or signal.SIGINT
        how = "with Ctrl-C" if number == signal.SIGINT else f"by {signal.Signals(number).name}"
        tells = isinstance(error, StopRequestedError)
        words = f"{type(error).__name__}: {error}" if tells else ""
        notes = _notes(error) or ([] if tells else [_AFTER_STOP.get(command, _AGAIN)])
        _show([words or f"Interrupted: sgmd {command} was stopped {how}.", *notes])
        return 128 + number
    error = _worded(error, command, arguments)
    if isinstance(error, SgmdError):
        if isinstance(error, StopRequestedError | JobError) and error.exit_code:
            code = error.exit_code
        else:
            code = FAILED if isinstance(error, _RUN_FAILURES) else WRONG_REQUEST
        _show([f"{type(error).__name__}: {error}", *_notes(error)])
        return code
    sentence = (
        f"sgmd {command} failed with {type(error).__name__}: {first_line(error)} "
        f"{_write_details(error, command, arguments)}"
    )
    _show([sentence, *_notes(error)])
    return FAILED


@contextmanager
def hinting(hint: Callable[[], str]) -> Iterator[None]:
    """Adds to an error that ends a started work how the work is taken up again.

    A wrong request gets no hint: the same command would be refused again.

    Args:
        hint: The words, asked for when something failed; empty where nothing was started.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        # Of a folder that another process writes to, that process says how it goes on.
        failed = isinstance(error, _RUN_FAILURES) and not isinstance(error, LeaseError)
        if failed or not isinstance(error, SgmdError):
            words = hint()
            said = "\n".join([str(error), *_notes(error)])
            if words and "--resume" not in said:
                error.add_note(words)
        raise


def _worded(error: BaseException, command: str, arguments: Sequence[str]) -> BaseException:
    """An error of a disk, at a path that it names or for want of room, in words; others stay."""
    is_at_path = isinstance(error, OSError) and error.filename and error.errno in _OF_THE_SYSTEM
    if isinstance(error, SgmdError) or not (is_at_path or disk_remedy(error)):
        return error
    try:
        with storage_errors(f"running sgmd {command}"):
            raise error
    except StorageError as worded:
        if is_disk_full(error) and not is_at_path:
            # It says no path: the disks that the command writes to can be looked at.
            rooms = "; ".join(filter(None, map(room_at, _disks_of(arguments))))
            worded.found = f"{worded.found.rstrip('.')} ({rooms})" if rooms else worded.found
        for note in getattr(error, "__notes__", ()):
            worded.add_note(note)
        return worded


def _disks_of(arguments: Sequence[str]) -> list[Path]:
    """A folder on each disk that a command may write to, that with the least room first."""
    values = [word.rpartition("=")[2] for word in arguments]
    named = [Path(value) for value in values if "/" in value and "://" not in value]
    variables = [Path(os.environ.get(name) or "/tmp") for name in ("TMPDIR", "RAY_TMPDIR")]
    found: dict[int, tuple[int, Path]] = {}
    for path in (*named, Path(), *variables, Path("/dev/shm")):
        with suppress(OSError):
            folder = nearest_folder(path)
            found.setdefault(folder.stat().st_dev, (shutil.disk_usage(folder).free, folder))
    return [folder for _, folder in sorted(found.values())]


def first_line(error: BaseException) -> str:
    """The first line of an error's words that says something, cut where it is long."""
    text = "" if isinstance(error, KeyError) and not error.args else str(error)
    line = next((line.strip() for line in text.splitlines() if line.strip()), "no further words")
    line = line if len(line) <= _LONGEST else line[:_LONGEST] + " ..."
    return line if line.endswith((".", "!", "?")) else line + "."


def _notes(error: BaseException) -> list[str]:
    # A note from another process goes on with that process's traceback.
    return [note.partition("\n")[0] for note in getattr(error, "__notes__", ())]


def _show(lines: Sequence[str]) -> None:
    text = printable(without_secrets("\n".join(lines)))
    Console(stderr=True).print(Text(text, style="red"), soft_wrap=True)


def _write_details(error: BaseException, command: str, arguments: Sequence[str]) -> str:
    """Writes the traceback to a file that only this user can read; says where it is."""
    lines = [
        f"sgmd {command}, {datetime.now(UTC).isoformat(timespec='seconds')}",
        f"arguments: {' '.join(arguments)}",
        f"folder: {Path.cwd()}",
        f"python {platform.python_version()}, {', '.join(_versions())}",
        "",
        "".join(traceback.format_exception(error)),
    ]
    try:
        with tempfile.NamedTemporaryFile(
            "w",
            encoding="utf-8",
            errors="backslashreplace",
            prefix=f"sgmd-{command}-",
            suffix=".txt",
            delete=False,
        ) as file:
            file.write(without_secrets("\n".join(lines)))
    except OSError as problem:
        return f"No file of details could be written ({problem}): sgmd --debug shows the traceback."
    return f"This is not a failure that sgmd knows; details are in {file.name}."


def _versions() -> Iterator[str]:
    for package in _PACKAGES:
        if package == "sgmd" or package in sys.modules:
            try:
                yield f"{package} {version(package)}"
            except PackageNotFoundError:
                continue
