"""Files of a source that are not part of any clip: counted by kind, each kind with an example.

A rejection is a clip that could not be taken; what is counted here was never a clip.
"""

from collections.abc import Sequence
from dataclasses import dataclass

_MOST_KINDS = 20

LINKED_FOLDERS = (
    "links to folders, which are not followed (prepare the folder that a link leads to)"
)
LONELY_CAPTIONS = "caption files without a video of the same name up to the last dot"
MANIFESTS = "manifests beside other files, which are not read (name the manifest itself as SRC)"
HIDDEN = "hidden files and folders, whose names begin with a dot"
FOREIGN_CAPTIONS = "caption files of joined tars in which another video has the same name"
TAR_LINKS = "members of tars that are not files and name no clip"
TWO_CAPTIONS = "clips with several caption files, of which the first named is used"
SHARED_CAPTIONS = "caption files that several videos of the same name share"
EQUAL_CAPTIONS = "rows that repeat a video and its caption, each pair of which is taken once"
ARCHIVES = "archives that are not read (unpack them)"
OTHER_KINDS = "files of further unknown kinds"


def unknown_kind(suffix: str) -> str:
    """The kind of files with a suffix that means nothing here."""
    return f"files of an unknown kind, {suffix or 'without a suffix'}"


@dataclass(frozen=True, slots=True)
class SkippedKind:
    """Files that are left out for one reason.

    Attributes:
        what: The kind, in words.
        count: How many.
        example: The first of them.
    """

    what: str
    count: int
    example: str

    def in_words(self) -> str:
        """Kind of file, number and an example: `links to folders: 2, such as a/b`."""
        return f"{self.what}: {self.count}, such as {self.example}"


class SkippedFiles:
    """Counts files that are left out."""

    def __init__(self) -> None:
        self._kinds: dict[str, SkippedKind] = {}

    def add(self, what: str, example: str) -> None:
        """Counts a file of a kind; the first one of a kind is its example."""
        if what not in self._kinds and len(self._kinds) >= _MOST_KINDS:
            what = OTHER_KINDS
        known = self._kinds.get(what)
        if known is None:
            self._kinds[what] = SkippedKind(what, 1, example)
        else:
            self._kinds[what] = SkippedKind(what, known.count + 1, known.example)

    @property
    def kinds(self) -> Sequence[SkippedKind]:
        """All kinds, in the order in which they were met."""
        return tuple(self._kinds.values())
