"""The generator's part in a consistency term: it looks at data, and at how its answer changes.

    noise_data(key, text, data)         latents of the data, noised             to the teacher
    learn_consistency(query, teacher)   derivative along the teacher's path, loss, backward

The derivative is a constant of the loss (`workers.tangents`), so the second pass keeps a graph of
its own and the gradient adds to that of the signals.
"""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from sgmd_core.buckets import LatentBuckets
from sgmd_core.errors import StaleCallError, non_finite_remedy
from sgmd_core.objectives.consistency import ConsistencyTerm
from sgmd_core.seeds import data_draws
from sgmd_core.trigflow import direction_weight
from sgmd_core.types import (
    DataBatch,
    MicroBatchKey,
    NoisedBatch,
    PerSample,
    TeacherPrediction,
    TextBatch,
    per_sample,
)
from workers.models.family import Denoiser
from workers.placement import device_of, query_on, text_on
from workers.reports import ConsistencyReport
from workers.saving import LearningRole
from workers.tangents import velocity_and_derivative


class ConsistencyLearner(LearningRole):
    """Part of a generator that learns a consistency term.

    Args:
        term: The term; None where the objective has none.
    """

    _buckets: LatentBuckets
    _seed: int

    def __init__(self, term: ConsistencyTerm | None = None) -> None:
        super().__init__()
        self._term = term

    def noise_data(self, key: MicroBatchKey, text: TextBatch, data: DataBatch) -> NoisedBatch:
        """Noises latents of the data to levels drawn by the law of the objective's term.

        Args:
            key: The micro-batch.
            text: Captions of the data.
            data: Their latents.

        Raises:
            StaleCallError: The key belongs to another iteration.
            NonFiniteError: A number that goes in is not finite.
        """
        self._optimizer.require_current(key.iteration, "noising data")
        device = device_of(self._network)
        normal, noise = data_draws(self._seed, key, text.sample_indices, self._latent_shape(key))
        query = NoisedBatch(
            x0=data.x0.to(device).float(),
            sigma=self._data_sigma(normal, noise.shape[2]).to(device),
            noise=noise.to(device),
            text=text_on(text, device).text,
            key=key,
            generator_version=self._optimizer.updates,
            sample_indices=text.sample_indices,
        )
        numbers = {"the text embedding": query.text, "the data's latents": query.x0}
        remedy = "look for what is broken in the encoded shards"
        return replace(query, x0=self._checked(query.x0, "noising data", key, numbers, 0, remedy))

    def learn_consistency(
        self, query: NoisedBatch, teacher: TeacherPrediction, share: float
    ) -> ConsistencyReport:
        """Adds the gradient of the term to that of the signals.

        Args:
            query: Noised data, as `noise_data` made them.
            teacher: The guided teacher's velocity there.
            share: Samples in this micro-batch over samples in the iteration.

        Raises:
            StaleCallError: The two belong to different micro-batches, or to another iteration.
            NonFiniteError: A number that goes in or comes out is not finite; no gradient was
                accumulated from it.
        """
        self._optimizer.require_current(query.key.iteration, "learning consistency")
        if teacher.key != query.key:
            raise StaleCallError(
                f"learning consistency from {query.key}",
                f"a prediction of the teacher for {teacher.key}",
                "the prediction at the same data",
            )
        network = self._network
        query = query_on(query, device_of(network))
        path, x_t = teacher.velocity.to(query.x0), query.x_t
        weight = direction_weight(query.sigma).to(x_t)
        direction = per_sample(weight, path) * path, weight
        assert isinstance(network, Denoiser), "a derivative is asked of a denoiser"
        constant, derivative = velocity_and_derivative(
            network, x_t, query.sigma, query.text, direction
        )
        velocity = network(x_t, query.sigma, query.text)
        loss = self._consistency.loss(query, velocity, constant, path, derivative)
        numbers = {
            "the noised data": x_t,
            "the teacher's velocity": path,
            "the generator's velocity": velocity,
            "its derivative": derivative,
            "the consistency loss": loss.value,
        }
        value = self._checked(loss.value, "learning consistency", query.key, numbers, 2)
        (share * value).backward()
        return ConsistencyReport({name: term.item() for name, term in loss.terms.items()})

    def _latent_shape(self, key: MicroBatchKey) -> tuple[int, int, int, int]:
        """Shape (C, T, H, W) of a sample of a micro-batch's iteration."""
        return self._buckets.shape_at(self._seed, key.iteration)

    def _data_sigma(self, normal: PerSample, num_frames: int) -> PerSample:
        """Noise level of data of so many latent frames, from a standard normal number."""
        return self._consistency.sigma(normal, num_frames)

    def _checked(
        self,
        value: Tensor,
        attempted: str,
        key: MicroBatchKey,
        numbers: Mapping[str, Tensor],
        stages_before: int = 4,
        remedy: str = "",
    ) -> Tensor:
        return self._checks.checked(
            value,
            key,
            f"{attempted} on the generator",
            numbers,
            remedy or non_finite_remedy(key.iteration, "generator.optimizer.lr"),
            stages_before=stages_before,
        )

    @property
    def _consistency(self) -> ConsistencyTerm:
        assert self._term is not None, "this objective has no consistency term"
        return self._term
