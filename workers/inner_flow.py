"""The generator's part in MeanFlow: its flow head learns strides, on latents of the data.

    learn_flow(key, text, data, negative)   data noised to the generator's own steps, strides, loss,
                                            backward

The backbone is asked once; the head three times, of which two make a derivative and keep no graph.
With guidance both are asked once more, under the negative prompt and without a graph.
"""

import torch

from sgmd_core.objectives.consistency import ConsistencyTerm
from sgmd_core.objectives.meanflow import MeanFlowTerm, Strides
from sgmd_core.schedule import FlowMatchSchedule
from sgmd_core.seeds import stride_draws
from sgmd_core.types import DataBatch, MicroBatchKey, NoisedBatch, PerSample, Text, TextBatch
from workers.consistency import ConsistencyLearner
from workers.models.family import TransitionDenoiser
from workers.reports import FlowReport


class FlowLearner(ConsistencyLearner):
    """Part of a generator that learns the strides of its flow head.

    Args:
        term: A consistency term; None where the objective has none.
        flow: The MeanFlow term; None where the objective has none.
    """

    _schedule: FlowMatchSchedule
    _num_steps: int

    def __init__(self, term: ConsistencyTerm | None, flow: MeanFlowTerm | None) -> None:
        super().__init__(term)
        self._flow = flow

    def learn_flow(
        self, key: MicroBatchKey, text: TextBatch, data: DataBatch, negative: Text, share: float
    ) -> FlowReport:
        """Accumulates the gradient of the term.

        Args:
            key: The micro-batch.
            text: Captions of the data.
            data: Their latents.
            negative: Embedding of the negative prompt (1, l, d).
            share: Samples in this micro-batch over samples in the iteration.

        Raises:
            StaleCallError: The key belongs to another iteration.
            NonFiniteError: A number that goes in or comes out is not finite; no gradient was
                accumulated from it.
        """
        term, network = self._flow, self._network
        assert term is not None, "this objective has no MeanFlow term"
        assert isinstance(network, TransitionDenoiser), "strides are those of a flow head"
        query = self.noise_data(key, text, data)
        strides = self._strides(term, query, network)
        if term.guidance != 1:
            strides = self._guided(strides, term, query, negative.to(query.text), network)
        levels = (strides.s, *strides.ends)
        answers = network(
            query.x_t,
            query.sigma,
            query.text,
            torch.stack(strides.states),
            torch.stack(levels),
            strides.r,
        )
        loss = term.loss(strides, *answers)
        numbers = {
            "the noised data": query.x_t,
            "the head's answers": answers,
            "the MeanFlow loss": loss.value,
        }
        value = self._checked(loss.value, "learning strides", key, numbers, 1)
        (share * value).backward()
        return FlowReport({name: each.item() for name, each in loss.terms.items()})

    @torch.no_grad()
    def _guided(
        self,
        strides: Strides,
        term: MeanFlowTerm,
        query: NoisedBatch,
        negative: Text,
        network: TransitionDenoiser,
    ) -> Strides:
        states, levels = strides.at(strides.s)[None], strides.s[None]
        caption = negative.expand_as(query.text)
        (head,) = network(query.x_t, query.sigma, caption, states, levels, strides.s)
        return strides.guided_by(term.guidance, head)

    def _data_sigma(self, normal: PerSample, num_frames: int) -> PerSample:
        """Noise level of data: a step of the generator, or by the consistency term's law."""
        if self._flow is None:
            return super()._data_sigma(normal, num_frames)
        starts = self._schedule.generator_grid(self._num_steps)[:-1]
        # Uniform, because the number is standard normal.
        drawn = torch.special.ndtr(normal.double()) * len(starts)
        return starts[drawn.long().clamp_max(len(starts) - 1)].float()

    def _strides(
        self, term: MeanFlowTerm, query: NoisedBatch, network: TransitionDenoiser
    ) -> Strides:
        uniform, choice, noise = stride_draws(
            self._seed, query.key, query.sample_indices, self._latent_shape(query.key)
        )
        s, r = term.levels(uniform, choice, network.inner_levels)
        own = query.x0
        return Strides(query.noise - own, noise.to(own), s.to(own), r.to(own))
