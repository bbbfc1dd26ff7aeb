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

Two walks back make the layers again twice where they are checkpointed. With `walk: joint`, `signal`
makes one for both gradients, and `track` hands out what it has found of tracking's loss.

Where another role computes the loss, `signal` comes in two halves:

    predict(query)           velocity; its graph back to x0 waits under the batch's key
    complete(signal)         adds (d velocity / d x0)' fake_cotangent, the part through the input
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sgmd_core.errors import ConfigError, StaleCallError, non_finite_remedy
from sgmd_core.objectives import (
    GradientPath,
    LookingObjective,
    Objective,
    PhasingObjective,
    restarts_of,
)
from sgmd_core.objectives.shuffled import shuffled_teacher
from sgmd_core.types import (
    FakePrediction,
    GeneratorSignal,
    GuideAnswer,
    Latents,
    Loss,
    MicroBatchKey,
    NoisedBatch,
    TeacherPrediction,
    detached,
)
from workers.adapters import make_trainable
from workers.extra_updates import ExtraUpdates
from workers.finite import Diagnosis, FiniteChecks, micro_batch_in_words
from workers.joint_walk import JointWalk
from workers.optimizer import RoleOptimizer
from workers.placement import device_of, query_on
from workers.reports import GradientReport, TrackReport
from workers.role_state import RoleState, load_role, require_same_tensors
from workers.settings import FakeScoreSettings
from workers.sharding import is_sharded, local_shard, parameters_of
from workers.snapshots import RoleSnapshot

ROLE = "fake_score"
_VELOCITY_FAKE, _VELOCITY_TEACHER = "the fake score's velocity", "the teacher's velocity"


