"""A damaged file of prompts gives captions, each a text, or is refused in words."""

import csv
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.data.making.caption_file import read_prompts
from pipelines.data.shards.filesystem import S3Settings
from pipelines.data.stream.inspect import first_captions
from sgmd_core.errors import SgmdError
from tests.fuzz.mutations import NUM_CASES, mutate_bytes, mutate_json, time_limit

CAPTIONS = [f"a {colour} circle, ünïcode “{colour}”" for colour in ("red", "green", "blue")]


def file_of(suffix: str) -> bytes:
    """The captions as a file of a kind."""
    rows = [{"id": str(number), "caption": text} for number, text in enumerate(CAPTIONS)]
    if suffix == ".txt":
        return "\n".join(CAPTIONS).encode()
    if suffix == ".json":
        return json.dumps(rows).encode()
    if suffix == ".jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    if suffix == ".parquet":
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), buffer)
        return buffer.getvalue()
    table = io.StringIO()
    writer = csv.DictWriter(table, ("id", "caption"), delimiter="\t" if suffix == ".tsv" else ",")
    writer.writeheader()
    writer.writerows(rows)
    return table.getvalue().encode()


@pytest.mark.parametrize("suffix", [".txt", ".csv", ".tsv", ".json", ".jsonl", ".parquet"])
def test_a_damaged_file_of_prompts_is_read_or_refused_in_words(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path, whole = tmp_path / f"prompts{suffix}", file_of(suffix)
    path.write_bytes(whole)
    assert read_prompts(str(path)) == CAPTIONS
    assert sorted(first_captions(str(path), S3Settings(), 0, 3)) == sorted(CAPTIONS)
    change = mutate_json if suffix.startswith(".json") else mutate_bytes
    differs = False
    for seed in range(max(1, NUM_CASES // 2)):
        path.write_bytes(change(whole, seed))
        for read in (
            lambda: read_prompts(str(path)),
            lambda: first_captions(str(path), S3Settings(), 0, 3),
        ):
            with time_limit():
                try:
                    found = list(read())
                except SgmdError:
                    differs = True
                    continue
            assert found, seed
            assert all(isinstance(each, str) and each.strip() for each in found), seed
            for each in found:
                each.encode()
            differs |= found != CAPTIONS
    assert differs
