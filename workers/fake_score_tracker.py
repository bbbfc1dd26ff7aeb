"""The network that follows the score of what the generator makes.

    signal(query, teacher)   generator's loss, and its gradient at x0: through the network's *input*
    track(query)             own loss, and its gradient: through the network's *parameters*

                    signal                               track
    x0 (leaf) --> x_t --> [ network ] --> velocity --> generator loss,  tracking loss
              <-------------------------------------------+                |
                            parameters <-----------------------------------+

So it is for objectives whose gradient passes through this network's input. Where it goes to x0
directly (DMD), the prediction is a constant of the generator's loss; where it passes through the
teacher's input too (SiD), the signal carries the gradient at the teacher's velocity, and the
teacher completes it.

With shared tracking both gradients come from one forward pass, whose graph waits under the batch's
key between the two calls. With fresh tracking `signal` runs on frozen parameters, and `track` makes
a forward pass of its own on another batch. Either way no gradient of the generator's loss reaches a
parameter: autograd is asked for the gradient at x0 and for nothing else.

Two backward passes recompute checkpointed layers twice. With `walk: joint`, `signal` makes one for
both gradients, and `track` returns the terms of tracking's loss.

Where another role computes the loss, `signal` comes in two halves:

    predict(query)           velocity; its graph back to x0 waits under the batch's key
    complete(signal)         adds (d velocity / d x0)' fake_cotangent, the part through the input
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn

from sgmd_core.errors import StaleCallError, non_finite_remedy
from sgmd_core.objectives import (
    GradientPath,
    Objective,
    PhasingObjective,
)
from sgmd_core.objectives.shuffled import shuffled_teacher
from sgmd_core.types import (
    FakePrediction,
    GeneratorSignal,
    Latents,
    MicroBatchKey,
    NoisedBatch,
    TeacherPrediction,
    detached,
)
from workers.adapters import make_trainable
from workers.checked_losses import VELOCITY_FAKE, VELOCITY_TEACHER, checked_losses
from workers.extra_updates import ExtraUpdates
from workers.finite import FiniteChecks
from workers.kept_forwards import KeptForward, KeptForwards
from workers.optimizer import RoleOptimizer
from workers.placement import device_of, query_on
from workers.reports import GradientReport, TrackReport
from workers.restarts import Restarts
from workers.role_state import require_same_tensors
from workers.score_looks import with_looks
from workers.settings import FakeScoreSettings
from workers.sharding import is_sharded, local_shard, parameters_of
from workers.signals_that_track import SignalsThatTrack
from workers.snapshots import RoleSnapshot

ROLE = "fake_score"


class FakeScoreTracker(ExtraUpdates):
    """Tells the generator how to change its samples, and tracks them.

    Args:
        velocity_model: The network to train.
        objective: Both losses.
        settings: Tracking mode, mixing and optimizer.
        checks: Checks of the numbers that go in and come out; by default they raise.
    """

    _role = ROLE

    def __init__(
        self,
        velocity_model: nn.Module,
        objective: Objective,
        settings: FakeScoreSettings,
        checks: FiniteChecks | None = None,
    ) -> None:
        super().__init__()
        self._checks = checks or FiniteChecks()
        # In evaluation mode, as in the reference: both losses must see the same function.
        self._network = make_trainable(velocity_model)
        self._objective = objective
        self._shared = settings.tracking == "shared"
        self._shuffled = settings.gap == "shuffled"
        # A sharded network cannot be frozen for a while: FSDP fixes once which copies learn.
        self._keeps_parameters = self._shared or is_sharded(velocity_model)
        self._ida_decay = settings.ida_decay
        self._optimizer = RoleOptimizer(
            "fake score", velocity_model, settings.optimizer, objective.fake_updates
        )
        self._kept = KeptForwards()
        self._both = None
        if settings.walk == "joint":
            self._both = SignalsThatTrack(
                self._network, objective, self._checks, shuffled=self._shuffled
            )
        self._restarts = Restarts(self._optimizer, objective)

    @property
    def forwards_kept(self) -> int:
        """Forward passes whose graph waits for tracking."""
        return len(self._waiting)

    def signal(
        self, query: NoisedBatch, teacher: TeacherPrediction, share: float
    ) -> GeneratorSignal:
        """Gradient of the generator's loss at the samples; parameters accumulate nothing.

        Args:
            query: What the generator made, noised.
            teacher: The teacher's prediction at the same query.
            share: Samples in this micro-batch over samples in the iteration.

        Returns:
            The gradient, `share` included, and the loss terms of this micro-batch; for objectives
            whose path is `both_scores`, also what the teacher completes the gradient from.

        Raises:
            StaleCallError: The query is of another iteration, or the prediction of another query.
            NonFiniteError: A number that goes in or comes out is not finite.
        """
        self._optimizer.require_current(query.key.iteration, "scoring a micro-batch")
        self._restarts.before(query.key.iteration)
        _require_same_query(query, teacher)
        device = device_of(self._network)
        query = query_on(query, device)
        x0 = query.x0.detach().requires_grad_()
        leaf = detached(query, x0)
        velocity_teacher = teacher.velocity.to(device).detach()
        if self._both is not None:
            return self._both.signal(leaf, velocity_teacher, share)
        wanted = [x0]
        if self._objective.path is GradientPath.BOTH_SCORES:
            # The graph behind it is the teacher's, who is sent the gradient at this leaf.
            wanted.append(velocity_teacher.requires_grad_())
        with self._parameters_aside():
            velocity_fake = self._predict(leaf)
            if self._shuffled:
                velocity_teacher = shuffled_teacher(velocity_fake, velocity_teacher)
            loss = self._objective.generator_loss(leaf, velocity_fake, velocity_teacher)
            loss, off = with_looks(self._objective, self._predict, loss, leaf, query, teacher)
            # Asked for these alone, autograd makes no gradient for any parameter.
            wanted += [] if off is None else [off]
            gradients = torch.autograd.grad(share * loss.value, wanted, retain_graph=self._shared)
        grad_off = None if off is None else gradients[-1]
        gradients = gradients[: len(wanted) - (off is not None)]
        predictions = {VELOCITY_FAKE: velocity_fake, VELOCITY_TEACHER: velocity_teacher}
        grad_x0, metrics = checked_losses(
            self._checks, gradients[0], loss, gradients, query, predictions
        )
        if self._shared:
            self._kept.keep(KeptForward(detached(query), velocity_fake))
        return GeneratorSignal(
            key=query.key,
            grad_x0=grad_x0,
            generator_version=query.generator_version,
            metrics=metrics,
            teacher_cotangent=gradients[1] if len(gradients) > 1 else None,
            grad_off=grad_off,
        )

    def predict(self, query: NoisedBatch) -> FakePrediction:
        """Velocity at a query, for a role that computes the generator's loss from it.

        Args:
            query: What the generator made, noised.

        Returns:
            The velocity, without a graph; `complete` goes through the graph that is kept.

        Raises:
            StaleCallError: The query is of another iteration.
            NonFiniteError: A number that goes in or comes out is not finite.
        """
        self._optimizer.require_current(query.key.iteration, "predicting for a micro-batch")
        self._restarts.before(query.key.iteration)
        query = query_on(query, device_of(self._network))
        x0 = query.x0.detach().requires_grad_()
        leaf = detached(query, x0)
        with self._parameters_aside():
            velocity = self._network(leaf.x_t, leaf.sigma, leaf.text)
        self._kept.keep(KeptForward(detached(query), velocity, x0))
        checked = self._checks.checked(
            velocity.detach(),
            query.key,
            "predicting on the fake score",
            {**query.numbers, VELOCITY_FAKE: velocity},
            non_finite_remedy(query.generator_version, "fake_score.optimizer.lr"),
            stages_before=1,
        )
        return FakePrediction(query.key, checked)

    def complete(self, signal: GeneratorSignal) -> GeneratorSignal:
        """Completes a signal by what reaches `x0` through this network's input.

            grad_x0 + (d velocity / d x0)' fake_cotangent

        Args:
            signal: What another role has made of this role's prediction; the share of the batch is
                in its gradients.

        Returns:
            The signal that the generator learns from.

        Raises:
            StaleCallError: The signal is of no kept prediction, or has no part for the fake score.
            NonFiniteError: A number that goes in or comes out is not finite.
        """
        kept, x0, cotangent = self._kept.completed(signal)
        if not self._shared:
            del self._kept[signal.key]
        # Frozen as in `predict`: with checkpointing the forward pass is made again here.
        with self._parameters_aside():
            (grad,) = torch.autograd.grad(
                kept.velocity_fake, x0, cotangent, retain_graph=self._shared
            )
        handed = {
            "the discriminator's gradient at x0": signal.grad_x0,
            "its gradient at the fake score's velocity": cotangent,
        }
        grad = self._checks.checked(
            grad,
            signal.key,
            "carrying a signal through the fake score",
            {**handed, "the gradient through the fake score": grad},
            non_finite_remedy(signal.generator_version, "fake_score.optimizer.lr"),
            stages_before=3,
        )
        grad_x0 = signal.grad_x0.to(grad) + grad
        return replace(signal, grad_x0=grad_x0, fake_cotangent=None)

    def track(self, query: NoisedBatch, share: float) -> TrackReport:
        """Gathers the gradient of the tracking loss in the parameters.

        Args:
            query: With shared tracking a query that `signal` has seen: its kept forward pass is
                used and then freed. With fresh tracking any query of this iteration.
            share: Samples in this micro-batch over samples in the iteration.

        Returns:
            The loss terms of this micro-batch.

        Raises:
            StaleCallError: The query is of another iteration, or its forward pass is not kept.
            NonFiniteError: A number that goes in or comes out is not finite; no gradient was
                accumulated from it.
        """
        self._optimizer.require_current(query.key.iteration, "tracking a micro-batch")
        self._restarts.before(query.key.iteration)
        if self._both is not None:
            return self._both.report(query, share)
        forward = self._kept.take(query) if self._shared else self._forward(query)
        loss = self._objective.tracking_loss(forward.query, forward.velocity_fake)
        predictions = {VELOCITY_FAKE: forward.velocity_fake}
        value, metrics = checked_losses(
            self._checks, loss.value, loss, (), forward.query, predictions
        )
        # With shared tracking the graph leads on to x0, which must gather nothing: so the inputs
        # are named. Of a sharded network autograd sees gathered copies, which have no name here;
        # then x0, which is used no more, gathers what nobody reads.
        inputs = None if is_sharded(self._network) else self._optimizer.parameters
        (share * value).backward(inputs=inputs)
        return TrackReport(metrics=metrics)

    def gradient_report(self, iteration: int) -> GradientReport:
        """Norm of the accumulated gradient; updates nothing.

        Raises:
            StaleCallError: A forward pass still waits for tracking, or another iteration is under
                way.
        """
        if self._waiting:
            raise StaleCallError(
                f"closing iteration {iteration} on the fake score",
                f"signals that were not tracked: {self._waiting}",
                "one track call for every signal",
                "Send the missing calls, or call discard to give the iteration up",
            )
        return super().gradient_report(iteration)

    @torch.no_grad()
    def mix_weights(self, weights: Mapping[str, Tensor], skip: bool = False) -> None:
        """Mixes the generator's weights in, right after its update.

            weights <- ida_decay * weights + (1 - ida_decay) * generator's

        What the generator has just learned is part of what the fake score has to follow, and this
        gives it a start. The optimizer's moments stay as they are.

        Args:
            weights: The generator's; of a method that trains in phases, those of the expert that it
                has just trained. The others stay as they are.
            skip: The generator's update was skipped: it has learned nothing, and nothing is mixed.

        Raises:
            StaleCallError: A forward pass of the old weights still waits for tracking.
            CheckpointError: The weights are those of another network.

        Source: implicit distribution alignment, as released for DMD on Wan.
        """
        if skip:
            return
        own = parameters_of(self._network)
        if isinstance(self._objective, PhasingObjective):
            own = {name: value for name, value in own.items() if name in weights}
        require_same_tensors(weights, own, "mixing the generator's weights into the fake score")
        if self._kept:
            raise StaleCallError(
                "mixing the generator's weights into the fake score",
                f"forward passes that were not tracked: {list(self._kept)}",
                "no graph of the old weights",
                "Set fake_score.tracking=fresh",
            )
        for name, value in own.items():
            mixed_in = local_shard(weights[name].to(value.dtype), value)
            value.lerp_(mixed_in.to(value.device), 1 - self._ida_decay)

    def discard(self) -> None:
        """Gives the iteration up: drops graphs and gradients, and takes extra updates back."""
        self._kept.clear()
        if self._both is not None:
            self._both.clear()
        self.end_extra()
        super().discard()

    def load(self, folder: str) -> int:
        """Goes on where `save` left off, bit for bit; see `LearningRole.load`."""
        updates = super().load(folder)
        self._restarts.forget()
        return updates

    def restore(self, snapshot: RoleSnapshot) -> int:
        """Goes on where `snapshot` was taken, bit for bit; see `LearningRole.restore`."""
        updates = super().restore(snapshot)
        self._restarts.forget()
        return updates

    @property
    def _waiting(self) -> list[MicroBatchKey]:
        return [*self._kept, *(self._both.waiting if self._both is not None else ())]

    def _parameters_aside(self) -> AbstractContextManager[None]:
        """Parameters that no graph inside leads to, where nothing else needs one that does."""
        return nullcontext() if self._keeps_parameters else _frozen(self._optimizer.parameters)

    def _predict(self, leaf: NoisedBatch) -> Latents:
        """Velocity at a query whose `x0` is a leaf, with the graph that the objective needs."""
        if self._objective.path is not GradientPath.SAMPLE:
            return self._network(leaf.x_t, leaf.sigma, leaf.text)
        # A constant of the generator's loss; only shared tracking has a use for a graph.
        constant = detached(leaf)
        with torch.set_grad_enabled(self._shared):
            return self._network(constant.x_t, constant.sigma, constant.text)

    def _forward(self, query: NoisedBatch) -> KeptForward:
        constant = detached(query_on(query, device_of(self._network)))
        velocity_fake = self._network(constant.x_t, constant.sigma, constant.text)
        return KeptForward(constant, velocity_fake)


def _require_same_query(query: NoisedBatch, teacher: TeacherPrediction) -> None:
    if teacher.key != query.key:
        raise StaleCallError(
            f"scoring {query.key}",
            f"a teacher's prediction for {teacher.key}",
            "a prediction at the same query",
        )


@contextmanager
def _frozen(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """No parameter takes part in graphs recorded inside, which saves the memory for it."""
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
