"""The network that learns to sample in a few steps.

    rollout(key, text)       x0 and its score query; the graph behind x0 stays here, under the key
    learn(signal)            x0.backward(grad_x0): parameters accumulate, the graph is freed
    start, diversify         an extra loss on the first step, see `workers.diversity`
    noise_data, learn_consistency    a term on latents of the data, see `workers.consistency`
    learn_flow               another one, see `workers.inner_flow`
    gradient_report, step    one update of weights and averaged weights an iteration

The loss on its samples depends on its weights through x0 alone, so `grad_x0` is all that it needs
to receive.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sgmd_core.buckets import LatentBuckets
from sgmd_core.errors import StaleCallError
from sgmd_core.phases import Phase
from sgmd_core.rollout import RolloutExit, anchored, extrapolated, rollout_exit
from sgmd_core.schedule import FlowMatchSchedule
from sgmd_core.seeds import RolloutRule, draw
from sgmd_core.types import (
    Draws,
    GeneratorSignal,
    Latents,
    Look,
    MicroBatchKey,
    NoisedBatch,
    Purpose,
    TextBatch,
)
from workers.adapters import lora_of, make_trainable
from workers.diversity import DiversityLearner
from workers.ema import AveragedWeights
from workers.exported_generator import write_generator
from workers.finite import FiniteChecks
from workers.generator_task import GeneratorTask
from workers.models.exporting import DTYPES, kept_in_fp32, narrowed_one
from workers.optimizer import RoleOptimizer
from workers.placement import device_of, draws_on, text_on
from workers.reports import GradientReport, LearnReport
from workers.role_state import RoleState, load_role
from workers.settings import ExportSettings, GeneratorSettings
from workers.sharding import gather_to_rank0, is_first_rank, local_part
from workers.snapshots import RoleSnapshot, copies

ROLE = "generator"
AVERAGE = "ema"


class GeneratorLearner(DiversityLearner):
    """Rolls out, learns from signals, updates.

    Args:
        velocity_model: The network to train.
        schedule: Noise levels of rollout and score queries.
        settings: Steps, averaging, diversity and optimizer.
        latent_shape: Shape (C, T, H, W) of one sample's latents, or shapes that iterations draw.
        seed: The run's seed; with a key it fixes every draw.
        checks: Checks of the numbers that go in and come out; by default they raise.
        task: Parts of the method that it computes beside the rollout.
    """

    _role = ROLE

    def __init__(
        self,
        velocity_model: nn.Module,
        schedule: FlowMatchSchedule,
        settings: GeneratorSettings,
        latent_shape: tuple[int, int, int, int] | LatentBuckets,
        seed: int,
        checks: FiniteChecks | None = None,
        task: GeneratorTask | None = None,
    ) -> None:
        task = task or GeneratorTask()
        super().__init__(task.consistency, task.flow)
        self._checks = checks or FiniteChecks()
        # In evaluation mode, because a replayed rollout must repeat itself.
        self._network = make_trainable(velocity_model)
        self._schedule = schedule
        self._num_steps = settings.num_steps
        self._random_steps = settings.random_steps
        self._task = task
        self._diversity = settings.diversity
        self._precision = DTYPES[settings.compute.precision]
        self._buckets = (
            latent_shape
            if isinstance(latent_shape, LatentBuckets)
            else LatentBuckets((latent_shape,), (1.0,))
        )
        self._seed = seed
        self._optimizer = RoleOptimizer(ROLE, velocity_model, settings.optimizer)
        self._average = (
            AveragedWeights(
                velocity_model,
                settings.ema_decay,
                settings.ema_start,
                offload=settings.ema_device == "cpu",
            )
            if settings.ema_decay > 0
            else None
        )
        self._kept: dict[MicroBatchKey, _KeptRollout] = {}

    @property
    def rollouts_kept(self) -> int:
        """Rollouts whose graph waits for a signal."""
        return len(self._kept)

    def phase(self, iteration: int) -> Phase | None:
        """The phase of an iteration, where there are phases."""
        return None if self._task.phases is None else self._task.phases.at(iteration)

    def rollout(
        self, key: MicroBatchKey, text: TextBatch, draws: Draws | None = None
    ) -> NoisedBatch:
        """Makes samples and a score query at each; keeps the graph of the exit step.

        Args:
            key: Names the micro-batch; a signal must have the same key.
            text: Captions of the samples.
            draws: Every random number, to replay a recorded iteration; drawn by key if not given.

        Returns:
            The query, without a graph.

        Raises:
            StaleCallError: The key belongs to another iteration.
            NonFiniteError: A number that goes in or comes out is not finite.
        """
        self._optimizer.require_current(key.iteration, "rolling out a micro-batch")
        draws = self._place_or_draw(key, text, draws)
        left = self._run(text, draws, keep_graph=True)
        off = None if draws.off is None else self._off_trajectory(left, text, draws.off)
        query = self._anchored(self._query(key, left.x0.detach(), text, draws), left)
        if draws.off is not None and off is not None:
            query = replace(query, off=replace(draws.off, x0=off.detach(), start=None))
        self._kept[key] = _KeptRollout(x0=left.x0, exit_step=draws.exit_step, off=off)
        return replace(query, guide=draws.guide)

    def sample(
        self, key: MicroBatchKey, text: TextBatch, draws: Draws | None = None
    ) -> NoisedBatch:
        """The same as `rollout`, for a batch that only the fake score learns from: no graph."""
        draws = self._place_or_draw(key, text, draws)
        left = self._run(text, draws, keep_graph=False)
        return self._anchored(self._query(key, left.x0, text, draws), left)

    def learn(self, signal: GeneratorSignal, weight: float = 1.0) -> LearnReport:
        """Carries a signal from `x0` to the parameters, whose gradients add up over micro-batches.

        Args:
            signal: What the fake score answered to a rollout that is kept.
            weight: 0 adds nothing: this rank has no sample of its own, and takes part in the
                collectives of those that have.

        Raises:
            StaleCallError: The signal's rollout is not kept here, or was made by other weights.
            NonFiniteError: The signal is not finite; no gradient was accumulated from it.
        """
        assert signal.teacher_cotangent is None, "the teacher has not added its part yet"
        assert signal.fake_cotangent is None, "the fake score has not added its part yet"
        if signal.key not in self._kept or signal.generator_version != self._optimizer.updates:
            raise StaleCallError(
                f"learning from the signal of {signal.key}",
                f"it is of generator version {signal.generator_version}; the generator is at "
                f"version {self._optimizer.updates} and keeps {list(self._kept) or 'no rollouts'}",
                "the one signal of a rollout that is kept, made by the present weights",
                "Roll the micro-batch out again",
            )
        handed = {"the signal's gradient": signal.grad_x0}
        if signal.grad_off is not None:
            handed["the signal's gradient off the path"] = signal.grad_off
        grad_x0 = self._checked(signal.grad_x0, "learning from a signal", signal.key, handed)
        kept = self._kept.pop(signal.key)
        made, gradients = [kept.x0], [grad_x0.to(kept.x0)]
        if kept.off is not None and signal.grad_off is not None:
            made.append(kept.off)
            gradients.append(signal.grad_off.to(kept.off))
        if weight != 1:
            gradients = [weight * gradient for gradient in gradients]
        torch.autograd.backward(made, gradients)
        return LearnReport(metrics=dict(signal.metrics), exit_step=kept.exit_step)

    def gradient_report(self, iteration: int) -> GradientReport:
        """Norm of the accumulated gradient; updates nothing.

        Raises:
            StaleCallError: A rollout still waits for its signal, or another iteration is under way.
        """
        if self._kept:
            raise StaleCallError(
                f"closing iteration {iteration} on the generator",
                f"rollouts without a signal: {list(self._kept)}",
                "a signal for every rollout",
                "Send the missing signals, or call discard to give the iteration up",
            )
        return super().gradient_report(iteration)

    def step(self, iteration: int, skip: bool = False, rate: float = 1.0) -> int:
        """Updates the weights, then their average.

        Args:
            iteration: The iteration.
            skip: Forget the gradients, keep weights and average, and count the update as skipped.
            rate: Multiple of the learning rate.

        Returns:
            The new version: updates made, this one included.

        Raises:
            StaleCallError: There is no gradient report of this iteration.
            NonFiniteError: The gradient is not finite; nothing was updated.
        """
        version = self._optimizer.step(iteration, skip, rate)
        if self._average is not None and not skip:
            self._average.update(version - 1)
        return version

    def discard(self) -> None:
        """Gives the iteration up: drops graphs and gradients, keeps the weights."""
        self._kept.clear()
        super().discard()

    def trained_weights(self) -> dict[str, Tensor]:
        """A copy of the weights as they are, for the fake score to be mixed with.

        Where there are phases, only those that the last update trained: the other expert is that of
        another phase, and the fake score has nothing to learn from it.

        Every rank must be asked; the weights are the first one's, those of the others are empty.
        """
        optimizer = self._optimizer
        weights = optimizer.weights if self._task.phases is None else optimizer.moved_weights
        return gather_to_rank0(weights.items())

    def final_weights(self) -> dict[str, Tensor]:
        """A copy of the trained weights to validate and export: the average, where one is kept.

        Every rank must be asked; the weights are the first one's, those of the others are empty.
        """
        return gather_to_rank0(self._final())

    def validated_weights(self) -> dict[str, Tensor]:
        """`final_weights` as a validator has its own: in the type of `compute.precision`.

        bf16 rounds them as an export does, which halves what is gathered and handed over. Adapters
        stay as they are trained.
        """
        if lora_of(self._network) is not None:
            return self.final_weights()
        kept = kept_in_fp32(self._network)
        return gather_to_rank0(
            (name, narrowed_one(name, value, self._precision, kept))
            for name, value in self._final()
        )

    def _final(self) -> Iterable[tuple[str, Tensor]]:
        return self._optimizer.weights.items() if self._average is None else self._average.shards()

    def export(
        self,
        dst: str,
        base_folder: str,
        settings: Mapping[str, Any],
        checkpoint: str | None = None,
        form: ExportSettings | None = None,
    ) -> None:
        """Writes a generator as a model folder, the other parts taken from a base.

        Every rank must be asked; the first one writes.

        Args:
            dst: New folder: a path or an address.
            base_folder: Model folder that the generator started from.
            settings: How the folder is sampled, for its `sgmd.json`; `flow_shift` is among them.
            checkpoint: Folder that `save` has written, to export what `final_weights` were then;
                None exports those of now.
            form: Type of the weights, and whether the other parts are linked or copied; None: as
                by default.

        Raises:
            ModelFolderError: The base folder is of no known family, or not complete.
            CheckpointError: A file of the checkpoint is missing or torn.
        """
        # Gathering takes all ranks, reading only the one that writes.
        weights = self.final_weights() if checkpoint is None else {}
        if not is_first_rank():
            return
        if checkpoint is not None:
            kept = ROLE if self._average is None else AVERAGE
            weights = dict(load_role(checkpoint, kept).weights)
        form = form or ExportSettings()
        write_generator(self._network, weights, dst, base_folder, settings, form)

    def states(self, over: Mapping[str, RoleState]) -> dict[str, RoleState]:
        """Copies of this rank's part of `generator` and, where an average is kept, of `ema`."""
        own = super().states(over)
        if self._average is None:
            return own
        former = over[AVERAGE].weights if AVERAGE in over else {}
        average = copies(self._average.average.items(), former)
        return {**own, AVERAGE: replace(own[ROLE], weights=average, moments={})}

    def load(self, folder: str) -> int:
        """Goes on where `save` left off, bit for bit; see `LearningRole.load`."""
        # Both are read before either is changed.
        rows = self._optimizer.rows
        state = load_role(folder, ROLE, rows)
        average = None if self._average is None else load_role(folder, AVERAGE, rows)
        self.discard()
        self._optimizer.load_state(state)
        if self._average is not None and average is not None:
            self._average.restore(average.weights)
        return state.updates

    def snapshot(self) -> RoleSnapshot:
        """A copy of this rank's part of the state, in main memory; changes nothing."""
        snapshot = super().snapshot()
        if self._average is None:
            return snapshot
        return replace(snapshot, average=copies(self._average.average.items()))

    def snapshot_bytes(self) -> int:
        """Size of the snapshot that would be taken now."""
        average = {} if self._average is None else self._average.average
        kept = sum(local_part(value).nbytes for value in average.values())
        return super().snapshot_bytes() + kept

    def restore(self, snapshot: RoleSnapshot) -> int:
        """Goes on where `snapshot` was taken, bit for bit; see `LearningRole.restore`."""
        updates = super().restore(snapshot)
        if self._average is not None:
            self._average.restore(snapshot.average)
        return updates

    def _place_or_draw(self, key: MicroBatchKey, text: TextBatch, draws: Draws | None) -> Draws:
        if draws is None:
            rule = RolloutRule(
                self._first_exit(key.purpose), self._random_steps, self.phase(key.iteration)
            )
            draws = draw(
                self._seed,
                key,
                text.sample_indices,
                self._latent_shape(key),
                self._schedule,
                self._num_steps,
                rule,
                self._task.looks if key.purpose is Purpose.GENERATE else None,
            )
        return draws_on(draws, device_of(self._network))

    def _first_exit(self, purpose: Purpose) -> int:
        tracked = self._task.first_tracked
        if purpose is Purpose.GENERATE or tracked is None:
            return self._diversity.first_exit
        return tracked

    def _off_trajectory(self, left: RolloutExit, text: TextBatch, look: Look) -> Latents:
        """Samples from a state beside the rollout, with their graph."""
        assert look.start is not None, "nobody has said where to leave the trajectory to"
        x_t = extrapolated(left.x_t, left.velocity, left.sigma, look.start)
        velocity = self._network(x_t, look.start, text_on(text, x_t.device).text)
        return self._schedule.x0_from_velocity(x_t, velocity, look.start)

    def _run(self, text: TextBatch, draws: Draws, *, keep_graph: bool) -> RolloutExit:
        return rollout_exit(
            self._network,
            self._schedule.generator_grid(self._num_steps) if draws.grid is None else draws.grid,
            draws.initial_noise,
            text_on(text, draws.initial_noise.device).text,
            draws.exit_step,
            keep_graph=keep_graph,
            renoise=self._schedule.renoise,
        )

    def _query(self, key: MicroBatchKey, x0: Latents, text: TextBatch, draws: Draws) -> NoisedBatch:
        query = NoisedBatch(
            key=key,
            x0=x0,
            sigma=draws.sigma,
            noise=draws.noise,
            text=text.text,
            generator_version=self._optimizer.updates,
            sample_indices=text.sample_indices,
        )
        numbers = {"the initial noise": draws.initial_noise, **query.numbers}
        return replace(query, x0=self._checked(x0, "rolling out", key, numbers, 0))

    def _anchored(self, query: NoisedBatch, left: RolloutExit) -> NoisedBatch:
        """The query from the last state of a phase, where that is not a clean one."""
        phase = self.phase(query.key.iteration)
        if phase is None or not phase.anchored:
            return query
        return anchored(query, left, self._schedule.generator_grid(self._num_steps)[phase.end])


@dataclass(frozen=True, slots=True)
class _KeptRollout:
    """Samples with the graph that leads back to the generator's parameters."""

    x0: Latents
    exit_step: int
    off: Latents | None = None
