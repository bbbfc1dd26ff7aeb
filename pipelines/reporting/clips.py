"""Clips on a page: a row is one caption, a column one way of sampling, a cell a looping video.

Each clip is H.264 in mp4 with halved chroma, inside the page as a `data:` address, because that is
what plays everywhere: Chromium (Debian's and Google's), Firefox, Safari and phones all decode it,
while Safari reads VP9 and AV1 on recent devices only. GIF and animated WebP would loop as well, but
cannot be paused, moved frame by frame or kept in step, and take several times the bytes.
"""

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import BytesIO
from itertools import zip_longest
from pathlib import Path

from PIL import Image

from cluster.paths import kind_of_path, real_path
from pipelines.data.clips.clip_decoding import first_frame
from pipelines.data.clips.transcoding import shrink_video
from pipelines.media.clip_files import ClipColumn, ClipFiles, clips_folder, read_clip_files
from pipelines.reporting.curves import LabelledRun
from pipelines.reporting.records import RunRecords
from pipelines.run.outputs import file_inside
from sgmd_core.errors import DataError

# Base64 adds a third, so that a page stays below 15 MB with room for curves and text.
MAX_MEDIA_BYTES = 10 * 2**20
# Clips may take this part of it; the rest is for contact sheets.
_CLIPS_SHARE = 0.75
# Tried one after the other on a clip that is larger than its share: width and x264 rate factor.
_SMALLER = ((360, 26), (240, 34))
_POSTER_PX = 180
_MAGIC = {
    b"\x89PNG\r\n\x1a\n": "image/png",
    b"GIF8": "image/gif",
    b"\xff\xd8\xff": "image/jpeg",
}


def _media_type(content: bytes) -> str | None:
    """Media type by the first bytes of a file, whatever its name says."""
    if content[4:8] == b"ftyp":
        return "video/mp4"
    return next((kind for magic, kind in _MAGIC.items() if content.startswith(magic)), None)


@dataclass(slots=True)
class Media:
    """Files put into the page, up to a limit.

    Attributes:
        left_bytes: What may still be put in.
        notes: What could not be put in, and why, as sentences.
    """

    left_bytes: int = MAX_MEDIA_BYTES
    notes: list[str] = field(default_factory=list)

    def put(self, name: str, content: bytes) -> str:
        """The address of a file inside the page; empty where it is too large or no media."""
        kind = _media_type(content)
        if kind is None:
            self.notes.append(f"{name} is left out: it is not a PNG, GIF, JPEG or MP4.")
            return ""
        if len(content) > self.left_bytes:
            self.notes.append(f"{name} ({len(content) / 2**20:.1f} MB) is left out: no room.")
            return ""
        self.left_bytes -= len(content)
        data = base64.b64encode(content).decode("ascii")
        return f"data:{kind};base64,{data}"

    def put_file(self, root: Path, name: str) -> str:
        """The same for a file of a run; empty also where it is missing or lies elsewhere."""
        path = file_inside(root, name)
        if path is None:
            is_there = kind_of_path(root / name)
            found = "no file inside the run's folder" if is_there else "not there"
            self.notes.append(f"{name} is {found}.")
            return ""
        size = path.stat().st_size
        if size > self.left_bytes:
            self.notes.append(f"{name} ({size / 2**20:.1f} MB) is left out: no room.")
            return ""
        try:
            return self.put(name, path.read_bytes())
        except OSError as error:
            self.notes.append(f"{name} cannot be read: {error}.")
            return ""


@dataclass(frozen=True, slots=True)
class Heading:
    """Heading of a column of clips.

    Attributes:
        label: The way of sampling.
        note: Its guidance, or the like.
        run: The run it belongs to; empty where it is the same for all runs of the page.
    """

    label: str
    note: str
    run: str


@dataclass(frozen=True, slots=True)
class PageClip:
    """A clip inside the page.

    Attributes:
        source: Its address.
        poster: Address of its first frame, which is seen before and without playing.
    """

    source: str
    poster: str


@dataclass(frozen=True, slots=True)
class ClipRow:
    """Clips of one caption; None where there is none."""

    prompt: str
    clips: tuple[PageClip | None, ...]


@dataclass(frozen=True, slots=True)
class ClipTable:
    """All clips of a page."""

    headings: tuple[Heading, ...]
    rows: tuple[ClipRow, ...]


