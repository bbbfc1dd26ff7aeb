"""The frozen network whose score the generator should match.

denoise(query)            guided velocity, a constant
denoise_data(query)       the same at noised data
pullback(query, signal)   the part of the generator's gradient that goes through this network's
                          input, for objectives that have one
anchor(start)             guided steps from the generator's initial noise, for the diversity loss
"""

from copy import copy
from dataclasses import replace
from typing import Self

import torch
from torch import nn

from sgmd_core.errors import StaleCallError
from sgmd_core.objectives.diversity import anchor_velocity
from sgmd_core.rollout import euler_sample
from sgmd_core.types import (
    DiversityStart,
    DiversityTarget,
    GeneratorSignal,
    GuideAnswer,
    Latents,
    NoisedBatch,
    TeacherPrediction,
    Text,
    detached,
)
from sgmd_core.velocity import Guidance, guided_velocities, guided_velocity
from workers.finite import Diagnosis, FiniteChecks
from workers.placement import device_of, query_on
from workers.settings import TeacherSettings

_NEGATIVE = "the negative prompt's embedding"
_REMEDY = "look for what is broken first: the data, the generator, or the teacher's own weights"


class ScoreTeacher:
    """Predicts guided velocities; keeps nothing between calls, so any replica can answer.

    Args:
        velocity_model: The network; it is frozen here.
        settings: How strongly it is guided.
        checks: Checks of the numbers that go in and come out; by default they raise.
    """

    def __init__(
        self,
        velocity_model: nn.Module,
        settings: TeacherSettings,
        checks: FiniteChecks | None = None,
    ) -> None:
        self._checks = checks or FiniteChecks()
        self._network = velocity_model.eval().requires_grad_(False)
        self._settings = settings

    def for_another_run(self) -> Self:
        """The same network for another run at once: faults are those of its own calls."""
        twin = copy(self)
        twin._checks = self._checks.for_another_run()
        return twin

    # Not inference_mode: a tensor made there cannot be saved for the backward pass of the fake
    # score, which shares the process in the local topology.
    @torch.no_grad()
    def denoise(self, query: NoisedBatch, negative: Text) -> TeacherPrediction:
        """Guided velocity at a query, `uncond + s * (cond - uncond)`.

        Where the query has a look of its own for guidance, guidance is answered there, and the
        query itself with the caption alone; so are samples off the generator's trajectory.

        Args:
            query: What the generator made, noised.
            negative: Embedding of the negative prompt (1, l, d).

        Returns:
            The prediction under the query's key, a constant for every loss.

        Raises:
            NonFiniteError: A number that goes in or comes out is not finite.
        """
        query = query_on(query, device_of(self._network))
        guide = None if query.guide is None else self._both(query.at(query.guide), negative)
        off = None if query.off is None else self._conditional(query.at(query.off))
        velocity = self._guided(query, negative) if guide is None else self._conditional(query)
        made = {_NEGATIVE: negative, "the teacher's velocity": velocity}
        if guide is not None:
            made["the teacher's guided velocity"] = guide.guided
        if off is not None:
            made["the teacher's velocity off the path"] = off
        numbers = {**query.numbers, **made}
        velocity = self._checks.checked(
            velocity, query.key, "denoising on the teacher", numbers, _REMEDY, stages_before=1
        )
        return TeacherPrediction(key=query.key, velocity=velocity, guide=guide, off=off)

    def denoise_data(self, query: NoisedBatch, negative: Text) -> TeacherPrediction:
        """Guided velocity at noised data; see `denoise`."""
        return self.denoise(query, negative)

    def pullback(
        self, query: NoisedBatch, negative: Text, signal: GeneratorSignal
    ) -> GeneratorSignal:
        """Completes a signal by what reaches `x0` through the teacher's input.

            grad_x0 + (d velocity_teacher / d x0)' teacher_cotangent

        The forward pass is made again rather than kept from `denoise`: no graph waits here, any
        replica can answer, and the cost is that of a checkpointed pass.

        Args:
            query: What `denoise` was asked.
            negative: Embedding of the negative prompt (1, l, d).
            signal: What the fake score answered, with its `teacher_cotangent`.

        Returns:
            The signal that the generator learns from.

        Raises:
            StaleCallError: The signal is of another query, or has no part for the teacher.
            NonFiniteError: A number that goes in or comes out is not finite.
        """
        if signal.key != query.key or signal.teacher_cotangent is None:
            raise StaleCallError(
                f"carrying a signal of {query.key} through the teacher",
                f"a signal of {signal.key}"
                + (" without a cotangent" if signal.teacher_cotangent is None else ""),
                "the one signal of this query, with the teacher's part still to be done",
                "Call pullback once, and only for objectives whose path is both_scores",
            )
        device = device_of(self._network)
        query = query_on(query, device)
        x0 = query.x0.detach().requires_grad_()
        velocity = self._guided(detached(query, x0), negative)
        (grad,) = torch.autograd.grad(velocity, x0, signal.teacher_cotangent.to(velocity))
        handed = {
            _NEGATIVE: negative,
            "the fake score's gradient at x0": signal.grad_x0,
            "the fake score's gradient at the teacher's velocity": signal.teacher_cotangent,
        }
        grad = self._checks.checked(
            grad,
            query.key,
            "carrying a signal through the teacher",
            {**query.numbers, **handed, "the gradient through the teacher": grad},
            _REMEDY,
            stages_before=3,
        )
        return replace(signal, grad_x0=signal.grad_x0.to(device) + grad, teacher_cotangent=None)

    @torch.no_grad()
    def anchor(self, start: DiversityStart, negative: Text) -> DiversityTarget:
        """Goes the first steps of the guided path from a generator's initial noise.

        Args:
            start: The noise, and the noise levels of the steps.
            negative: Embedding of the negative prompt (1, l, d).

        Returns:
            The mean velocity of that path; 0 where it has no steps, and then nobody reads it.

        Raises:
            NonFiniteError: A number that goes in or comes out is not finite.
        """
        if not start.num_steps:
            return DiversityTarget(start.key, torch.zeros_like(start.noise))
        device = device_of(self._network)
        noise = start.noise.to(device)
        anchor = euler_sample(
            self._network,
            start.grid,
            noise,
            start.text.to(device),
            self._guidance(negative, device),
        )
        velocity = anchor_velocity(noise, anchor, float(start.grid[-1]))
        handed = {**start.numbers, _NEGATIVE: negative}
        numbers = {**handed, "the teacher's path": velocity}
        velocity = self._checks.checked(
            velocity, start.key, "following the teacher's path", numbers, _REMEDY, stages_before=1
        )
        return DiversityTarget(start.key, velocity)

    def diagnose(self, iteration: int) -> Diagnosis:
        """First fault of an iteration, and a weight that is not finite; of this rank."""
        return self._checks.diagnose(iteration, self._network)

    def _conditional(self, query: NoisedBatch) -> Latents:
        return self._network(query.x_t, query.sigma, query.text)

    def _both(self, query: NoisedBatch, negative: Text) -> GuideAnswer:
        """The velocity with the caption alone, and the guided one."""
        guidance = self._guidance(negative, query.x0.device)
        conditional, guided = guided_velocities(
            self._network, query.x_t, query.sigma, query.text, guidance
        )
        return GuideAnswer(conditional=conditional, guided=guided)

    def _guided(self, query: NoisedBatch, negative: Text) -> Latents:
        guidance = self._guidance(negative, query.x0.device)
        return guided_velocity(self._network, query.x_t, query.sigma, query.text, guidance)

    def _guidance(self, negative: Text, device: torch.device) -> Guidance:
        settings = self._settings
        return Guidance(
            negative.to(device),
            settings.guidance_scale,
            settings.batched_guidance,
            settings.cfg_norm,
        )
