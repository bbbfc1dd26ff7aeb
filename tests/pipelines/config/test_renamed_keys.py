"""Recipes that were written for an earlier version go on working, and say what to change."""

import pytest

from pipelines.config.recipe import DistillConfig, load_recipe
from pipelines.config.recipe_files import find_recipe
from pipelines.config.renamed_keys import RENAMED_KEYS, with_current_keys
from pipelines.config.settings_check import known_keys
from sgmd_core.errors import ConfigError
from tests.helpers.logs import record_warnings

MODULE = "pipelines.config.renamed_keys"


def test_every_old_name_leads_to_a_setting_that_there_is():
    known = known_keys(DistillConfig)
    assert RENAMED_KEYS
    for old, new in RENAMED_KEYS.items():
        assert new in known
        assert old not in known
        assert old.rpartition(".")[0] == new.rpartition(".")[0]


def test_an_old_key_in_a_file_is_taken_with_a_warning(tmp_path, monkeypatch):
    warnings = record_warnings(MODULE, monkeypatch)
    text = find_recipe("tiny").read_text()
    assert "  depth: " in text
    (tmp_path / "old.yaml").write_text(text.replace("  depth: 2", "  window: 5"))
    assert load_recipe(str(tmp_path / "old.yaml")).topology.depth == 5
    given = {"topology": {"window": 5, "mode": "local"}, "name": "a"}
    assert with_current_keys(given) == {"topology": {"depth": 5, "mode": "local"}, "name": "a"}
    assert given["topology"] == {"window": 5, "mode": "local"}
    assert warnings == ["topology.window is now called topology.depth: write that"] * 2


def test_an_old_key_beside_the_recipe_is_taken_with_a_warning(monkeypatch):
    warnings = record_warnings(MODULE, monkeypatch)
    assert load_recipe("tiny", ["topology.window=7"]).topology.depth == 7
    assert load_recipe("tiny").with_settings({"topology.window": 4}).topology.depth == 4
    assert warnings == ["topology.window is now called topology.depth: write that"] * 2


def test_both_names_of_a_setting_are_refused():
    with pytest.raises(ConfigError, match=r"topology\.window and topology\.depth"):
        with_current_keys({"topology": {"window": 5, "depth": 5}})


@pytest.mark.parametrize("odd", [{}, {"topology": None}, {"topology": [1]}, {"topology": {}}])
def test_sections_that_are_none_are_left_to_the_check_of_types(odd):
    assert with_current_keys(odd) == odd
