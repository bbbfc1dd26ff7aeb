"""States of a run that are being saved while something goes wrong: kept whole, or lost and said."""

import errno
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch

from cluster.checkpoints import Checkpoints
from cluster.errors import LeaseLostError, StorageError, WorkerDiedError
from cluster.local import LocalWorkerGroup
from pipelines.config.recipe import load_recipe
from pipelines.distillation.exports import Exports
from pipelines.distillation.iteration import Roles
from pipelines.distillation.monitor import RunMonitor
from pipelines.distillation.position import Position
from pipelines.distillation.states import States
from pipelines.run.folder import RunFolder
from pipelines.run.observer import RunObserver
from pipelines.run.places import add_copy, remove_copy
from pipelines.run.publisher import Publisher
from pipelines.run.stopping import StopNow
from sgmd_core.errors import NonFiniteError, StaleCallError
from tests.helpers.roles import Roles as TinyRoles
from tests.helpers.roles import iterate, tiny_roles
from workers.role_state import is_role_written, load_role


class Warnings(RunObserver):
    def __init__(self) -> None:
        self.heard: list[str] = []

    def warning(self, text: str) -> None:
        self.heard.append(text)


class World:
    """A run's roles in this process, and its states on disk."""

    def __init__(self, folder: Path) -> None:
        config = load_recipe("tiny", [f"output={folder}", "name=run", "validation.every=0"])
        self.tiny = tiny_roles()
        self.warnings = Warnings()
        run = RunFolder(config.run_folder)
        run.create(config.to_yaml())
        self.checkpoints = Checkpoints(str(run.checkpoints))
        monitor = RunMonitor(config, run, self.checkpoints, None, self.warnings)
        self.roles = Roles(*self.groups(self.tiny))
        self.folder = run
        self.states = States(config, self.roles, run, self.checkpoints, monitor)
        self.exports = Exports(config, self.roles.generator, run, self.checkpoints, monitor)

    @staticmethod
    def groups(tiny: TinyRoles) -> tuple[LocalWorkerGroup, ...]:
        text: LocalWorkerGroup = LocalWorkerGroup("text", [])
        return (
            LocalWorkerGroup("generator", [tiny.generator]),
            LocalWorkerGroup("fake_score", [tiny.fake_score]),
            LocalWorkerGroup("teacher", [tiny.teacher]),
            text,
        )

    def iterate(self, iteration: int) -> Position:
        iterate(self.tiny, iteration)
        return Position(iteration + 1)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.mark.slow
def test_a_state_is_committed_after_a_stop_that_broke_off_the_wait_for_it(
    world: World, slow_disk: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.states.save(world.iterate(0))
    world.states.collect()
    assert world.checkpoints.latest() is None

    def stop(*arguments: object, **options: object) -> None:
        raise StopNow

    slow_disk.set()
    with monkeypatch.context() as broken_off:
        broken_off.setattr(world.roles.generator, "fetch", stop)
        with pytest.raises(StopNow):
            world.states.settle()
    assert world.checkpoints.latest() is None
    assert "step-000001" in world.states.last_good()
    assert load_role(world.checkpoints.folder(1), "generator").updates == 1


def test_a_run_whose_files_are_gone_is_not_told_to_go_on_from_nothing(world: World) -> None:
    assert "No state was saved" in world.states.last_good()
    shutil.rmtree(world.folder.root)
    assert f"The files in {world.folder.root} are gone" in world.states.last_good()


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EACCES])
def test_a_mount_that_fails_does_not_hide_what_ended_the_run(
    world: World, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(path: Path, **_: object) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, "stat", fail)
    with pytest.raises(OSError, match=os.strerror(number)):
        world.folder.config.exists()
    assert f"The files in {world.folder.root} are gone" in world.states.last_good()


def test_of_a_lost_working_copy_what_its_address_has_is_said_to_be_there(world: World) -> None:
    shutil.rmtree(world.folder.root)
    add_copy(world.folder.root, "s3://bucket/runs/run")
    try:
        words = world.states.last_good()
    finally:
        remove_copy(world.folder.root)
    assert words.startswith(f"The files in {world.folder.root} are gone")
    assert "s3://bucket/runs/run is still there; go on with --resume s3://bucket" in words


@pytest.mark.slow
def test_a_repair_keeps_the_save_of_processes_that_live(
    world: World, slow_disk: threading.Event
) -> None:
    position = world.iterate(0)
    world.states.save(position)
    slow_disk.set()
    world.states.keep_under_repair()
    assert world.checkpoints.steps() == [1]
    assert not world.states.is_owed(1)
    manifest = Path(world.checkpoints.folder(1), "manifest.json")
    written = manifest.stat().st_mtime_ns
    # The run went back behind it and comes by again: what is committed is left alone.
    world.states.save(position)
    assert world.checkpoints.steps() == [1]
    assert manifest.stat().st_mtime_ns == written


@pytest.mark.slow
def test_a_repair_says_that_the_save_of_a_lost_process_is_lost(
    world: World, slow_disk: threading.Event
) -> None:
    world.states.save(world.iterate(0))
    world.states.keep_under_repair(["fake_score"])
    slow_disk.set()
    (said,) = world.warnings.heard
    assert "iteration 1 is not saved (a process that was writing it is lost)" in said
    assert not world.states.is_owed(0)
    assert world.states.is_owed(1)
    world.states.settle()
    assert world.checkpoints.latest() is None
    world.states.save(world.iterate(1))
    assert not world.states.is_owed(2)
    world.states.settle()
    assert world.checkpoints.steps() == [2]


