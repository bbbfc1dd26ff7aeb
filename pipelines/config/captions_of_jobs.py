"""Files of captions that went along with a job, kept with its run: the package is deleted with it.

in the job          submitted/data.train/prompts.txt       -> a copy in the folder of the run
anywhere else       RUN/submitted/data.train/prompts.txt   is what RUN/config.yaml means by it

A sweep keeps them likewise, and its trials and best.yaml name its copies.
"""

from collections.abc import Callable, Iterator, Mapping
from filecmp import cmp
from pathlib import Path, PurePosixPath
from typing import Any

from cluster.files import write_whole
from pipelines.config.caption_sets import DataSettings
from pipelines.data.making.caption_file import JOB_FOLDER
from sgmd_core.errors import ConfigError

MAX_CAPTION_BYTES = 32 * 2**20
"""Size of a file of captions that goes along with a job, at most."""


def keep_captions(data: DataSettings, run: Path) -> None:
    """Copy the files of captions that went along with a job into the folder of its run.

    Args:
        data: Settings of the run's captions.
        run: Its folder.
    """
    for url in _that_went_along(data):
        file = Path(url)
        if file.is_file() and file.stat().st_size <= MAX_CAPTION_BYTES:
            write_whole(run / url, Path(url).read_bytes())


def require_kept_captions(data: DataSettings, run: Path, place: str) -> None:
    """Checks that files that went along with a job are those that its sweep has kept.

    Args:
        data: Settings of the captions, as this job has them.
        run: The folder in which they were kept.
        place: Path or address by which others find it.

    Raises:
        ConfigError: A file of this job has other captions than the copy of its name.
    """
    for url in _that_went_along(data):
        here, kept = Path(url), run / url
        if here.is_file() and kept.is_file() and not cmp(here, kept, shallow=False):
            raise ConfigError(
                f"going on in {place}",
                f"other captions in {url} than when it began",
                f"those that it has kept in {place}/{url}",
                "Submit that file, or begin a new one with name=...",
            )


def kept_captions(data: DataSettings, run: Path, place: str) -> dict[str, Any]:
    """Settings that name the copies of such files that a run or a sweep has kept.

    Args:
        data: Settings of the captions.
        run: The folder in which they were kept.
        place: Path or address by which others find it.
    """

    def found(url: str) -> str:
        return f"{place}/{url}" if _went_along(url) and (run / url).is_file() else url

    settings: dict[str, Any] = {
        f"data.{name}": found(url)
        for name, url in (("train", data.train), ("validation", data.validation))
        if found(url) != url
    }
    sets = [
        {**one.model_dump(mode="json", exclude_defaults=True), "source": found(one.source)}
        for one in data.also
    ]
    if [one["source"] for one in sets] != [one.source for one in data.also]:
        settings["data.also"] = sets
    return settings


def with_captions_beside(settings: Mapping[str, Any], recipe: Path) -> dict[str, Any]:
    """Settings that name such files where they lie now: beside the run's own recipe.

    Args:
        settings: Content of a recipe, unchecked.
        recipe: Where it was read.
    """
    data = settings.get("data")
    if not isinstance(data, dict):
        return dict(settings)

    def found(url: object) -> object:
        if not isinstance(url, str) or not _went_along(url):
            return url
        kept, here = recipe.parent / url, Path(url)
        # Another job's package may have other captions of the same name.
        if not kept.is_file() or (here.is_file() and cmp(kept, here, shallow=False)):
            return url
        return str(kept)

    return {**settings, "data": dict(_renamed(data, found))}


def _renamed(
    data: Mapping[str, Any], found: Callable[[object], object]
) -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if key in ("train", "validation"):
            yield key, found(value)
        elif key == "also" and isinstance(value, list):
            sets = (
                {**each, "source": found(each["source"])}
                if isinstance(each, dict) and "source" in each
                else each
                for each in value
            )
            yield key, list(sets)
        else:
            yield key, value


def _that_went_along(data: DataSettings) -> list[str]:
    named = [data.train, data.validation, *(each.source for each in data.also)]
    return [url for url in dict.fromkeys(named) if _went_along(url)]


def _went_along(url: str) -> bool:
    parts = PurePosixPath(url).parts
    return parts[:1] == (JOB_FOLDER,) and ".." not in parts