class FakeScoreTracker(ExtraUpdates):
    """Tells the generator how to change its samples, and tracks them.

    Args:
        velocity_model: The network to train.
        objective: Both losses.
        settings: Tracking mode, mixing and optimizer.
        checks: Checks of the numbers that go in and come out; by default they raise.
    """

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
        self._kept: dict[MicroBatchKey, _KeptForward] = {}
        self._joint = settings.walk == "joint"
        self._walked: dict[MicroBatchKey, _Walked] = {}
        if self._joint:
            _require_joint(objective)
        self._restarts = restarts_of(objective)
        # Taken before anything is loaded: the weights that the role was built with.
        self._start = self._optimizer.snapshot() if self._restarts else None
        self._restarted: int | None = None

    @property
    def forwards_kept(self) -> int:
        """Forward passes whose graph waits for tracking."""
        return len(self._waiting)

    def signal(
        self, query: NoisedBatch, teacher: TeacherPrediction, share: float
    ) -> GeneratorSignal:
        """Gradient of the generator's loss at the samples; parameters gather nothing.

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
        self._restart(query.key.iteration)
        if teacher.key != query.key:
            raise StaleCallError(
                f"scoring {query.key}",
                f"a teacher's prediction for {teacher.key}",
                "a prediction at the same query",
            )
        device = device_of(self._network)
        query = query_on(query, device)
        x0 = query.x0.detach().requires_grad_()
        leaf = detached(query, x0)
        velocity_teacher = teacher.velocity.to(device).detach()
        if self._joint:
            return self._signal_and_track(leaf, velocity_teacher, share)
        wanted = [x0]
        if self._objective.path is GradientPath.BOTH_SCORES:
            # The graph behind it is the teacher's, who is sent the gradient at this leaf.
            wanted.append(velocity_teacher.requires_grad_())
        with self._parameters_aside():
            velocity_fake = self._predict(leaf)
            if self._shuffled:
                velocity_teacher = shuffled_teacher(velocity_fake, velocity_teacher)
            loss = self._objective.generator_loss(leaf, velocity_fake, velocity_teacher)
            loss, off = self._with_looks(loss, leaf, query, teacher)
            # Asked for these alone, autograd makes no gradient for any parameter.
            wanted += [] if off is None else [off]
            gradients = torch.autograd.grad(share * loss.value, wanted, retain_graph=self._shared)
        grad_off = None if off is None else gradients[-1]
        gradients = gradients[: len(wanted) - (off is not None)]
        predictions = {_VELOCITY_FAKE: velocity_fake, _VELOCITY_TEACHER: velocity_teacher}
        grad_x0, metrics = self._checked(gradients[0], loss, gradients, query, predictions)
        if self._shared:
            self._kept[query.key] = _KeptForward(detached(query), velocity_fake)
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
        self._restart(query.key.iteration)
        query = query_on(query, device_of(self._network))
        x0 = query.x0.detach().requires_grad_()
        leaf = detached(query, x0)
        with self._parameters_aside():
            velocity = self._network(leaf.x_t, leaf.sigma, leaf.text)
        self._kept[query.key] = _KeptForward(detached(query), velocity, x0)
        checked = self._checks.checked(
            velocity.detach(),
            query.key,
            f"predicting on the fake score in {micro_batch_in_words(query.key)}",
            {**query.numbers, _VELOCITY_FAKE: velocity},
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
        kept = self._kept.get(signal.key)
        if kept is None or kept.x0 is None or signal.fake_cotangent is None:
            raise StaleCallError(
                f"carrying a signal of {signal.key} through the fake score",
                f"it keeps {list(self._kept) or 'no forward passes'}"
                + (", and the signal has no cotangent" if signal.fake_cotangent is None else ""),
                "the one signal of a prediction that is kept, with this part still to be done",
                "Call predict first, and complete once",
            )
        if not self._shared:
            del self._kept[signal.key]
        cotangent = signal.fake_cotangent.to(kept.velocity_fake)
        # Frozen as in `predict`: with checkpointing the forward pass is made again here.
        with self._parameters_aside():
            (grad,) = torch.autograd.grad(
                kept.velocity_fake, kept.x0, cotangent, retain_graph=self._shared
            )
        handed = {
            "the discriminator's gradient at x0": signal.grad_x0,
            "its gradient at the fake score's velocity": signal.fake_cotangent,
        }
        grad = self._checks.checked(
            grad,
            signal.key,
            f"carrying a signal through the fake score in {micro_batch_in_words(signal.key)}",
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
                gathered from it.
        """
        self._optimizer.require_current(query.key.iteration, "tracking a micro-batch")
        self._restart(query.key.iteration)
        if self._joint:
            return self._take_walked(query, share)
        forward = self._take_kept(query) if self._shared else self._forward(query)
        loss = self._objective.tracking_loss(forward.query, forward.velocity_fake)
        predictions = {_VELOCITY_FAKE: forward.velocity_fake}
        value, metrics = self._checked(loss.value, loss, (), forward.query, predictions)
        # With shared tracking the graph leads on to x0, which must gather nothing: so the inputs
        # are named. Of a sharded network autograd sees gathered copies, which have no name here;
        # then x0, which is used no more, gathers what nobody reads.
        inputs = None if is_sharded(self._network) else self._optimizer.parameters
        (share * value).backward(inputs=inputs)
        return TrackReport(metrics=metrics)

    def gradient_report(self, iteration: int) -> GradientReport:
        """Norm of the gathered gradient; updates nothing.

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
        return self._optimizer.gradient_report(iteration)

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
        self._walked.clear()
        self.end_extra()
        self._optimizer.discard()

    def diagnose(self, iteration: int) -> Diagnosis:
        """First fault of an iteration, and a weight that is not finite; of this rank."""
        return self._checks.diagnose(iteration, self._network)

    def states(self, over: Mapping[str, RoleState]) -> dict[str, RoleState]:
        """Copies of this rank's part of `fake_score`."""
        return {ROLE: self._optimizer.state(over.get(ROLE))}

    def load(self, folder: str) -> int:
        """Goes on where `save` left off, bit for bit.

        Returns:
            Updates made so far.

        Raises:
            CheckpointError: A file is missing or torn, or belongs to another network.
        """
        state = load_role(folder, ROLE, self._optimizer.rows)
        self.discard()
        self._restarted = None
        self._optimizer.load_state(state)
        return state.updates

    def restore(self, snapshot: RoleSnapshot) -> int:
        """Goes on where `snapshot` was taken, bit for bit; gives the iteration under way up.

        Returns:
            Updates made so far.

        Raises:
            CheckpointError: It belongs to another network.
        """
        self.discard()
        self._restarted = None
        self._optimizer.restore(snapshot)
        return snapshot.updates

    @property
    def _waiting(self) -> list[MicroBatchKey]:
        return [*self._kept, *self._walked]

    def _signal_and_track(
        self, leaf: NoisedBatch, velocity_teacher: Latents, share: float
    ) -> GeneratorSignal:
        """Both gradients by one walk back: that at the samples, and that in the parameters.

        A gradient at the samples that is not finite, of losses that are, shows when the parameters
        have gathered theirs: where this role raises, the micro-batch then waits for tracking that
        is refused, and the iteration can only be given up.

        Args:
            leaf: The query, its samples a leaf.
            velocity_teacher: The teacher's velocity at it.
            share: As `signal` has it.
        """
        if leaf.key in self._walked:
            raise StaleCallError(
                f"scoring {leaf.key}",
                "the gradient of its tracking has been gathered already",
                "one signal of a micro-batch",
                "Call track, or discard to give the iteration up",
            )
        query = detached(leaf)
        walk = JointWalk(self._network, leaf)
        velocity_fake = walk.velocity
        if self._shuffled:
            velocity_teacher = shuffled_teacher(velocity_fake, velocity_teacher)
        loss = self._objective.generator_loss(leaf, velocity_fake, velocity_teacher)
        tracking = self._objective.tracking_loss(query, velocity_fake)
        predictions = {_VELOCITY_FAKE: velocity_fake, _VELOCITY_TEACHER: velocity_teacher}
        value, found = self._checked(tracking.value, tracking, (), query, predictions)
        walked = _Walked(query.generator_version, share)
        self._walked[query.key] = walked
        gradient = walk.back(share * loss.value, share * value)
        grad_x0, metrics = self._checked(gradient, loss, (gradient,), query, predictions)
        walked.report = TrackReport(metrics=found)
        return GeneratorSignal(
            key=query.key,
            grad_x0=grad_x0,
            generator_version=query.generator_version,
            metrics=metrics,
        )

    def _take_walked(self, query: NoisedBatch, share: float) -> TrackReport:
        """The loss terms of a micro-batch whose gradient `signal` has gathered."""
        walked = self._walked.get(query.key)
        if (
            walked is None
            or walked.report is None
            or (walked.generator_version, walked.share) != (query.generator_version, share)
        ):
            refused = [key for key, each in self._walked.items() if each.report is None]
            raise StaleCallError(
                f"tracking {query.key} of generator version {query.generator_version}, a share of "
                f"{share:.3g}",
                f"the fake score has walked {list(self._walked) or 'no forward passes'}"
                + (f" and refused {refused}" if refused else ""),
                "a query whose signal was computed in this iteration with this share, and not "
                "tracked yet",
                "Call signal first; with fake_score.walk=joint it makes both gradients",
            )
        del self._walked[query.key]
        return walked.report

    def _restart(self, iteration: int) -> None:
        """Goes back to the first weights, without moments, before a phase that begins anew."""
        if self._start is None or iteration not in self._restarts:
            return
        if self._restarted != iteration:
            self._optimizer.restart(self._start)
            self._restarted = iteration

    def _with_looks(
        self, loss: Loss, leaf: NoisedBatch, query: NoisedBatch, teacher: TeacherPrediction
    ) -> tuple[Loss, Latents | None]:
        """Adds the terms of an objective's other looks.

        Args:
            loss: That of the query itself.
            leaf: The query, its samples a leaf.
            query: The query with its looks.
            teacher: The teacher's answer to all of them.

        Returns:
            The whole loss, and the leaf of the samples off the trajectory where there are any.
        """
        objective, device = self._objective, leaf.x0.device
        found, off = [loss], None
        if not isinstance(objective, LookingObjective):
            return loss, None
        if query.guide is not None and teacher.guide is not None:
            answer = GuideAnswer(
                teacher.guide.conditional.to(device), teacher.guide.guided.to(device)
            )
            found.append(objective.guide_loss(leaf.at(query.guide), answer))
        if query.off is not None and query.off.x0 is not None and teacher.off is not None:
            off = query.off.x0.detach().requires_grad_()
            beside = leaf.at(replace(query.off, x0=off))
            velocities = self._predict(beside), teacher.off.to(device)
            found.append(objective.off_trajectory_loss(beside, *velocities))
        value = torch.stack([each.value for each in found]).sum()
        terms = {name: term for each in found for name, term in each.terms.items()}
        return Loss(value, {**terms, "generator": value.detach()}), off

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

    def _checked(
        self,
        value: Tensor,
        loss: Loss,
        gradients: Sequence[Tensor],
        query: NoisedBatch,
        predictions: Mapping[str, Tensor],
    ) -> tuple[Tensor, dict[str, float]]:
        """The value that others learn from, checked, and the loss terms as numbers.

        Args:
            value: Value to check, as in `FiniteChecks.checked`.
            loss: Result of the objective.
            gradients: That at the samples, and that at the teacher's velocity, where they exist.
            query: Query that the predictions are of.
            predictions: Velocities that the loss was computed from, by name.

        Raises:
            NonFiniteError: Something is not finite, and this role raises.
        """
        figures = dict(loss.terms)
        names = ("grad_x0_norm", "teacher_cotangent_norm")
        for name, gradient in zip(names, gradients, strict=False):
            figures[name] = torch.linalg.vector_norm(gradient)
        # One transfer from the device for all of them.
        values = torch.stack([figure.double() for figure in figures.values()]).tolist()
        numbers = dict(zip(figures, values, strict=True))
        remedy = "the learning rates or the objective's weights"
        checked = self._checks.checked(
            value,
            query.key,
            f"computing losses on the fake score in {micro_batch_in_words(query.key)}",
            {**query.numbers, **predictions},
            non_finite_remedy(query.generator_version, remedy),
            numbers,
            stages_before=2,
        )
        return checked, {name: numbers[name] for name in loss.terms}

    def _take_kept(self, query: NoisedBatch) -> "_KeptForward":
        kept = self._kept.get(query.key)
        if kept is None or kept.query.generator_version != query.generator_version:
            raise StaleCallError(
                f"tracking {query.key} of generator version {query.generator_version}",
                f"the fake score keeps {list(self._kept) or 'no forward passes'}",
                "a query whose signal was computed in this iteration and not tracked yet",
                "Call signal first; with fake_score.tracking=shared both use one forward pass",
            )
        return self._kept.pop(query.key)

    def _forward(self, query: NoisedBatch) -> "_KeptForward":
        constant = detached(query_on(query, device_of(self._network)))
        velocity_fake = self._network(constant.x_t, constant.sigma, constant.text)
        return _KeptForward(constant, velocity_fake)


@dataclass(frozen=True, slots=True)
class _KeptForward:
    """A prediction with the graph that leads back to the parameters, and the query it is at.

    Attributes:
        query: A constant.
        velocity_fake: The prediction.
        x0: Leaf that its graph leads back to as well, where `complete` still has a use for it.
    """

    query: NoisedBatch
    velocity_fake: Latents
    x0: Latents | None = None


@dataclass(slots=True)
class _Walked:
    """A micro-batch whose two gradients were made by one walk.

    Attributes:
        generator_version: Updates that the generator had seen.
        share: Share of the iteration that its gradients were weighted by.
        report: Terms of tracking's loss; None if the micro-batch was refused.
    """

    generator_version: int
    share: float
    report: TrackReport | None = None


def _require_joint(objective: Objective) -> None:
    if objective.path is not GradientPath.FAKE_SCORE or isinstance(objective, LookingObjective):
        raise ConfigError(
            "walking back through the fake score once for two gradients",
            f"the losses of {objective.method}",
            "a loss whose one gradient goes through the fake score",
            "Set fake_score.walk=apart",
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
