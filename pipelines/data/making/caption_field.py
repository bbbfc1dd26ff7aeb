"""One field for the captions of a source's JSON files, as a table has one column for them.

clip.json files, in order -> the first that has one usual name settles it -> the same for all
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace

from cluster.s3.settings import S3Settings
from pipelines.data.making.prepare_clip import caption_field
from pipelines.data.making.source_clip import CaptionFile, SourceClip
from pipelines.data.shards.rejection import Rejection
from pipelines.data.shards.schema import CAPTION

# They are read one after the other; of files that hold lists, none has a field.
_SETTLING_FILES = 64


class CaptionField:
    """The field of the JSON files beside videos that holds their captions.

    Args:
        s3: How to speak to the server of the files, where there is one.

    Attributes:
        name: The field; empty until a file has settled it.
    """

    def __init__(self, s3: S3Settings = S3Settings()) -> None:
        self.name = ""
        self._s3 = s3
        self._num_left = _SETTLING_FILES

    def settle(self, clips: Iterable[SourceClip | Rejection]) -> Iterator[SourceClip | Rejection]:
        """The clips, whose JSON files have one field to be read once it is settled.

        A file before that is read by the rule that settles it. Where none of the first ones
        settles it, our own name does. A name that the caller gives stays.
        """
        for clip in clips:
            place = clip.caption if isinstance(clip, SourceClip) else None
            if not isinstance(place, CaptionFile) or len(place.json_fields) < 2:
                yield clip
                continue
            if not self.name and self._num_left:
                self._num_left -= 1
                self.name = caption_field(place, self._s3)
            if field := self.name or (CAPTION if not self._num_left else ""):
                place = replace(place, json_fields=(field,))
            yield replace(clip, caption=place)
