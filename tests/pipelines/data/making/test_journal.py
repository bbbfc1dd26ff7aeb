"""What a disk has broken in a half-made set is made again, and nothing is there twice."""

import pytest

from pipelines.data.making.prepare import PrepareOptions, prepare
from sgmd_core.errors import DataError
from tests.helpers.logs import record_warnings
from tests.helpers.video_files import grey_frames, video_file
from tests.pipelines.data.making.test_prepare import rows, write_clip


class StopError(Exception):
    """Ends a command in the middle."""


@pytest.mark.parametrize("broken", [b"", b"\0\0", b'{"shard": ', b"{}", b"[]", b'{"shard": 3}'])
def test_a_part_whose_entry_is_broken_is_made_again(tmp_path, broken, monkeypatch):
    source, target = tmp_path / "source", tmp_path / "set"
    for number in range(4):
        write_clip(source, f"{number}.mp4", video_file(grey_frames([number])), f"clip {number}")
    options = PrepareOptions(num_processes=0, shard_clips=1)

    def stop(progress):
        if progress.num_shards == 3:
            raise StopError

    with pytest.raises(StopError):
        prepare(str(source), str(target), options, stop)
    (target / "_progress" / "part-00001.json").write_bytes(broken)
    warnings = record_warnings("pipelines.data.making.journal", monkeypatch)
    assert prepare(str(source), str(target), options).num_clips == 4
    assert len(warnings) == 1
    assert "part-00001.json is broken" in warnings[0]
    found = [row["caption"] for row in rows(target)]
    assert sorted(found) == [f"clip {number}" for number in range(4)]
    # A reader without the index finds the same.
    assert len(list(target.glob("part-*.parquet"))) == 4


def test_settings_that_cannot_be_read_are_an_error_with_a_remedy(tmp_path):
    source, target = tmp_path / "source", tmp_path / "set"
    write_clip(source, "0.mp4", video_file(grey_frames([1])), "a clip")
    options = PrepareOptions(num_processes=0)
    prepare(str(source), str(target), options)
    (target / "_prepare.json").write_text("{")
    with pytest.raises(DataError, match=r"_prepare\.json is broken .*Choose another folder"):
        prepare(str(source), str(target), options)
