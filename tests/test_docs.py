"""The documentation: generated pages are those of the code, and the site has no broken link."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipelines.config.digest import MAY_CHANGE
from pipelines.config.recipe import DistillConfig
from pipelines.config.settings_check import known_keys
from pipelines.pretraining.config import PretrainConfig
from tests.helpers.forked_python import forked_python

ROOT = Path(__file__).parents[1]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(
        arguments, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
def test_generated_pages_are_those_of_the_code():
    done = run(forked_python(), "docs/make_reference.py", "--check")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_site_builds_without_a_broken_link(tmp_path):
    done = run(sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "reference" / "python" / "index.html").read_text().count("SgmdObjective")


def test_every_page_has_a_place_in_the_navigation():
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    pages = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert pages == set(_leaves(config["nav"]))


def _leaves(nav):
    for entry in nav if isinstance(nav, list) else nav.values():
        if isinstance(entry, str):
            yield entry
        else:
            yield from _leaves(entry)


def test_recipe_keys_that_pages_name_exist():
    keys = [*known_keys(DistillConfig), *known_keys(PretrainConfig)]
    parts = {".".join(key.split(".")[:end]) for key in keys for end in range(1, key.count(".") + 2)}
    sections = {key.partition(".")[0] for key in keys if "." in key}
    named = re.compile(r"`([a-z_0-9]+(?:\.[a-z_0-9]+)+)(?:[=:] ?[^`]*)?`")
    files = (".json", ".jsonl", ".yaml", ".py", ".csv")
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    found = [
        (page.name, key)
        for page in pages
        for key in named.findall(page.read_text(encoding="utf-8"))
        if key.partition(".")[0] in sections and not key.endswith(files)
    ]
    assert len(found) > 50
    assert [(page, key) for page, key in found if key not in parts] == []


def test_the_page_on_resuming_lists_the_keys_that_may_differ():
    page = (ROOT / "docs" / "runs.md").read_text(encoding="utf-8")
    (listed,) = re.findall(r"^Keys that may differ: (.*?)\. ", page, re.MULTILINE)
    assert re.findall(r"`([^`]+)`", listed) == list(MAY_CHANGE)
