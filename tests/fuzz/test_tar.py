"""Of a damaged tar, every clip is listed as it was or counted as lost."""

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

from pipelines.data.making.prepare_clip import ClipRules, prepare_clip
from pipelines.data.making.skipped import SkippedFiles
from pipelines.data.making.sources import CaptionFile, SourceClip, list_clips
from pipelines.data.shards.rejection import Rejection
from tests.fuzz.mutations import NUM_CASES, mutate_bytes, time_limit
from tests.helpers.video_files import grey_frames, video_file

NUM_CLIPS = 5


def write_tar(path: Path, *, tar_format: int, prefix: str = "") -> bytes:
    """A tar of videos and captions."""
    video = video_file(grey_frames([40, 200]))
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
        for clip in range(NUM_CLIPS):
            parts = {".mp4": video, ".txt": f"caption {clip}".encode()}
            for suffix, content in parts.items():
                entry = tarfile.TarInfo(f"{prefix}clip{clip}{suffix}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    path.write_bytes(buffer.getvalue())
    return buffer.getvalue()


def listed(path: Path, skipped: SkippedFiles | None = None) -> list[SourceClip | Rejection]:
    with time_limit():
        return list(list_clips(str(path), skipped=skipped))


def is_whole(clip: SourceClip | Rejection) -> bool:
    return isinstance(clip, SourceClip) and clip.caption is not None


def end_of(clips: Sequence[SourceClip | Rejection]) -> int:
    """First byte after the last part that is listed."""
    captions = [clip.caption for clip in clips if isinstance(clip, SourceClip)]
    files = [caption.file for caption in captions if isinstance(caption, CaptionFile)]
    return max((file.offset + (file.num_bytes or 0) for file in files), default=0)


def test_a_clip_of_a_damaged_tar_is_listed_as_it_was_or_the_damage_is_reported(tmp_path: Path):
    path = tmp_path / "clips.tar"
    data = write_tar(path, tar_format=tarfile.USTAR_FORMAT)
    expected, reported = {clip.sample_id for clip in listed(path)}, 0
    for seed in range(NUM_CASES):
        damaged = mutate_bytes(data, seed)
        path.write_bytes(damaged)
        skipped = SkippedFiles()
        found = listed(path, skipped)
        # Where a whole member is gone, its other half is counted as a file without a clip.
        faults = [*(clip for clip in found if not is_whole(clip)), *skipped.kinds]
        # A header has a checksum, so no name can come out of damage.
        assert {clip.sample_id for clip in found if is_whole(clip)} <= expected, seed
        # Zeros up to the end are the padding of a whole tar with fewer members.
        is_shorter = not damaged[end_of(found) :].strip(b"\0")
        assert faults or is_shorter or {clip.sample_id for clip in found} == expected, seed
        reported += bool(faults)
    assert reported


def test_every_clip_of_a_damaged_tar_is_prepared_or_rejected(tmp_path: Path):
    path, prefix = tmp_path / "clips.tar", "ein langer Name, ünïcode " * 6
    for number, tar_format in enumerate((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)):
        data = write_tar(path, tar_format=tar_format, prefix=prefix)
        assert all(is_whole(clip) for clip in listed(path))
        for seed in range(number, NUM_CASES, 2):
            path.write_bytes(mutate_bytes(data, seed))
            for clip in listed(path):
                with time_limit():
                    prepare_clip(clip, ClipRules())
