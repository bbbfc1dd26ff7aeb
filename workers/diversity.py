"""The generator's part in a diversity loss, which ties its first step to the teacher's own path.

    start(key, text)            noise that a micro-batch starts from, and the teacher's noise levels
    diversify(start, target)    loss of the first step against where the teacher got; backward

Its gradient adds to that of the signals, and one update serves both.
"""

from abc import abstractmethod

from sgmd_core.errors import StaleCallError
from sgmd_core.objectives.diversity import diversity_loss
from sgmd_core.phases import Phase
from sgmd_core.types import DiversityStart, DiversityTarget, Draws, MicroBatchKey, TextBatch
from workers.inner_flow import FlowLearner
from workers.placement import device_of
from workers.reports import DiversityReport
from workers.settings import DiversitySettings


class DiversityLearner(FlowLearner):
    """Part of a generator that learns a diversity loss, where the settings ask for it."""

    _diversity: DiversitySettings

    @abstractmethod
    def _place_or_draw(self, key: MicroBatchKey, text: TextBatch, draws: Draws | None) -> Draws:
        """Every random number of a micro-batch, on the device."""

    @abstractmethod
    def phase(self, iteration: int) -> Phase | None:
        """The phase of an iteration, where there are phases."""

    def start(
        self, key: MicroBatchKey, text: TextBatch, draws: Draws | None = None
    ) -> DiversityStart:
        """Initial noise of a micro-batch: the starting point of the teacher's own trajectory.

        Args:
            key: The micro-batch, as its rollout was named.
            text: Its captions.
            draws: Every random number, as they were given to the rollout.
        """
        draws = self._place_or_draw(key, text, draws)
        grid = self._schedule.few_step_grid(self._diversity.teacher_steps)
        phase = self.phase(key.iteration)
        # A low phase leaves the first step as it is: no steps of the teacher are asked for.
        steps = 0 if phase is not None and phase.first_exit else self._diversity.anchor_step
        return DiversityStart(key, draws.initial_noise, text.text, grid[: steps + 1])

    def diversify(
        self, start: DiversityStart, target: DiversityTarget, share: float
    ) -> DiversityReport:
        """Adds the gradient of the diversity loss to that of the signals.

        Args:
            start: Where the samples of a micro-batch start.
            target: Where the teacher goes from there.
            share: Samples in this micro-batch over samples in the iteration.

        Raises:
            StaleCallError: The two belong to different micro-batches, or to another iteration.
            NonFiniteError: A number that goes in or comes out is not finite; no gradient was
                accumulated from it.
        """
        self._optimizer.require_current(start.key.iteration, "learning diversity")
        if target.key != start.key:
            raise StaleCallError(
                f"learning the first step of {start.key}",
                f"a teacher's path for {target.key}",
                "the path that starts from the same noise",
            )
        if not start.num_steps:
            return DiversityReport(metrics={})
        device = device_of(self._network)
        noise = start.noise.to(device)
        sigma = self._schedule.generator_grid(self._num_steps)[0].to(noise).expand(len(noise))
        velocity = self._network(noise, sigma, start.text.to(device))
        loss = diversity_loss(velocity, target.velocity.to(device))
        handed = {**start.numbers, "the teacher's path": target.velocity}
        made = {"the generator's velocity": velocity, "the diversity loss": loss}
        loss = self._checked(loss, "learning diversity", start.key, {**handed, **made}, 4)
        (share * self._diversity.weight * loss).backward()
        return DiversityReport(metrics={"diversity": loss.item()})
