"""The frozen network whose score the generator should match."""

import torch
from torch import nn

from sgmd_core.types import NoisedBatch, TeacherPrediction, Text
from sgmd_core.velocity import guided_velocity
from workers.placement import device_of, query_on
from workers.settings import TeacherSettings


class ScoreTeacher:
    """Predicts guided velocities; keeps nothing between calls, so any replica can answer.

    Args:
        velocity_model: The network; it is frozen here.
        settings: How strongly it is guided.
    """

    def __init__(self, velocity_model: nn.Module, settings: TeacherSettings) -> None:
        self._network = velocity_model.eval().requires_grad_(False)
        self._settings = settings

    # Not inference_mode: a tensor made there cannot be saved for the backward pass of the fake
    # score, which shares the process in the local topology.
    @torch.no_grad()
    def denoise(self, query: NoisedBatch, negative: Text) -> TeacherPrediction:
        """Guided velocity at a query, `uncond + s * (cond - uncond)`.

        Args:
            query: What the generator made, noised.
            negative: Embedding of the negative prompt (1, l, d).

        Returns:
            The prediction under the query's key, a constant for every loss.
        """
        device = device_of(self._network)
        query = query_on(query, device)
        velocity = guided_velocity(
            self._network,
            query.x_t,
            query.sigma,
            query.text,
            negative.to(device),
            self._settings.guidance_scale,
        )
        return TeacherPrediction(key=query.key, velocity=velocity)
