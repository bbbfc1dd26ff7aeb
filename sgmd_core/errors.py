"""Every error a user of sgmd can meet, as one tree.

    SgmdError
    ├── ConfigError            a recipe, an override or a combination of settings is wrong
    ├── ModelFolderError       a diffusers folder is missing, incomplete or of another family
    ├── ShapeError             latents, videos or captions do not fit the networks
    ├── DataError              shards are missing, empty, corrupt or lack a column
    ├── CheckpointError        a run folder or checkpoint cannot be read or does not fit
    ├── StaleCallError         a role was asked about a batch that it no longer holds
    ├── NonFiniteError         a loss or a gradient stopped being finite
    ├── AlarmError             a run was ended by an alarm that the recipe stops at
    └── StopRequestedError     a run was ended by a signal such as Ctrl-C, its state saved

Each error keeps the facts it was raised with and words them in `__str__`, so that it arrives from
another process with its type and its fields.
"""

import re
import signal


class SgmdError(Exception):
    """Base of all errors that say what was attempted, found and expected, and what to do.

    Args:
        attempted: What the program was doing, for example "reading the recipe tiny.yaml".
        found: What it met, with values.
        expected: What would have been right.
        remedy: What the user can do about it.
    """

    def __init__(self, attempted: str, found: str, expected: str = "", remedy: str = "") -> None:
        super().__init__(attempted, found, expected, remedy)
        self.attempted = attempted
        self.found = found
        self.expected = expected
        self.remedy = remedy

    def __str__(self) -> str:
        parts = [f"While {self.attempted}: {self.found}"]
        if self.expected:
            parts.append(f"Expected {self.expected}")
        if self.remedy:
            parts.append(self.remedy)
        return " ".join(part.rstrip(".") + "." for part in parts)


class ConfigError(SgmdError, ValueError):
    """A recipe, an override or a combination of settings is wrong."""


class ModelFolderError(SgmdError):
    """A diffusers folder is missing, incomplete or of a family that we cannot load."""


class ShapeError(SgmdError, ValueError):
    """Latents, videos or captions do not fit the networks."""


class DataError(SgmdError):
    """Shards are missing, empty, corrupt or lack a column."""


class CheckpointError(SgmdError):
    """A run folder or a checkpoint cannot be read, or does not belong to this run."""


class StaleCallError(SgmdError):
    """A role was asked about a batch that it does not hold (any more)."""


class NonFiniteError(SgmdError):
    """A loss or a gradient stopped being finite; nothing was updated."""


class AlarmError(SgmdError):
    """A run was ended by an alarm that its recipe stops at; its state is on disk."""


class StopRequestedError(SgmdError):
    """A run ended because a signal asked for it, such as Ctrl-C or SIGTERM; its state is saved."""

    @property
    def exit_code(self) -> int:
        """Exit code of a process that the signal ended: 130 for SIGINT, 143 for SIGTERM, ..."""
        named = re.search(r"SIG[A-Z]+[0-9]*", self.found)
        return 128 + signal.Signals[named[0]] if named else 130


def non_finite_remedy(num_updates: int, settings: str) -> str:
    """Remedy for a value that is not finite, by its likely cause.

    Args:
        num_updates: Updates that the weights have seen; before the first one, no rate is at fault.
        settings: Settings to lower once updates have been made.
    """
    if num_updates == 0:
        return (
            "No update has been made yet, so no rate is at fault: check the model's weights, the "
            "data of this batch, and whether compute.precision=fp32 is finite"
        )
    return (
        f"Lower {settings}; where a lower rate fails at the same iteration, look at the data of "
        "its batch"
    )
