"""The states of a run on disk: saved, pruned, loaded and exported.

roles -> checkpoints/step-000200/ -> manifest: whole from here on
roles, or a checkpoint of theirs -> generator/, best/: folders that diffusers loads
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.checkpoints import Checkpoints
from cluster.worker_group import Future
from pipelines.config.model_folders import model_address
from pipelines.config.recipe import DistillConfig
from pipelines.distillation.iteration import Roles
from pipelines.distillation.monitor import RunMonitor
from pipelines.distillation.position import Position
from pipelines.distillation.preflight import Preflight
from pipelines.run.folder import RunFolder, versions
from workers.fake_score_tracker import FakeScoreTracker
from workers.generator_learner import GeneratorLearner


class States:
    """Saves and loads the learning roles, and exports the generator.

    Args:
        config: The run's settings.
        checked: Result of the checks before the run.
        roles: Whose states they are.
        folder: The run.
        checkpoints: Its committed states.
        monitor: Ranks them.
    """

    def __init__(
        self,
        config: DistillConfig,
        checked: Preflight,
        roles: Roles,
        folder: RunFolder,
        checkpoints: Checkpoints,
        monitor: RunMonitor,
    ) -> None:
        self._config = config
        self._checked = checked
        self._roles = roles
        self._folder = folder
        self._checkpoints = checkpoints
        self._monitor = monitor

    def save(self, position: Position) -> None:
        """Commits the present state, and deletes what is neither new nor among the best.

        Raises:
            StorageError: The disk is full or cannot be written to; older states are kept.
        """
        folder, roles = self._checkpoints.folder(position.iteration), self._roles
        self._checkpoints.begin(position.iteration)
        generator = roles.generator.call(GeneratorLearner.save, folder)
        fake_score = roles.fake_score.call(FakeScoreTracker.save, folder)
        digests = [
            *self._fetch(roles.generator, generator, "saving the generator"),
            *self._fetch(roles.fake_score, fake_score, "saving the fake score"),
        ]
        self._folder.flush()
        self._checkpoints.commit(
            position.iteration,
            {
                "iteration": position.iteration,
                "rows": position.rows,
                "cursor": position.cursor.to_json(),
                "config_digest": self._config.digest,
                "seed": self._config.seed,
                "versions": versions(),
            },
            {name: digest for part in digests for name, digest in part.items()},
        )
        self.prune()

    def save_if_newer(self, position: Position) -> None:
        """Commits the present state where no state of this iteration or a later one is saved."""
        if position.iteration > (self._checkpoints.latest() or 0):
            self.save(position)

    def prune(self) -> None:
        """Deletes checkpoints that are neither new nor among the best."""
        self._checkpoints.prune(self._config.checkpoint.keep, self._monitor.spared)
        self._monitor.write_ranking()

    def load(self, iteration: int) -> None:
        """Puts both learning roles back to a committed state."""
        load_roles(self._roles, self._checkpoints.folder(iteration), self._config)

    def load_generator(self, iteration: int) -> None:
        """Puts the generator back to a committed state."""
        generator = self._roles.generator
        loaded = generator.call(GeneratorLearner.load, self._checkpoints.folder(iteration))
        self._fetch(generator, loaded, "loading the generator")

    def export(self, target: Path, checkpoint: str | None = None) -> None:
        """Writes the generator as a diffusers folder, as it is now or as a checkpoint has it."""
        generator = self._roles.generator
        exported = generator.call(
            GeneratorLearner.export,
            str(target),
            model_address(self._config.model.folder),
            self._config.inference_settings(),
            checkpoint,
            self._config.export,
        )
        self._fetch(generator, exported, "exporting the generator")

    def export_best(self) -> str:
        """Writes the best validated generator beside the last one; says which it is."""
        ranking = self._monitor.ranking
        if not ranking:
            return "Nothing was validated and kept."
        best = ranking[0]
        self.export(self._folder.best, self._checkpoints.folder(best.iteration))
        score = self._config.checkpoint.score
        told = f"iteration {best.iteration} ({score} {best.score:.4g}) is in {self._folder.best}"
        self._monitor.observer.note(f"the best generator: {told}")
        return f"The best generator, of {told}."

    def keep_last_good(self, position: Position, *, may_save: bool) -> str:
        """Says which state is the last good one; saves the present one before, where it is good.

        Args:
            position: Where the run stood before the iteration that failed.
            may_save: Whether the roles still stand there. Several ranks may wait for a failed one,
                so those are not asked.
        """
        one_rank = self._roles.generator.size == self._roles.fake_score.size == 1
        unsaved = ""
        try:
            if may_save and one_rank:
                self.save_if_newer(position)
        except Exception as error:
            # What ended the run is the error to raise; this one is added to its message.
            unsaved = f"Saving the state before iteration {position.iteration} failed: {error} "
        return unsaved + self.last_good()

    def last_good(self) -> str:
        """Says which state the run can be taken up at."""
        latest = self._checkpoints.latest()
        if latest is None:
            return (
                f"No state was saved; --resume {self._folder.root} starts at the beginning, with"
                " the same settings."
            )
        return (
            f"The last good state is {self._checkpoints.folder(latest)}; go on from it with"
            f" --resume {self._folder.root}."
        )

    def _fetch(self, group: Any, pending: Sequence[Future[Any]], phase: str) -> list[Any]:  # noqa: ANN401
        return group.fetch(pending, timeout_s=self._config.topology.call_timeout_s, phase=phase)


def load_roles(roles: Roles, folder: str, config: DistillConfig) -> None:
    """Puts both learning roles back to the state in a checkpoint.

    Args:
        roles: The groups.
        folder: The checkpoint.
        config: Settings of the run.
    """
    timeout_s = config.topology.call_timeout_s
    generator = roles.generator.call(GeneratorLearner.load, folder)
    fake_score = roles.fake_score.call(FakeScoreTracker.load, folder)
    roles.generator.fetch(generator, timeout_s, "loading the generator")
    roles.fake_score.fetch(fake_score, timeout_s, "loading the fake score")
