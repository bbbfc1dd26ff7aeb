"""Objects of a source that cannot be read: one bad clip, or storage that fails as a whole.

read fails -> Unserved -> can others of its server be read? -> yes: one Rejection
-> no: the error is raised
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from cluster.s3.settings import S3Settings
from pipelines.data.making.prepare_clip import PreparedClip
from pipelines.data.making.source_clip import FileRange, SourceClip
from pipelines.data.making.unserved import Unserved
from pipelines.data.shards.filesystem import open_folder
from pipelines.data.shards.reading import NUM_WITNESSES, Range, serves_one_of
from pipelines.data.shards.rejection import Rejection
from sgmd_core.errors import DataError

Listed = SourceClip | Rejection


class Listing(Iterator[Listed]):
    """The clips of a source, of which some can be seen before they are taken.

    Args:
        clips: All of them.
    """

    def __init__(self, clips: Iterable[Listed]) -> None:
        self._clips = iter(clips)
        self._ahead: deque[Listed] = deque()
        self._recent: deque[Listed] = deque(maxlen=NUM_WITNESSES)

    def __next__(self) -> Listed:
        clip = self._ahead.popleft() if self._ahead else next(self._clips)
        self._recent.append(clip)
        return clip

    def nearby(self) -> Iterator[Listed]:
        """Yields the clips taken last and then those that come next, which stay to be taken."""
        yield from tuple(self._recent)
        for place in range(NUM_WITNESSES):
            if place == len(self._ahead):
                clip = next(self._clips, None)
                if clip is None:
                    return
                self._ahead.append(clip)
            yield self._ahead[place]


@dataclass(slots=True)
class Witnesses:
    """Decides whether an object alone is not served.

    Attributes:
        listing: Clips of the source, whose videos are asked for where none was read yet.
        s3: How patiently the server is asked.
    """

    listing: Listing
    s3: S3Settings
    _read: dict[str, FileRange] = field(default_factory=dict)

    def settle(self, outcome: PreparedClip | Rejection) -> PreparedClip | Rejection:
        """Makes a plain rejection of a clip that cannot be read while others can.

        Raises:
            DataError: No other object of its server can be read either, or there is none.
        """
        if isinstance(outcome, PreparedClip) and outcome.file is not None:
            self._read[_server_of(outcome.file)] = outcome.file
        if not isinstance(outcome, Unserved):
            return outcome
        if not self._serves_others(outcome.file):
            raise outcome.error
        return Rejection(
            outcome.sample_id,
            outcome.source,
            outcome.row,
            outcome.reason,
            f"cannot be read, while other files can: {outcome.error.found}",
        )

    def _serves_others(self, bad: FileRange) -> bool:
        read = self._read.get(_server_of(bad))
        others = [read] if read is not None and read != bad else self._others(bad)
        try:
            opened = partial(open_folder, s3=self.s3, probe=False, from_web=True)
            filesystem, _ = opened(bad.url)
            paths = [(opened(one.url)[1], one.offset) for one in others]
        except DataError:  # The address itself is wrong, and stands in the error of the clip.
            return False
        ranges = [Range(path, offset, offset + 1) for path, offset in paths]
        return serves_one_of(filesystem, ranges, self.s3)

    def _others(self, bad: FileRange) -> Sequence[FileRange]:
        videos = (clip.video for clip in self.listing.nearby() if isinstance(clip, SourceClip))
        server = _server_of(bad)
        # A tar is one object: whether it can be read, its other members tell as well.
        found = dict.fromkeys(one for one in videos if one and one != bad)
        return [one for one in found if _server_of(one) == server][:NUM_WITNESSES]


def _server_of(file: FileRange) -> str:
    """Protocol and bucket of an address; empty for local files."""
    protocol, separator, path = file.url.partition("://")
    return f"{protocol}://{path.partition('/')[0]}" if separator else ""
