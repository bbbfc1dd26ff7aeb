"""Sampled clips as files: one mp4 a clip, and a list of what they show.

    samples/evaluation/  clips.json  0-0.mp4  0-1.mp4 ...        column-row

All clips of one row show the same caption; how a column was sampled is in its heading.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from cluster.errors import StorageError
from cluster.files import write_whole
from cluster.paths import kind_of_path, require_file
from cluster.storage import write_json
from pipelines.media.video import Pixels, encode_for_players
from sgmd_core.errors import DataError

_LIST_FILE = "clips.json"


@dataclass(frozen=True, slots=True)
class SheetGroup:
    """One way of sampling.

    Attributes:
        label: Heading of the group, for example "teacher, 30 steps".
        note: Second line of the heading, for example "guidance 2.5".
        clips: One clip a prompt, each (frames, height, width, 3).
    """

    label: str
    note: str
    clips: Sequence[Pixels]


@dataclass(frozen=True, slots=True)
class ClipColumn:
    """One way of sampling, as files.

    Attributes:
        label: Heading, for example "teacher, 30 steps".
        note: Second line of the heading.
        files: Names of the mp4 files beside the list, one a prompt.
    """

    label: str
    note: str
    files: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ClipFiles:
    """Content of clips.json.

    Attributes:
        folder: Where the files are.
        prompts: One a row.
        columns: Ways of sampling, left to right.
    """

    folder: Path
    prompts: tuple[str, ...]
    columns: tuple[ClipColumn, ...]


def clips_folder(sheet: Path) -> Path:
    """Returns the folder of a contact sheet's clips: samples/a.png has them in samples/a/."""
    return sheet.with_suffix("")


def write_clip_files(
    folder: Path, groups: Sequence[SheetGroup], prompts: Sequence[str], fps: int
) -> None:
    """Writes every clip as an mp4 that browsers play, and then the list of them.

    Args:
        folder: Made where it is not there yet.
        groups: Ways of sampling; each has one clip a prompt.
        prompts: One a row.
        fps: Frames a second.
    """
    folder.mkdir(parents=True, exist_ok=True)
    columns: list[ClipColumn] = []
    for column, group in enumerate(groups):
        names = tuple(f"{column}-{row}.mp4" for row in range(len(prompts)))
        for name, clip in zip(names, group.clips, strict=True):
            write_whole(folder / name, encode_for_players(clip, fps))
        columns.append(ClipColumn(group.label, group.note, names))
    content = {"prompts": list(prompts), "columns": [asdict(column) for column in columns]}
    write_json(str(folder / _LIST_FILE), content)


def read_clip_files(folder: Path) -> ClipFiles | None:
    """Reads the list of the clips in a folder; None where no clips were written.

    Raises:
        DataError: There is a list, and it is not what `write_clip_files` writes.
    """
    path = folder / _LIST_FILE
    if not kind_of_path(path):
        return None
    try:
        require_file(path)
        content = json.loads(path.read_text(encoding="utf-8"))
        prompts = tuple(str(prompt) for prompt in content["prompts"])
        columns = tuple(
            ClipColumn(str(entry["label"]), str(entry["note"]), tuple(map(str, entry["files"])))
            for entry in content["columns"]
        )
    except (StorageError, OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"reading {path}", f"no list of clips ({error})", "what a contact sheet writes"
        ) from error
    if any(len(column.files) != len(prompts) for column in columns):
        raise DataError(
            f"reading {path}",
            f"columns of {[len(column.files) for column in columns]} clips",
            f"one clip for each of the {len(prompts)} prompts",
        )
    return ClipFiles(folder, prompts, columns)
