"""Prompts that show nothing, or are no text, are refused before anything is sampled."""

from pathlib import Path

import pytest

from pipelines.generate import SamplingOptions, generate
from sgmd_core.errors import ConfigError
from tests.helpers.tiny_wan import write_tiny_wan


def test_prompts_of_nothing_that_is_seen_and_of_no_text_are_refused(tmp_path: Path):
    model = write_tiny_wan(tmp_path / "wan", ["a", "red", "circle"])
    for prompt, words in (
        ("\u200b\0", "none of them empty"),
        (" \u3000", "none of them empty"),
        ("a\udcff", r"no UTF-8: a\\udcff"),
    ):
        with pytest.raises(ConfigError, match=words):
            generate(model, ["a red circle", prompt], output=tmp_path / "clips")
    options = SamplingOptions(negative_prompt="\ud800")
    with pytest.raises(ConfigError, match=r"no UTF-8: \\ud800"):
        generate(model, ["a red circle"], output=tmp_path / "clips", options=options)
    assert not (tmp_path / "clips").exists()
