"""Forward passes of the fake score whose graphs wait for a later call, by micro-batch.

    signal, predict    keep a prediction
    complete           goes through its graph to the samples
    track              takes it, and goes through its graph to the parameters

With fresh tracking only predictions wait, and a signal's completion ends that.
"""

from dataclasses import dataclass

from sgmd_core.errors import StaleCallError
from sgmd_core.types import GeneratorSignal, Latents, MicroBatchKey, NoisedBatch


@dataclass(frozen=True, slots=True)
class KeptForward:
    """A prediction with the graph that leads back to the parameters, and the query it is at.

    Attributes:
        query: A constant.
        velocity_fake: The prediction.
        x0: Leaf that its graph leads back to as well, where `complete` still has a use for it.
    """

    query: NoisedBatch
    velocity_fake: Latents
    x0: Latents | None = None


class KeptForwards(dict[MicroBatchKey, KeptForward]):
    """Kept predictions by micro-batch."""

    def keep(self, forward: KeptForward) -> None:
        """Keeps a prediction until it is taken."""
        self[forward.query.key] = forward

    def completed(self, signal: GeneratorSignal) -> tuple[KeptForward, Latents, Latents]:
        """The prediction that a signal is completed through; it stays.

        Returns:
            The prediction, its leaf, and the cotangent to pull back.

        Raises:
            StaleCallError: The signal is of no kept prediction, or has no part for the fake score.
        """
        kept = self.get(signal.key)
        if kept is None or kept.x0 is None or signal.fake_cotangent is None:
            raise StaleCallError(
                f"carrying a signal of {signal.key} through the fake score",
                f"it keeps {list(self) or 'no forward passes'}"
                + (", and the signal has no cotangent" if signal.fake_cotangent is None else ""),
                "the one signal of a prediction that is kept, with this part still to be done",
                "Call predict first, and complete once",
            )
        return kept, kept.x0, signal.fake_cotangent.to(kept.velocity_fake)

    def take(self, query: NoisedBatch) -> KeptForward:
        """The prediction at a query, which is kept no longer.

        Raises:
            StaleCallError: It is not kept, or of another version of the generator.
        """
        kept = self.get(query.key)
        if kept is None or kept.query.generator_version != query.generator_version:
            raise StaleCallError(
                f"tracking {query.key} of generator version {query.generator_version}",
                f"the fake score keeps {list(self) or 'no forward passes'}",
                "a query whose signal was computed in this iteration and not tracked yet",
                "Call signal first; with fake_score.tracking=shared both use one forward pass",
            )
        return self.pop(query.key)
