"""Reads, checks and encodes one clip in a worker of `sgmd prepare`."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, cast

import aiohttp

from cluster.paths import kind_of_path
from cluster.s3.settings import S3Settings
from pipelines.data.clips.clip_decoding import read_facts, read_first_frame, read_look
from pipelines.data.clips.clip_errors import ClipError
from pipelines.data.clips.clip_format import ClipFormat, ClipLimits
from pipelines.data.clips.transcoding import transcode
from pipelines.data.making.caption_choice import CaptionChoice
from pipelines.data.making.manifest_rows import fault_of_text, object_of_pairs
from pipelines.data.making.several_captions import (
    choose_caption,
    list_fault,
    one_clip_a_caption,
)
from pipelines.data.making.source_clip import CaptionFile, FileRange, SourceClip
from pipelines.data.making.unserved import unserved
from pipelines.data.shards.caption_rule import caption_fault
from pipelines.data.shards.columns import competing_captions
from pipelines.data.shards.filesystem import data_errors, open_folder
from pipelines.data.shards.rejection import Reason, Rejection
from sgmd_core.errors import DataError

_MAX_CAPTION_FILE_BYTES = 2**20
_GONE = (404, 410)
_SHOWN_CHARS = 200


@dataclass(frozen=True, slots=True)
class ClipRules:
    """Requirements of a clip, and its format in the set.

    Attributes:
        wanted: The format to encode it in; the bytes stay as they are where it asks for nothing.
        crf: Constant rate factor of that encoding.
        whole: Decode every frame of bytes that stay as they are, or only the first one.
        max_caption_chars: A longer caption is bad.
        max_clip_bytes: A larger file is bad.
        limits: What a video may ask for.
        captions: Which captions are taken of a clip that has several.
        seed: Fixes the random choice of a caption; of no other use.
    """

    wanted: ClipFormat = field(default_factory=ClipFormat)
    crf: int = 18
    whole: bool = True
    max_caption_chars: int = 4096
    max_clip_bytes: int = 512 * 2**20
    limits: ClipLimits = field(default_factory=ClipLimits)
    captions: CaptionChoice = CaptionChoice.FIRST
    seed: int = 0


@dataclass(frozen=True, slots=True)
class PreparedClip:
    """A row of a shard; `video` and `fps` are None in a set of captions.

    `look` names what changes the look of the pictures, see `look_of`; `num_left_out` counts the
    clip's captions besides `caption`; `file` is where the video was read.
    """

    sample_id: str
    caption: str
    video: bytes | None = None
    fps: float | None = None
    look: tuple[str, ...] = ()
    num_left_out: int = 0
    file: FileRange | None = None


class _BadClip(Exception):
    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def rejects(self, clip: SourceClip) -> Rejection:
        return Rejection(clip.sample_id, clip.source, clip.row, self.reason, self.detail)


class _UnservedFile(_BadClip):
    def __init__(self, file: FileRange, error: DataError) -> None:
        super().__init__(Reason.UNSERVED, error.found)
        self.file = file
        self.error = error

    def rejects(self, clip: SourceClip) -> Rejection:
        return unserved(clip.sample_id, clip.source, clip.row, self.file, self.error)


def prepare_clip(
    clip: SourceClip | Rejection, rules: ClipRules, s3: S3Settings = S3Settings()
) -> PreparedClip | Rejection:
    """Reads one clip and checks it; what was rejected before passes through.

    Returns:
        The clip, or why it is not taken; `Unserved` where the storage may be what fails.
    """
    if isinstance(clip, Rejection):
        return clip
    try:
        caption, num_left_out = _caption(clip, rules, s3)
        if clip.video is None:
            return PreparedClip(clip.sample_id, caption, num_left_out=num_left_out)
        data = _read(clip.video, rules.max_clip_bytes, Reason.MISSING_VIDEO, s3)
        if not rules.wanted.keeps_everything:
            look = read_look(data, rules.limits)
            video, fps = transcode(data, rules.wanted, crf=rules.crf, limits=rules.limits)
        else:
            video = data
            facts = (read_facts if rules.whole else read_first_frame)(data, rules.limits)
            fps, look = facts.fps, facts.look
    except _BadClip as bad:
        return bad.rejects(clip)
    except ClipError as error:
        return Rejection(clip.sample_id, clip.source, clip.row, error.fault, error.in_short)
    return PreparedClip(clip.sample_id, caption, video, fps, look, num_left_out, clip.video)


def clips_of_captions(
    clip: SourceClip, s3: S3Settings = S3Settings()
) -> Iterator[SourceClip | Rejection]:
    """Makes a clip of each caption of a clip, see `one_clip_a_caption`; reads its JSON file."""
    captions = clip.caption
    if isinstance(captions, CaptionFile) and captions.json_fields:
        try:
            captions = _captions_in(captions, s3)
        except _BadClip as bad:
            yield bad.rejects(clip)
            return
    if isinstance(captions, tuple) and captions:
        yield from one_clip_a_caption(clip, captions)
    elif captions is None or isinstance(captions, tuple):
        yield replace(clip, caption=None)
    else:
        yield replace(clip, sample_id=f"{clip.sample_id}#0", caption=captions)


def _caption(clip: SourceClip, rules: ClipRules, s3: S3Settings) -> tuple[str, int]:
    """The clip's caption, and the number of those left out."""
    if clip.caption is None:
        raise _BadClip(Reason.MISSING_CAPTION, "there is none")
    captions = clip.caption
    if isinstance(captions, CaptionFile):
        captions = _captions_in(captions, s3)
    if isinstance(captions, tuple):
        found = choose_caption(
            captions, rules.captions, rules.seed, clip.sample_id, rules.max_caption_chars
        )
        if not isinstance(found, str):
            raise _BadClip(*found)
        return found.strip(), len(captions) - 1
    fault = caption_fault(captions, rules.max_caption_chars)
    if fault is not None:
        raise _BadClip(*fault)
    return captions.strip(), 0


