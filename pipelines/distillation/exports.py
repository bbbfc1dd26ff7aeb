"""The generator of a run as folders that diffusers loads: the last one, and the best."""

from pathlib import Path

from cluster.checkpoints import Checkpoints
from cluster.worker_group import WorkerGroup
from pipelines.config.model_folders import model_address
from pipelines.config.recipe import DistillConfig
from pipelines.distillation.monitor import RunMonitor
from pipelines.run.folder import RunFolder
from pipelines.run.places import shared_place
from workers.generator_learner import GeneratorLearner


class Exports:
    """Writes `generator/` and `best/`.

    Args:
        config: The run's settings.
        generator: The role's group.
        folder: The run.
        checkpoints: Its committed states.
        monitor: Ranks them.
    """

    def __init__(
        self,
        config: DistillConfig,
        generator: WorkerGroup[GeneratorLearner],
        folder: RunFolder,
        checkpoints: Checkpoints,
        monitor: RunMonitor,
    ) -> None:
        self._config = config
        self._generator = generator
        self._folder = folder
        self._checkpoints = checkpoints
        self._monitor = monitor

    def export(self, folder: Path, checkpoint: str | None = None) -> None:
        """Writes the generator as a diffusers folder, as it is now or as a checkpoint has it."""
        self._folder.publisher.require_lease()
        exported = self._generator.call(
            GeneratorLearner.export,
            shared_place(folder),
            model_address(self._config.model.folder),
            self._config.inference_settings(),
            checkpoint,
            self._config.export,
        )
        limit_s = self._config.topology.call_timeout_s
        self._generator.fetch(exported, limit_s, "exporting the generator")

    def export_best(self) -> str:
        """Writes the best validated generator beside the last one; says which it is."""
        ranking = self._monitor.ranking
        if not ranking:
            return "Nothing was validated and kept."
        best = ranking[0]
        self.export(self._folder.best, self._checkpoints.folder(best.iteration))
        score = self._config.checkpoint.score
        place = shared_place(self._folder.best)
        told = f"iteration {best.iteration} ({score} {best.score:.4g}) is in {place}"
        self._monitor.observer.note(f"the best generator: {told}")
        return f"The best generator, of {told}."
