"""A damaged list of prompts is read, or refused in words."""

import csv
import io
import json
from pathlib import Path

import pytest

from pipelines.data.making.caption_file import read_prompts
from sgmd_core.errors import DataError
from tests.fuzz.mutations import NUM_CASES, mutate_bytes, mutate_text, time_limit

CAPTIONS = ["a red circle", 'a "green", square\nturns', "ein gelber Käfer \U0001f600"]


def _table(delimiter: str) -> str:
    text = io.StringIO()
    rows = csv.writer(text, delimiter=delimiter)
    rows.writerows([["sample_id", "caption"], *((str(i), c) for i, c in enumerate(CAPTIONS))])
    return text.getvalue()


LISTS = {
    "txt": "\n".join(caption.replace("\n", " ") for caption in CAPTIONS),
    "csv": _table(","),
    "tsv": _table("\t"),
    "json": json.dumps([{"prompt": caption} for caption in CAPTIONS]),
    "jsonl": "".join(json.dumps({"text": caption}) + "\n" for caption in CAPTIONS),
}


@pytest.mark.parametrize("kind", LISTS)
def test_a_damaged_list_of_prompts_is_read_or_refused_in_words(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path, read, refusals = tmp_path / f"prompts.{kind}", 0, list[str]()
    path.write_text(LISTS[kind], encoding="utf-8")
    assert len(read_prompts(str(path))) == len(CAPTIONS)
    for seed in range(NUM_CASES):
        data = mutate_text(LISTS[kind], seed).encode("utf-8", "surrogatepass")
        path.write_bytes(mutate_bytes(data, seed) if seed % 2 else data)
        with time_limit():
            try:
                prompts = read_prompts(str(path))
            except DataError as error:
                refusals.append(str(error))
                continue
        read += 1
        assert all(isinstance(prompt, str) for prompt in prompts), seed
    assert read
    assert all(len(words) < 20_000 for words in refusals)