@dataclass(frozen=True, slots=True)
class _Column:
    heading: Heading
    clips: dict[str, tuple[str, bytes]]

    @property
    def digest(self) -> str:
        found = hashlib.sha256()
        for prompt, (_, content) in sorted(self.clips.items()):
            found.update(f"{prompt}\n{len(content)}\n".encode())
            found.update(content)
        return found.hexdigest()


def clip_table(runs: Sequence[LabelledRun], media: Media) -> ClipTable | None:
    """Clips of all runs side by side; None where no run has any.

    A column that is the same in several runs, as clips of one teacher are, is shown once.
    """
    by_run = [_columns(run, media) for run in runs]
    # First columns first: they are the teachers'.
    ordered = [column for places in zip_longest(*by_run) for column in places if column]
    shown: dict[str, list[_Column]] = {}
    for column in ordered:
        shown.setdefault(column.digest, []).append(column)
    groups = [same for same in shown.values() if same[0].clips]
    if not groups:
        return None
    columns = [same[0] for same in groups]
    num_clips = sum(len(column.clips) for column in columns)
    allowed = int(media.left_bytes * _CLIPS_SHARE / num_clips)
    prompts = dict.fromkeys(prompt for column in columns for prompt in column.clips)
    return ClipTable(
        headings=tuple(_shared(same, len(runs)) for same in groups),
        rows=tuple(
            ClipRow(prompt, tuple(_clip(column, prompt, allowed, media) for column in columns))
            for prompt in prompts
        ),
    )


def _columns(run: LabelledRun, media: Media) -> list[_Column]:
    files = _newest_clips(run.records, media)
    if files is None:
        return []
    return [_column(run.label, files, column, media) for column in files.columns]


def _newest_clips(run: RunRecords, media: Media) -> ClipFiles | None:
    """Clips of the evaluation, or else of the last validation that has any."""
    root = run.folder.root
    sheets = [root / name for name in [_text(run.evaluation.get("sheet_png"))] if name]
    sheets += [
        run.folder.samples / name
        for line in reversed(run.validations)
        if (name := line.texts.get("sheet", ""))
    ]
    for sheet in sheets:
        folder = clips_folder(sheet)
        if not real_path(folder).is_relative_to(real_path(root)):
            media.notes.append(f"{sheet.name} points outside of the run's folder.")
            continue
        try:
            files = read_clip_files(folder)
        except DataError as error:
            media.notes.append(str(error))
            continue
        if files is not None:
            return files
    return None


def _column(label: str, files: ClipFiles, column: ClipColumn, media: Media) -> _Column:
    clips: dict[str, tuple[str, bytes]] = {}
    for prompt, name in zip(files.prompts, column.files, strict=True):
        path = file_inside(files.folder, name)
        try:
            content = b"" if path is None else path.read_bytes()
            first_frame(content)
        except (OSError, DataError):
            media.notes.append(f"{files.folder.name}/{name} is missing or is not a video.")
            continue
        clips[prompt] = (name, content)
    return _Column(Heading(column.label, column.note, label), clips)


def _shared(same: Sequence[_Column], num_runs: int) -> Heading:
    """Heading of columns that are one; a run is named where not every run has the column."""
    first = same[0].heading
    everyone = len(same) == num_runs
    names = ", ".join(column.heading.run for column in same)
    return Heading(first.label, first.note, "" if everyone else names)


def _clip(column: _Column, prompt: str, allowed_bytes: int, media: Media) -> PageClip | None:
    if prompt not in column.clips:
        return None
    name, content = column.clips[prompt]
    try:
        for width_px, crf in _SMALLER:
            if len(content) > allowed_bytes:
                content = shrink_video(content, width_px, crf)
    except DataError as error:
        media.notes.append(f"{name} is left out: {error.found}.")
        return None
    source = media.put(name, content)
    return PageClip(source, media.put("poster.jpg", _poster(content))) if source else None


def _poster(video: bytes) -> bytes:
    """The first frame, small, as JPEG: a phone that saves power shows it until it is asked."""
    image = Image.fromarray(first_frame(video))
    image.thumbnail((_POSTER_PX, _POSTER_PX))
    buffer = BytesIO()
    image.save(buffer, format="JPEG", quality=80)
    return buffer.getvalue()


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""
