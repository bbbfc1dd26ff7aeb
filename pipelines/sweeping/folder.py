"""The folder of a sweep: its recipe, the state that its trials begin with, and left leases."""

import time
from contextlib import suppress
from pathlib import Path

from cluster.errors import StorageError
from cluster.lease import LEASE_FILE, hold_if_free
from cluster.storage import write_text
from pipelines.config.captions_of_jobs import keep_captions
from pipelines.config.recipe import DistillConfig, load_recipe
from pipelines.distillation.branching import keep_state, states_of
from pipelines.distillation.run import NOT_NEEDED
from pipelines.run.differences import value_differences
from pipelines.run.folder import RunFolder
from pipelines.run.opened_copy import working_copy
from pipelines.run.places import shared_place
from pipelines.sweeping.places import START, TRIALS
from sgmd_core.errors import ConfigError

# For how long the processes of ended trials are waited for.
_ENDING_S, _LOOK_EVERY_S = 5.0, 0.1
_MAY_CHANGE = ("concurrent_trials",)
_RECIPE = "recipe.yaml"


def has_begun(folder: Path) -> bool:
    """Returns True if a sweep has begun in a folder on this machine."""
    return (folder / _RECIPE).exists()


def take_folder(config: DistillConfig, folder: Path, *, resume: bool) -> None:
    """Writes the recipe into a new folder, or compares it with that of the folder.

    Args:
        config: The recipe.
        folder: The sweep's, on this machine.
        resume: The sweep has begun there.

    Raises:
        ConfigError: The folder is not free, not there, or another sweep's.
    """
    require_folder(config, folder, resume=resume)
    if not resume:
        keep_captions(config.data, folder)
        write_text(str(folder / _RECIPE), config.to_yaml())


def require_folder(config: DistillConfig, folder: Path, *, resume: bool) -> None:
    """Checks that a new sweep can begin in a folder, or that this one has begun there.

    Args:
        config: The recipe.
        folder: The sweep's, on this machine.
        resume: The sweep has begun there.

    Raises:
        ConfigError: The folder is not free, not there, or another sweep's.
    """
    began, place = folder / _RECIPE, shared_place(folder)
    if not resume:
        if began.exists():
            raise ConfigError(
                f"starting a sweep in {place}",
                "another one is there",
                "a name that is free",
                "Choose another one with name=..., go on with --resume, or delete the folder",
            )
        return
    attempted = f"going on with the sweep in {place}"
    if not began.exists():
        raise ConfigError(
            attempted,
            f"no {_RECIPE} there",
            "the folder of an earlier sweep",
            "Check name and output; without --resume a new sweep is started",
        )
    before = load_recipe(str(began))
    now, then = (
        each.deciding_settings
        | {
            f"sweep.{name}": value
            for name, value in each.sweep.model_dump(mode="json").items()
            if name not in _MAY_CHANGE
        }
        for each in (config, before)
    )
    found = value_differences(then, now)
    if found:
        raise ConfigError(
            attempted,
            "; ".join(found),
            "the recipe that it began with, except for sweep.concurrent_trials",
            f"Its recipe is {place}/{_RECIPE}",
        )


def keep_start(config: DistillConfig, folder: Path, iteration: int) -> None:
    """Copies the state that trials begin with into the sweep's folder, unless it is there.

    Args:
        config: The recipe; without `sweep.start_from` nothing is copied.
        folder: The sweep's, on this machine.
        iteration: Of the state.
    """
    start = config.sweep.start_from
    if start and not _has_start(folder):
        with working_copy(start, NOT_NEEDED):
            keep_state(RunFolder(start), RunFolder(folder / START), iteration=iteration)


def from_kept_start(config: DistillConfig, folder: Path) -> DistillConfig:
    """The recipe of a sweep whose trials go on from the state that the sweep has kept, if it has.

    The run that `sweep.start_from` names may go on and delete its older states: trials that begin
    after a `--resume` would begin elsewhere than those before.

    Args:
        config: The recipe.
        folder: The sweep's.
    """
    if not config.sweep.start_from or not _has_start(folder):
        return config
    return config.with_settings({"sweep.start_from": shared_place(folder / START)})


def _has_start(folder: Path) -> bool:
    return states_of(RunFolder(folder / START)).latest() is not None


def delete_left_leases(folder: Path) -> None:
    """Deletes the leases of trials whose processes were ended, which may take a moment to end.

    One that still runs then keeps its own.

    Args:
        folder: The sweep's, on this machine.
    """
    deadline_s = time.monotonic() + _ENDING_S
    while left := list((folder / TRIALS).glob(f"*/{LEASE_FILE}")):
        for file in left:
            with suppress(StorageError), hold_if_free(str(file.parent), "sgmd sweep"):
                pass
        if time.monotonic() >= deadline_s:
            return
        time.sleep(_LOOK_EVERY_S)
