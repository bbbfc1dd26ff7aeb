"""Begins a run from a state of another run, with other settings.

A run that is resumed keeps the settings it began with. A branch is a new run: it has its own folder
and identity, and what its earlier iterations were made with stands in the folder it came from.
"""

import os
import shutil
from collections.abc import Collection
from pathlib import Path

from cluster.checkpoints import MANIFEST, Checkpoints
from cluster.files import delete_folder, whole_folder
from cluster.folders import copy_folder_at
from cluster.stores import store_address
from pipelines.config.recipe import DistillConfig, load_recipe
from pipelines.distillation.position import begin, differences
from pipelines.distillation.preflight import run_preflight
from pipelines.distillation.training_sets import training_sets
from pipelines.run.data_log import DataLog
from pipelines.run.folder import RunFolder
from pipelines.run.opened_copy import copy_at
from pipelines.run.places import shared_place
from sgmd_core.errors import CheckpointError

_LOGS = ("metrics", "validation", "shards", "quarantine", "ledger", "sets")


def newest_state(source: RunFolder) -> int:
    """Iteration of the newest whole checkpoint of a run.

    Raises:
        CheckpointError: There is no run, or no whole checkpoint of it.
    """
    source.require("going on from")
    checkpoints = states_of(source)
    for step in reversed(checkpoints.all_steps()):
        if not checkpoints.fault(step, contents=True):
            return step
    raise CheckpointError(
        f"going on from {source}",
        "no whole checkpoint there",
        "a run that has saved its state",
        "Runs save at their end and every checkpoint.every iterations",
    )


def branch(
    source: RunFolder, config: DistillConfig, may_differ: Collection[str], *, iteration: int
) -> None:
    """Makes the folder of a run that goes on from a state of another; resume it afterwards.

    Args:
        source: The run that has the state.
        config: The new run.
        may_differ: Settings by dotted key that need not be those of the source.
        iteration: The state's.

    Raises:
        CheckpointError: The state is broken, or the runs differ in something else; names it.
        ConfigError: The folder of the new run exists.
    """
    checkpoints = states_of(source)
    attempted = f"going on from iteration {iteration} of {source}"
    fault = checkpoints.fault(iteration, contents=True)
    if fault:
        raise CheckpointError(attempted, fault, "a whole checkpoint", "Take another run or state")
    require_branch(source, config, may_differ)
    target = RunFolder(config.run_folder)
    begin(config, run_preflight(config), target)
    for name in _LOGS:
        _copy(getattr(source, name), getattr(target, name))
    target.rewind(iteration)
    DataLog(target, len(training_sets(config))).rewind(iteration)
    _publish(target)
    _copy_state(checkpoints.folder(iteration), states_of(target).folder(iteration))


def keep_state(source: RunFolder, target: RunFolder, *, iteration: int) -> None:
    """Keeps one state of a run, and what a branch takes along, however that run goes on.

    Args:
        source: The run that has the state.
        target: Folder to make; it can be branched from as the run can, once it has the state.
        iteration: The state's.
    """
    for name in ("config", "identity", *_LOGS):
        _copy(getattr(source, name), getattr(target, name))
    _publish(target)
    _copy_state(states_of(source).folder(iteration), states_of(target).folder(iteration))


def states_of(run: RunFolder) -> Checkpoints:
    """The committed states of a run, at its place."""
    return Checkpoints(shared_place(run.checkpoints))


def ensure_branch(
    source: RunFolder, config: DistillConfig, may_differ: Collection[str], *, iteration: int
) -> None:
    """Makes a branch that is not there yet, or of which only a part is.

    The state is copied last. Without it a branch that was interrupted on the way would begin again
    as a run of its own when it is resumed.

    Args:
        source: As in `branch`, as all that follow.
        config: See there.
        may_differ: See there.
        iteration: See there.

    Raises:
        CheckpointError: See there.
    """
    target = RunFolder(config.run_folder)
    if states_of(target).latest() is not None or target.summary.exists():
        return
    if copy := copy_at(target.root):
        copy.clear()
    elif target.root.exists():
        delete_folder(target.root)
    branch(source, config, may_differ, iteration=iteration)


def require_branch(source: RunFolder, config: DistillConfig, may_differ: Collection[str]) -> None:
    """Checks that a run may go on from the state of another.

    Raises:
        CheckpointError: They differ in a setting that is not in `may_differ`, in the model or the
            data.
    """
    before = load_recipe(str(source.config)).deciding_settings
    # A section with a method of its own may have lost or gained keys.
    sections = {key.rpartition(".")[0] for key in may_differ if key.endswith(".method")}
    taken = {
        key: value
        for key, value in before.items()
        if key in may_differ or key.rpartition(".")[0] in sections
    }
    same = config.with_settings(taken)
    found = differences(same, run_preflight(same), source)
    if found:
        raise CheckpointError(
            f"going on from {source}",
            "; ".join(found),
            "a run with the same model, data and settings except for those that are searched",
            "Take those settings into the recipe, or start from another run",
        )


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
    elif source.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)


def _publish(run: RunFolder) -> None:
    """Brings what belongs to a state to its address, before the state."""
    if copy := copy_at(run.root):
        copy.publish()


def _copy_state(source: str, target: str) -> None:
    if store_address(source) or store_address(target):
        copy_folder_at(source, target, last=(MANIFEST,))
        return
    with whole_folder(target) as draft:
        shutil.copytree(source, draft, dirs_exist_ok=True, copy_function=_linked)


def _linked(source: str, target: str) -> str:
    """Links a file, which nobody changes once it is committed; copies it to another disk."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target