def caption_field(place: CaptionFile, s3: S3Settings = S3Settings()) -> str:
    """The only field of a JSON file that may hold the caption; empty where there is no such one."""
    try:
        content = _json_in(_read(place.file, _MAX_CAPTION_FILE_BYTES, Reason.MISSING_CAPTION, s3))
        return _field_in(content, place) if isinstance(content, dict) else ""
    except (_BadClip, ValueError, TypeError, RecursionError):
        # Whoever takes the clip reads the file again, and says what is wrong with it.
        return ""


def _json_in(data: bytes) -> Any:  # noqa: ANN401 - JSON can be anything
    return json.loads(data.decode("utf-8-sig"), object_pairs_hook=object_of_pairs)


def _captions_in(place: CaptionFile, s3: S3Settings) -> str | tuple[object, ...]:
    """The text of a file; the captions that its field holds, where it is JSON."""
    data = _read(place.file, _MAX_CAPTION_FILE_BYTES, Reason.MISSING_CAPTION, s3)
    try:
        if not place.json_fields:
            return data.decode("utf-8-sig")
        content = _json_in(data)
        captions = content if isinstance(content, list) else _caption_in(content, place)
        is_list = isinstance(captions, list)
        fault = list_fault(captions) if is_list else fault_of_text(captions)
        if fault is not None:
            raise TypeError(fault)
        return tuple(captions) if is_list else captions
    except (ValueError, TypeError, RecursionError) as error:
        raise _BadClip(Reason.UNREADABLE_CAPTION, f"{place.file.url}: {_words(error)}") from error


def _words(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"no UTF-8: byte {error.start} is {error.object[error.start]:#04x}"
    if isinstance(error, RecursionError):
        return "no JSON: nested too deeply"
    return str(error) if isinstance(error, TypeError) else f"no JSON: {error}"


def _caption_in(content: Any, place: CaptionFile) -> Any:  # noqa: ANN401 - JSON can be anything
    """The caption in a JSON object.

    Raises:
        TypeError: It is not an object, or `_field_in` finds none.
    """
    if not isinstance(content, dict):
        raise TypeError(f"a JSON {type(content).__name__}, not an object or a list")
    return content[_field_in(content, place)]


def _field_in(content: dict[str, Any], place: CaptionFile) -> str:
    """Name of the caption in a JSON object.

    Raises:
        TypeError: There is none, or more than one may be it; names the fields that there are.
    """
    names, usual = [*content], place.json_fields
    fields = competing_captions(names) if len(usual) > 1 else [n for n in usual if n in content]
    if len(fields) != 1:
        found = ", ".join(names)[:_SHOWN_CHARS] or "none"
        wrong = f"no field {' or '.join(usual)}" if not fields else "several fields may be it"
        raise TypeError(f"{wrong}, of the fields {found}; see --caption-column")
    return fields[0]


def _read(place: FileRange, max_bytes: int, missing: Reason, s3: S3Settings) -> bytes:
    """The bytes of a file, of which at most one more than allowed is fetched."""
    if place.num_bytes is not None and place.num_bytes > max_bytes:
        raise _BadClip(Reason.TOO_LARGE, f"{place.num_bytes} bytes; at most {max_bytes}")
    wanted = max_bytes + 1 if place.num_bytes is None else place.num_bytes
    try:
        path = place.url.removeprefix("file://")
        kind = "" if "://" in path else kind_of_path(path)
        if kind not in ("", "a file"):
            # A pipe would be waited for, and a device has no end.
            raise _BadClip(missing, f"{place.url} is {kind}, not a file")
        filesystem, path = open_folder(place.url, s3, probe=False, from_web=True)
        with data_errors(f"reading {place.url}"), filesystem.open(path, "rb") as file:
            file.seek(place.offset)
            data = cast("bytes", file.read(wanted))
    except DataError as error:
        if _says_missing(error):
            raise _BadClip(missing, f"no file {place.url}") from error
        if error.__cause__ is None:  # The address is wrong, and no storage was asked.
            raise _BadClip(missing, f"{place.url}: {error.found}") from error
        raise _UnservedFile(place, error) from error
    if len(data) > max_bytes:
        raise _BadClip(Reason.TOO_LARGE, f"more than {max_bytes} bytes")
    if place.num_bytes is not None and len(data) < place.num_bytes:
        raise _BadClip(Reason.CUT_SHORT, f"{len(data)} of {place.num_bytes} bytes are there")
    return data


def _says_missing(error: DataError) -> bool:
    """Returns True if the storage says that there is no such file."""
    cause = error.__cause__
    if not isinstance(cause, FileNotFoundError | IsADirectoryError):
        return False
    # fsspec's HTTP file system raises FileNotFoundError for whatever went wrong.
    behind = cause.__cause__
    if isinstance(behind, aiohttp.ClientResponseError):
        return behind.status in _GONE
    return not isinstance(behind, aiohttp.ClientError | TimeoutError)
