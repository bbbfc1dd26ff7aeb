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


def test_a_table_without_an_end_on_the_page_is_refused():
    (table,) = planning.work()
    begin, own, rest = PAGE.partition(table.markdown())
    end = "<!-- end of table -->"
    assert own
    assert rest.count(end) > 1
    for without in (rest.replace(end, "", 1), rest.replace(end, "")):
        with pytest.raises(AssertionError, match="the table work has no end on the page"):
            table.placed_in(begin + own + without)


@pytest.mark.parametrize("other", [["--measured", "gpu.json"], ["--gpu-memory", "40"]])
def test_the_page_takes_no_tables_of_other_times_or_gpus(other, capsys):
    with pytest.raises(SystemExit):
        planning.main(["--only", "work", "--write-docs", *other])
    assert "--write-docs goes without --measured and --gpu-memory" in capsys.readouterr().err
    assert planning.PAGE.read_text(encoding="utf-8") == PAGE


@pytest.mark.slow
@pytest.mark.parametrize("part", planning.PARTS)
def test_the_page_says_what_the_planner_finds(part, monkeypatch):
    # All eight numbers of GPUs take sixteen seconds of a core; the rows are made one by one.
    monkeypatch.setattr(planning, "NUM_GPUS", (8, 64))
    for table in planning.PARTS[part]():
        head, line, *rows = table.markdown().splitlines()
        assert f"{head}\n{line}\n" in PAGE
        assert rows
        for row in rows:
            assert f"\n{row}\n" in PAGE