@pytest.mark.slow
def test_nothing_is_committed_from_a_process_that_did_not_copy_the_state(
    world: World, slow_disk: threading.Event
) -> None:
    world.states.save(world.iterate(0))
    new = tiny_roles()
    world.roles.fake_score._workers[:] = [new.fake_score]  # type: ignore[attr-defined]
    slow_disk.set()
    with pytest.raises(StaleCallError, match="has begun no save"):
        world.states.settle()
    assert world.checkpoints.latest() is None


@pytest.mark.slow
def test_a_broken_state_is_not_committed_and_the_one_before_is_named(world: World) -> None:
    world.states.save(world.iterate(0))
    world.states.settle()
    position = world.iterate(1)
    with torch.no_grad():
        next(world.tiny.networks["generator"].parameters()).fill_(float("nan"))
    world.states.save(position)
    with pytest.raises(NonFiniteError, match="is not finite"):
        world.states.settle()
    world.states.save(position)
    assert "step-000001" in world.states.last_good()
    assert "is not finite" in world.warnings.heard[-1]


@pytest.mark.slow
def test_the_folder_of_a_lost_save_is_not_cleared_under_those_that_still_write_it(
    world: World, slow_disk: threading.Event
) -> None:
    position = world.iterate(0)
    world.states.save(position)
    world.states.keep_under_repair(["fake_score"])
    writer = world.tiny.fake_score._writer._thread
    assert writer is not None
    assert writer.is_alive()
    threading.Timer(0.3, slow_disk.set).start()
    # The run went back to the very state that was being saved.
    world.states.save(position)
    assert not writer.is_alive()
    world.states.settle()
    assert world.checkpoints.steps() == [1]
    assert world.checkpoints.fault(1, contents=True) == ""


@pytest.mark.slow
def test_a_death_that_a_save_hears_of_leaves_the_save_to_the_repair(
    world: World, slow_disk: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.states.save(world.iterate(0))
    slow_disk.set()

    def die(*arguments: object, **options: object) -> None:
        raise WorkerDiedError("generator", 0, "saving", "it was ended by SIGKILL")

    with monkeypatch.context() as dying:
        dying.setattr(world.roles.generator, "fetch", die)
        with pytest.raises(WorkerDiedError):
            world.states.settle()
    # All of it was written before the death, and so it is whole.
    world.states.keep_under_repair(["generator"])
    assert not world.states.is_owed(1)
    assert world.checkpoints.steps() == [1]


@pytest.mark.slow
@pytest.mark.parametrize("missing", ["", "ema/role.json", "generator/role.json"])
def test_what_a_lost_process_has_written_whole_is_committed_once_the_others_have_theirs(
    world: World, slow_disk: threading.Event, missing: str
) -> None:
    """As where a machine is lost for good, and the run is planned again without it."""
    position = world.iterate(0)
    world.states.save(position)
    generator, fake_score = (
        world.tiny.generator._writer._thread,
        world.tiny.fake_score._writer._thread,
    )
    assert generator is not None
    assert fake_score is not None
    slow_disk.set()
    generator.join()
    folder = Path(world.checkpoints.folder(1))
    if missing:
        (folder / missing).unlink()
    # The former process is no longer there to be asked.
    world.roles.generator._workers[:] = [tiny_roles().generator]  # type: ignore[attr-defined]
    world.states.keep_under_repair(["generator"])
    if missing:
        assert world.checkpoints.latest() is None
        assert world.states.is_owed(1)
        return
    assert world.checkpoints.latest() == 1
    assert world.checkpoints.fault(1, contents=True) == ""
    assert not fake_score.is_alive()
    assert load_role(str(folder), "generator").updates == 1


@pytest.mark.slow
def test_the_state_of_another_iteration_is_not_taken_for_the_one_that_is_saved(
    world: World,
) -> None:
    world.states.save(world.iterate(0))
    world.states.settle()
    folder = world.checkpoints.folder(1)
    assert is_role_written(folder, "generator", 1)
    assert not is_role_written(folder, "generator", 2)
    assert not is_role_written(folder, "teacher", 1)


def publishers() -> dict[Path, Publisher]:
    from pipelines.run import publisher

    return publisher.PUBLISHERS


class Lost(Publisher):
    """That of a run that another process has taken over."""

    def require_lease(self) -> None:
        raise LeaseLostError("writing", "the lease is held by another process")


def test_nothing_is_deleted_or_written_over_in_a_run_that_another_process_has(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    position = world.iterate(0)
    others = [Path(world.checkpoints.folder(step), "part") for step in (1, 2)]
    others.append(world.folder.generator / "part")
    for part in others:
        part.parent.mkdir(parents=True)
        part.touch()
    monkeypatch.setitem(publishers(), world.folder.root, Lost())
    for work in (
        lambda: world.states.save(position),
        world.states.prune,
        lambda: world.exports.export(world.folder.generator),
    ):
        with pytest.raises(LeaseLostError):
            work()
    assert all(part.exists() for part in others)


class Patient(Publisher):
    """That of a run whose store may fail."""

    def __init__(self) -> None:
        self.borne: list[str] = []

    def tolerate(self, error: StorageError, work: str) -> None:
        self.borne.append(work)


def test_a_state_is_saved_though_old_ones_cannot_be_deleted(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    patient = Patient()
    monkeypatch.setitem(publishers(), world.folder.root, patient)

    def fail(*arguments: object) -> None:
        raise StorageError("deleting step-000000", "OSError: 503", "an answer")

    monkeypatch.setattr(world.checkpoints, "prune", fail)
    world.states.save(world.iterate(0))
    world.states.settle()
    assert world.checkpoints.latest() == 1
    assert patient.borne == ["pruning"]
    (said,) = world.warnings.heard
    assert said.startswith("old states are not deleted (OSError: 503)")
    assert not world.states.is_owed(1)
