"""The tables of docs/planning.md: those that `benchmarks/planning.py` makes."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import planning

PAGE = planning.PAGE.read_text(encoding="utf-8")


def test_a_table_stands_between_its_marks_and_nowhere_else():
    (table,) = planning.work()
    assert table.placed_in(PAGE) == PAGE
    changed = planning.PageTable("work", [{"a": 1, "b": "x"}], None)
    page = changed.placed_in(PAGE)
    assert "| a | b |\n|---|---|\n| 1 | x |" in page
    assert page.count("\n|") < PAGE.count("\n|")
    assert (
        page.partition("<!-- table: layouts -->")[2]
        == (PAGE.partition("<!-- table: layouts -->")[2])
    )
    assert table.placed_in(page) == PAGE


@pytest.mark.slow
@pytest.mark.parametrize("part", planning.PARTS)
def test_the_page_says_what_the_planner_finds(part):
    for table in planning.PARTS[part]():
        assert table.markdown() in PAGE
