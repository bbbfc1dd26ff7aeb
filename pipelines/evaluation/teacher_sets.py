"""Sets of a teacher's clips, sampled once and remembered as numbers: `workers.samplings`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pipelines.evaluation.result import BUILT_IN_FEATURES
from sgmd_core.metrics.frechet import clip_features
from workers.clip_sets import ClipRequest, ClipSet, sample_clip_set
from workers.evaluator import Evaluator
from workers.feature_network import FeatureExtractor
from workers.kept_clips import KeptClips, set_name
from workers.samplings import FLOOR, REFERENCE, TEACHER_FEW, TEACHER_FEW_GUIDED, Sampling

TEACHER_SETS = (REFERENCE, FLOOR, TEACHER_FEW, TEACHER_FEW_GUIDED)


@dataclass(frozen=True, slots=True)
class NamedExtractor:
    """A feature extractor.

    Attributes:
        extract: Computes the features of clips.
        digest: Names it in the cache.
    """

    extract: FeatureExtractor = clip_features
    digest: str = BUILT_IN_FEATURES


@dataclass(frozen=True)
class TeacherSets:
    """The teacher's sets of clips, each with its twin from the other seed.

    Attributes:
        cache: Folder of what was measured before, by names that are made of all that decides it.
        digest: Digest of the teacher's folder.
        facts: All else that decides its clips: their size, the text settings, the flow shift.
        samplings: Ways of sampling, from `teacher_samplings`.
        request: Captions, batch size and measures of every set.
        open_evaluator: Loads the teacher; called when the first set is not remembered.
        features: Feature extractor.
        on_progress: Called after every batch with (name of the set, True for a twin, clips done,
            clips in all).
    """

    cache: Path
    digest: str
    facts: tuple[object, ...]
    samplings: Mapping[str, Sampling]
    request: ClipRequest
    open_evaluator: Callable[[], Evaluator]
    features: NamedExtractor = NamedExtractor()
    on_progress: Callable[[str, bool, int, int], None] = lambda name, twin, done, total: None
    _sets: dict[str, ClipSet] = field(default_factory=dict)

    def set(self, name: str) -> ClipSet:
        """Returns a set, sampled unless it is remembered."""
        return self._known(name, name, is_twin=False)

    def twin(self, name: str) -> ClipSet:
        """Returns the features of a set's clips from the other seed.

        Reference and floor are each other's twins.
        """
        if known := {REFERENCE: FLOOR, FLOOR: REFERENCE}.get(name):
            return self.set(known)
        return self._known(f"{name}_twin", name, is_twin=True)

    def key(self, request: ClipRequest) -> str:
        """Returns the name of a set: a digest of all that decides it."""
        return set_name(self.digest, request, (*self.facts, self.features.digest))

    def request_of(self, name: str, *, is_twin: bool = False) -> ClipRequest:
        """Returns the request of a set or of its twin."""
        request = self.request.sampled(self.samplings[name])
        return request.twin(self.other_seed(request.sampling.seed)) if is_twin else request

    def other_seed(self, seed: int) -> int:
        """Returns seed B for seed A, and A for B."""
        first, second = self.samplings[REFERENCE].seed, self.samplings[FLOOR].seed
        return second if seed == first else first

    def _known(self, key: str, name: str, *, is_twin: bool) -> ClipSet:
        if key not in self._sets:
            self._sets[key] = self._load_or_sample(name, is_twin=is_twin)
        return self._sets[key]

    def _load_or_sample(self, name: str, *, is_twin: bool) -> ClipSet:
        request = self.request_of(name, is_twin=is_twin)
        kept = KeptClips(str(self.cache), self.digest, (*self.facts, self.features.digest))
        return kept.get(
            request,
            lambda wanted: sample_clip_set(
                self.open_evaluator(),
                wanted,
                lambda done, total: self.on_progress(name, is_twin, done, total),
                self.features.extract,
            ),
        )
