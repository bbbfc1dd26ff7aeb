"""The network that tells what the generator makes from what it should be, and teaches it by that.

    compare_steps(query, teacher, fake)   ADM: the teacher's step of the flow, and the fake score's
    compare_data(query, data, signal)     DMD2's GAN term: latents of the data, and the samples

    state --> [ frozen copy of the teacher ] --> features --> heads --> logit
          <--- generator's loss, to the state ----------------
                                                <-- own loss --    to the heads' parameters alone

Both losses come from the same present heads. The generator's goes on from the state: to `x0`, and
of a step also to the fake score's velocity, from where the fake score completes the signal. The
teacher's copy is never updated, and heads learn from features without a graph.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sgmd_core.errors import StaleCallError, non_finite_remedy
from sgmd_core.objectives import Objective, SteppingObjective, adversary_of
from sgmd_core.objectives.adversarial import (
    AdversarialTerm,
    gaps_by_noise,
    noised_alike,
    perturbation,
)
from sgmd_core.types import (
    DataBatch,
    FakePrediction,
    GeneratorSignal,
    Latents,
    Loss,
    NoisedBatch,
    PerSample,
    TeacherPrediction,
    detached,
)
from workers.discriminator_heads import DiscriminatorHeads
from workers.finite import Diagnosis, FiniteChecks, broken_weight
from workers.models.family import Denoiser
from workers.models.features import features_of
from workers.network_settings import OptimizerSettings
from workers.optimizer import RoleOptimizer
from workers.placement import device_of, query_on
from workers.saving import LearningRole
from workers.sharding import is_sharded

ROLE = "discriminator"


class Discriminator(LearningRole):
    """Heads on a frozen denoiser's features: judges, teaches the generator, and learns.

    Args:
        network: Copy of the teacher; it is frozen here.
        heads: One for each of `layers`; trained.
        layers: Layers of the network whose outputs they see, counted from 1.
        objective: Has an adversarial term.
        optimizer: How the heads are updated.
        seed: The run's seed, by which perturbations are drawn.
        checks: Checks of the numbers that go in and come out; by default they raise.
    """

    _role = ROLE

    def __init__(
        self,
        network: Denoiser,
        heads: DiscriminatorHeads,
        layers: Sequence[int],
        objective: Objective,
        optimizer: OptimizerSettings,
        seed: int,
        checks: FiniteChecks | None = None,
    ) -> None:
        super().__init__()
        self._checks = checks or FiniteChecks()
        self._denoiser = network.eval().requires_grad_(False)
        self._network = heads
        self._layers = tuple(layers)
        self._objective = objective
        self._term = _term_of(objective)
        self._seed = seed
        self._optimizer = RoleOptimizer(ROLE, heads, optimizer)

    def compare_steps(
        self,
        query: NoisedBatch,
        teacher: TeacherPrediction,
        fake: FakePrediction,
        share: float,
    ) -> GeneratorSignal:
        """Tells the teacher's step from the fake score's; accumulates the heads' gradient.

        Args:
            query: What the generator made, noised.
            teacher: The teacher's guided prediction there.
            fake: The fake score's prediction there.
            share: Samples in this micro-batch over samples in the iteration.

        Returns:
            The generator's signal, with the cotangent that the fake score completes it from.

        Raises:
            StaleCallError: The query is of another iteration, or a prediction of another query.
            NonFiniteError: A number that goes in or comes out is not finite.
        """
        self._require_one(query, teacher.key, fake.key)
        objective = self._objective
        assert isinstance(objective, SteppingObjective), "this objective compares no steps"
        device = device_of(self._denoiser)
        query = query_on(query, device)
        x0 = query.x0.detach().requires_grad_()
        velocity = fake.velocity.to(device).detach().requires_grad_()
        real, made = objective.states(
            detached(query, x0), velocity, teacher.velocity.to(device).detach()
        )
        pair = _Pair(real, made, query.sigma - objective.delta)
        handed = {"the teacher's velocity": teacher.velocity, "the fake score's": velocity}
        (grad_x0, cotangent), metrics = self._learn(query, pair, (x0, velocity), share, handed)
        metrics["generator"] = self._term.weight * metrics["adversarial"]
        return GeneratorSignal(
            key=query.key,
            grad_x0=grad_x0,
            generator_version=query.generator_version,
            metrics=metrics,
            fake_cotangent=cotangent,
        )

    def compare_data(
        self, query: NoisedBatch, data: DataBatch, signal: GeneratorSignal, share: float
    ) -> GeneratorSignal:
        """Tells data from samples, noised alike; accumulates the heads' gradient.

        Args:
            query: What the generator made, noised.
            data: Latents of the data, as many.
            signal: Gradient of the other terms of the generator's loss.
            share: Samples in this micro-batch over samples in the iteration.

        Returns:
            The signal, with this term in its gradient and its metrics.

        Raises:
            StaleCallError: The query is of another iteration, or the signal of another query.
            NonFiniteError: A number that goes in or comes out is not finite.
        """
        self._require_one(query, signal.key)
        device = device_of(self._denoiser)
        query = query_on(query, device)
        x0 = query.x0.detach().requires_grad_()
        real, made = noised_alike(detached(query, x0), data.x0.to(device))
        handed = {"the data's latents": data.x0, "the gradient of the other terms": signal.grad_x0}
        pair = _Pair(real, made, query.sigma)
        (grad,), metrics = self._learn(query, pair, (x0,), share, handed)
        whole = signal.metrics["generator"] + self._term.weight * metrics["adversarial"]
        return replace(
            signal,
            grad_x0=signal.grad_x0.to(grad) + grad,
            metrics={**signal.metrics, **metrics, "generator": whole},
        )

    def diagnose(self, iteration: int) -> Diagnosis:
        """First fault of an iteration, and a weight that is not finite; of heads and features."""
        found = super().diagnose(iteration)
        return replace(found, broken_weight=found.broken_weight or broken_weight(self._denoiser))

    def _require_one(self, query: NoisedBatch, *keys: object) -> None:
        """Checks that the query is of this iteration, and that all inputs are about it."""
        self._optimizer.require_current(query.key.iteration, "comparing a micro-batch")
        others = [key for key in keys if key != query.key]
        if others:
            raise StaleCallError(
                f"comparing {query.key}", f"an input for {others[0]}", "inputs for the same query"
            )

    def _learn(
        self,
        query: NoisedBatch,
        pair: "_Pair",
        leaves: tuple[Tensor, ...],
        share: float,
        handed: Mapping[str, Tensor],
    ) -> tuple[tuple[Tensor, ...], dict[str, float]]:
        """Gathers the heads' gradient; returns the generator's at some leaves, and loss terms."""
        features = self._features(query, pair.made, pair.sigma)
        taught = self._term.generator_loss(self._network(features))
        # Asked for the leaves alone, autograd makes no gradient for any parameter.
        gradients = torch.autograd.grad(share * taught.value, leaves)
        made = [feature.detach() for feature in features]
        # Features of a video are large; what follows makes copies of them, one after another.
        del features
        own = self._own_loss(query, pair, made)
        figures = {**taught.terms, **own.terms}
        # One transfer from the device for all of them.
        values = torch.stack([figure.double() for figure in figures.values()]).tolist()
        metrics = dict(zip(figures, values, strict=True))
        norms = {
            f"gradient_norm_{place}": torch.linalg.vector_norm(gradient).item()
            for place, gradient in enumerate(gradients)
        }
        checked = self._checks.checked(
            torch.stack([own.value, torch.ones_like(own.value)]),
            query.key,
            "comparing on the discriminator",
            {**query.numbers, **handed},
            non_finite_remedy(query.key.iteration, "discriminator.optimizer.lr"),
            {**metrics, **norms},
            stages_before=2,
        )
        value, is_sound = checked
        (share * value).backward(inputs=self._inputs)
        return tuple(gradient * is_sound.detach() for gradient in gradients), metrics

    def _own_loss(self, query: NoisedBatch, pair: "_Pair", made: list[Tensor]) -> Loss:
        """The heads' loss over features without a graph, in one pass through the heads."""
        states = [pair.real]
        if self._term.has_penalty:
            assert query.sample_indices, "perturbations are drawn by the samples' places"
            noise = perturbation(
                self._seed, query.key.iteration, query.sample_indices, pair.real.shape[1:]
            )
            states.append(pair.real + self._term.r1_sigma * noise.to(pair.real))
        with torch.no_grad():
            seen = [made, *(self._features(query, state, pair.sigma) for state in states)]
        joined = [torch.cat([maps.pop(0) for maps in seen]) for _ in self._layers]
        fake, real, *perturbed = self._network(joined).chunk(len(seen))
        loss = self._term.discriminator_loss(real, fake, perturbed[0] if perturbed else None)
        return Loss(loss.value, {**loss.terms, **gaps_by_noise(real, fake, query.sigma)})

    def _features(self, query: NoisedBatch, state: Latents, sigma: PerSample) -> list[Tensor]:
        return features_of(self._denoiser, self._layers, state, sigma, query.text)

    @property
    def _inputs(self) -> list[torch.nn.Parameter] | None:
        """Ends of the heads' backward pass; of sharded heads autograd sees gathered copies."""
        return None if is_sharded(self._network) else self._optimizer.parameters


@dataclass(frozen=True, slots=True)
class _Pair:
    """States that are compared: the real one a constant, the made one with its graph."""

    real: Latents
    made: Latents
    sigma: PerSample


def _term_of(objective: Objective) -> AdversarialTerm:
    term = adversary_of(objective)
    assert term is not None, f"{objective.method} has no adversarial term"
    return term
