"""Clips of a source that earlier runs have not dealt with, each id once."""

import itertools
from collections.abc import Callable, Iterable, Iterator

from pipelines.data.making.source_clip import SourceClip
from pipelines.data.shards.rejection import Reason, Rejection
from pipelines.data.shards.seen import SeenIds

Place = tuple[str, str, int | None]


def fresh_clips(
    listed: Iterable[SourceClip | Rejection],
    written: SeenIds,
    known: set[Place],
    split: Callable[[SourceClip], Iterable[SourceClip | Rejection]] | None = None,
) -> Iterator[SourceClip | Rejection]:
    """Leaves out what an earlier run has dealt with, and rejects ids that come again.

    Args:
        listed: All clips of the source.
        written: Ids that are in the shards.
        known: (id, source, row) of what was rejected before.
        split: Makes the rows of a clip, where it may have several.
    """
    clips = _with_duplicates_rejected(listed)
    if split is not None:
        rows = ((clip,) if isinstance(clip, Rejection) else split(clip) for clip in clips)
        clips = itertools.chain.from_iterable(rows)
    for clip in clips:
        if (clip.sample_id, clip.source, clip.row) in known:
            continue
        if isinstance(clip, Rejection) or not written.add([clip.sample_id]):
            yield clip


def _with_duplicates_rejected(
    listed: Iterable[SourceClip | Rejection],
) -> Iterator[SourceClip | Rejection]:
    seen = SeenIds()
    for clip in listed:
        if isinstance(clip, SourceClip) and seen.add([clip.sample_id]):
            detail = "an earlier clip of this source has the same id"
            clip = Rejection(clip.sample_id, clip.source, clip.row, Reason.DUPLICATE_ID, detail)
        yield clip
