"""Several captions of one clip: a list in a manifest or JSON file, or rows with the same video.

rows of a video -> one clip with all its captions -> the caption that is taken, or a row for each
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from pipelines.data.making.caption_choice import CaptionChoice
from pipelines.data.making.manifest_rows import fault_of_text
from pipelines.data.making.skipped import EQUAL_CAPTIONS, SkippedFiles
from pipelines.data.making.source_clip import SourceClip
from pipelines.data.shards.caption_rule import Fault, caption_fault
from pipelines.data.shards.rejection import Reason, Rejection
from pipelines.data.shards.seen import SeenIds


@dataclass(slots=True)
class _OpenClip:
    """A clip of which further rows follow."""

    clip: SourceClip
    captions: list[object] = field(default_factory=list)


def list_fault(captions: Sequence[object]) -> str | None:
    """Says why a list holds no captions; None where at least one value is text, or it is empty."""
    faults = [fault_of_text(caption) for caption in captions]
    return None if None in faults or not faults else f"in a list, {faults[0]}"


def rows_by_clip(
    rows: Callable[[], Iterator[SourceClip | Rejection]], skipped: SkippedFiles
) -> Iterator[SourceClip | Rejection]:
    """Joins the rows of a manifest that have the same id and the same video.

    The rows are read twice, first to count those of each id. Memory holds eight bytes a row, the
    ids that come again, and the captions of clips of which further rows follow.

    Args:
        rows: Begins to read the rows.
        skipped: Counts the rows that repeat a video and its caption.

    Yields:
        Clips, each at the place of its last row; rows of another video with the same id are
        rejected.
    """
    remaining = _rows_of_repeated_ids(rows())
    opened: dict[str, _OpenClip] = {}
    for clip in rows():
        sample_id = clip.sample_id
        if isinstance(clip, Rejection) or sample_id not in remaining:
            yield clip
            continue
        known = opened.setdefault(sample_id, _OpenClip(clip))
        if known.clip.video != clip.video:
            detail = "an earlier row of this manifest has the same id and another video"
            yield Rejection(sample_id, clip.source, clip.row, Reason.DUPLICATE_ID, detail)
        else:
            _add_captions(known, clip, skipped)
        remaining[sample_id] -= 1
        if not remaining[sample_id]:
            del remaining[sample_id]
            yield _joined(opened.pop(sample_id))
    # Only where the file has become shorter between the two readings.
    yield from map(_joined, opened.values())


def _rows_of_repeated_ids(rows: Iterator[SourceClip | Rejection]) -> dict[str, int]:
    """Counts the rows of each id that comes more than once."""
    seen = SeenIds()
    counts: dict[str, int] = {}
    for clip in rows:
        # An id that is not UTF-8 has no digest, and is rejected later.
        if isinstance(clip, Rejection) or fault_of_text(clip.sample_id) is not None:
            continue
        if seen.add([clip.sample_id]):
            counts[clip.sample_id] = counts.get(clip.sample_id, 1) + 1
    return counts


def _add_captions(known: _OpenClip, clip: SourceClip, skipped: SkippedFiles) -> None:
    if clip.caption is None:
        return
    for caption in clip.caption if isinstance(clip.caption, tuple) else (clip.caption,):
        if caption in known.captions:
            skipped.add(EQUAL_CAPTIONS, f"{clip.source}, row {clip.row}")
        else:
            known.captions.append(caption)


def _joined(known: _OpenClip) -> SourceClip:
    if not known.captions:
        return known.clip
    return replace(known.clip, caption=tuple(known.captions))


def choose_caption(
    captions: Sequence[object], choice: CaptionChoice, seed: int, sample_id: str, max_chars: int
) -> str | Fault:
    """Takes one of several captions: the first or a random one of those that can be used.

    Args:
        captions: As the source lists them.
        choice: `FIRST` or `RANDOM`.
        seed: Fixes the random choice, together with the id.
        sample_id: The clip's id.
        max_chars: Most characters of a caption.

    Returns:
        The caption; the fault of the first one where none can be used.
    """
    faults = [_fault(caption, max_chars) for caption in captions]
    usable = [place for place, fault in enumerate(faults) if fault is None]
    if not usable:
        none: Fault = (Reason.MISSING_CAPTION, "an empty list")
        return next((fault for fault in faults if fault is not None), none)
    place = usable[0]
    if choice is CaptionChoice.RANDOM and len(usable) > 1:
        # Here alone: each process of the pool would load torch, which nothing else in it needs.
        import torch

        from sgmd_core.seeds import random_generator

        stream = random_generator(seed, f"caption/{sample_id}")
        place = usable[int(torch.randint(len(usable), (), generator=stream))]
    return str(captions[place])


def _fault(caption: object, max_chars: int) -> Fault | None:
    fault = fault_of_text(caption)
    if fault is not None:
        return Reason.UNREADABLE_CAPTION, fault
    return caption_fault(str(caption), max_chars)


def one_clip_a_caption(
    clip: SourceClip, captions: Sequence[object]
) -> Iterator[SourceClip | Rejection]:
    """Makes a clip of each caption, with the ids `ID#0`, `ID#1`, ...

    Args:
        clip: The clip that has them.
        captions: As the source lists them. Each keeps its number whichever of them can be used.
    """
    for number, caption in enumerate(captions):
        sample_id, fault = f"{clip.sample_id}#{number}", fault_of_text(caption)
        if isinstance(caption, str) and fault is None:
            yield replace(clip, sample_id=sample_id, caption=caption)
        else:
            reason = Reason.UNREADABLE_CAPTION
            yield Rejection(sample_id, clip.source, clip.row, reason, fault or "")
