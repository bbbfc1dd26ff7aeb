"""The generator of a run as folders that diffusers loads: the last one, and the best."""

from dataclasses import dataclass
from pathlib import Path

from cluster.checkpoints import Checkpoints
from cluster.worker_group import WorkerGroup
from pipelines.config.model_folders import model_address
from pipelines.config.recipe import DistillConfig
from pipelines.distillation.monitor import RunMonitor
from pipelines.run.folder import RunFolder
from pipelines.run.places import shared_place
from workers.generator_learner import GeneratorLearner


@dataclass(frozen=True)
class Exports:
    """Writes `generator/` and `best/`.

    Attributes:
        config: The run's settings.
        generator: The role's group.
        folder: The run.
        checkpoints: Its committed states.
        monitor: Ranks them.
    """

    config: DistillConfig
    generator: WorkerGroup[GeneratorLearner]
    folder: RunFolder
    checkpoints: Checkpoints
    monitor: RunMonitor

    def export(self, folder: Path, checkpoint: str | None = None) -> None:
        """Writes the generator as a diffusers folder, as it is now or as a checkpoint has it."""
        self.folder.publisher.require_lease()
        exported = self.generator.call(
            GeneratorLearner.export,
            shared_place(folder),
            model_address(self.config.model.folder),
            self.config.inference_settings(),
            checkpoint,
            self.config.export,
        )
        limit_s = self.config.topology.call_timeout_s
        self.generator.fetch(exported, limit_s, "exporting the generator")

    def export_best(self) -> str:
        """Writes the best validated generator beside the last one; says which it is."""
        ranking = self.monitor.ranking
        if not ranking:
            return "Nothing was validated and kept."
        best = ranking[0]
        self.export(self.folder.best, self.checkpoints.folder(best.iteration))
        score = self.config.checkpoint.score
        place = shared_place(self.folder.best)
        words = f"iteration {best.iteration} ({score} {best.score:.4g}) is in {place}"
        self.monitor.observer.note(f"the best generator: {words}")
        return f"The best generator, of {words}."
