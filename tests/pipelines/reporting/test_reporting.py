"""The parts of a report: figures of any name, alarms, times, and what differs between runs."""

import json
import math
from pathlib import Path

import pytest

from pipelines.config.figures import FIGURES
from pipelines.reporting import names
from pipelines.reporting.alarms import alarm_kinds
from pipelines.reporting.checkpoints import ranked_checkpoints
from pipelines.reporting.curves import LabelledRun, training_cards
from pipelines.reporting.figures import ShownFigure, read_rows
from pipelines.reporting.headline import figure_table, ratio_plot, tiles
from pipelines.reporting.page import write_report
from pipelines.reporting.records import Line, read_run
from pipelines.reporting.settings import differing_settings, flat
from pipelines.reporting.times import critical_path, role_seconds, stage_times, utilisation
from pipelines.run.folder import append_jsonl
from pipelines.study.tables import COLUMNS
from tests.helpers.records import iteration_record
from tests.helpers.runs import finish_run, start_run, write_alarms
from workers.measures import MEASURES

INTERVAL = {
    "value": 0.9,
    "low": 0.8,
    "high": 1.0,
    "ratio": {"value": 0.75, "low": 0.7, "high": 0.8},
}


def rows_with(**generator):
    reference = {"name": "reference", "label": "teacher", "speed": 2.0, "colour": 0.5}
    own = {"name": "generator", "label": "generator, 4 steps", "num_steps": 4, **generator}
    return {"rows": [reference, own]}


class TestFigures:
    def test_a_ratio_is_taken_as_recorded_or_else_of_the_two_values(self):
        generator = read_rows(rows_with(speed=1.0, flow=INTERVAL)).generator
        assert generator.ratios["speed"] == ShownFigure(0.5)
        assert generator.ratios["flow"] == ShownFigure(0.75, low=0.7, high=0.8)

    def test_a_figure_that_the_teacher_lacks_has_no_ratio(self):
        assert "extra" not in read_rows(rows_with(extra=1.0)).generator.ratios

    def test_figures_are_found_in_groups_of_a_row(self):
        generator = read_rows(rows_with(metrics={"flow": INTERVAL, "clips": "a.png"})).generator
        assert generator.figures["flow"] == ShownFigure(0.9, low=0.8, high=1.0)
        assert "clips" not in generator.figures

    def test_facts_truths_words_and_what_is_not_finite_are_no_figures(self):
        generator = read_rows(rows_with(remembered=True, bad=math.nan, none=None)).generator
        assert dict(generator.figures) == {}
        assert generator.facts == {"num_steps": 4}

    @pytest.mark.parametrize(
        ("figure", "text", "spread"),
        [
            (ShownFigure(0.35243, error=0.116), "0.35", "± 0.12"),
            (ShownFigure(0.013493, error=0.0036), "0.013", "± 0.004"),
            (ShownFigure(0.9, low=0.81234, high=1.0), "0.9", "[0.812, 1]"),
            (ShownFigure(1.0, error=0.0), "1", ""),
            (ShownFigure(1.0, low=1.0, high=1.0), "1", ""),
            (ShownFigure(12345.6), "12,346", ""),
        ],
    )
    def test_a_figure_has_the_decimals_that_its_error_allows(self, figure, text, spread):
        assert (figure.text, figure.spread) == (text, spread)

    def test_every_recorded_figure_stands_in_the_table_with_its_interval(self, tmp_path):
        folder = start_run(tmp_path / "run", 2)
        found = rows_with(speed=1.0, metrics={"unheard_of": INTERVAL})
        (folder / "evaluation.json").write_text(json.dumps(found))
        table = figure_table([LabelledRun("run", read_run(folder))])
        (row,) = [row for row in table.rows if row.title == "unheard of"]
        own, ratio, drawn, teacher = row.cells
        assert (own.text, own.spread) == ("0.9", "[0.8, 1]")
        assert (ratio.text, ratio.spread) == ("0.75", "[0.7, 0.8]")
        assert "<svg" in drawn.plot
        assert teacher.text == ""

    def test_optical_flow_leads_where_it_was_measured_and_the_speed_where_not(self):
        speed = {"mean_speed_px_per_frame": 1.0, "speed_ratio": 0.93}
        assert [tile.big for tile in tiles(rows_with(**speed))] == ["93%"]
        (tile,) = tiles(rows_with(**speed, optical_flow=INTERVAL))
        assert (tile.big, tile.spread) == ("75%", "[70%, 80%]")

    def test_the_teacher_lies_in_the_middle_of_a_drawn_ratio(self):
        assert 'class="own" cx="55.0"' in ratio_plot(ShownFigure(1.0), None)
        assert 'class="own" cx="5.0"' in ratio_plot(ShownFigure(0.1), None)
        assert 'x1="45.0" x2="65.0"' in ratio_plot(ShownFigure(1.0, low=0.9, high=1.1), None)


class TestAlarms:
    def test_alarms_of_a_name_are_counted_together(self, tmp_path):
        folder = start_run(tmp_path / "run", 9)
        alarm = {"name": "motion_collapse", "message": "too little motion", "limit": 0.5}
        write_alarms(
            folder,
            *({**alarm, "iteration": at, "value": at / 10} for at in (2, 4, 3)),
            {"iteration": 7, "name": "other"},
        )
        first, second = alarm_kinds(read_run(folder).alarms)
        assert (first.name, first.count, first.first, first.last) == ("motion collapse", 3, 2, 4)
        assert first.found == "0.4, limit 0.5"
        assert (second.count, second.message, second.found) == (1, "", "")

    def test_alarms_are_marked_on_the_curves_of_a_single_run(self, tmp_path):
        folder = start_run(tmp_path / "run", 9)
        write_alarms(folder, {"iteration": 4, "name": "drift", "value": 2, "limit": 1})
        run = LabelledRun("a", read_run(folder))
        first, others = training_cards([run])
        assert all("drift at 4: 2, limit 1" in card.svg for card in [*first, *others])
        first, others = training_cards([run, run])
        assert not any("drift" in card.svg for card in [*first, *others])

    def test_none_raised_is_not_the_same_as_none_recorded(self, tmp_path):
        folder = start_run(tmp_path / "run", 3)
        assert "None was raised" in write_report([folder]).read_text()
        (folder / "alarms.jsonl").unlink()
        assert "Alarms" not in write_report([folder]).read_text()


class TestCheckpoints:
    @pytest.mark.slow
    def test_the_best_comes_first_with_what_was_measured_of_it(self, tmp_path):
        run = read_run(finish_run(tmp_path / "run"))
        table = ranked_checkpoints(run)
        assert (table.score, table.better, table.num_more) == ("distance", "small", 0)
        assert table.headings == ("distance", "colour right", "flow of fastest 5 % ÷ teacher's")
        assert [(row.iteration, row.is_kept) for row in table.rows] == [
            (60, True),
            (40, True),
            (20, False),
        ]
        assert table.rows[0].figures == ("0.0167", "0.9", "0.9")

    @pytest.mark.parametrize("content", ["", "{", "[]", '{"states": [3, {"iteration": 1}]}'])
    def test_a_ranking_that_is_torn_or_not_there_leaves_the_table_out(self, tmp_path, content):
        folder = start_run(tmp_path / "run", 2)
        (folder / "ranking.json").write_text(content)
        assert ranked_checkpoints(read_run(folder)) is None
        assert "Checkpoints" not in write_report([folder]).read_text()


class TestTimes:
    @pytest.fixture
    def run(self, tmp_path):
        folder = start_run(tmp_path / "run", 0)
        for iteration, busy in enumerate((1.0, 3.0, 2.0)):
            record = iteration_record(
                iteration,
                seconds={"generator.rollout": busy, "teacher.denoise": 8.0},
                seconds_total=4.0,
                data_wait_s=0.4,
                samples_seen=1,
            )
            append_jsonl(folder / "metrics.jsonl", record.to_json())
        return folder

    def test_stages_have_their_seconds_median_and_share(self, run):
        teacher, generator, data = stage_times(read_run(run))
        assert (teacher.role, teacher.stage, teacher.seconds) == ("teacher", "denoise", 24.0)
        assert (generator.median_s, generator.share) == (2.0, 0.5)
        assert data.share == pytest.approx(0.1)

    def test_a_role_waits_when_none_of_its_stages_runs(self, run):
        by_role = {used.role: used for used in utilisation(read_run(run))[0]}
        assert by_role["generator"].busy == pytest.approx(0.5)
        assert by_role["generator"].waiting == pytest.approx(0.5)

    def test_replicas_share_the_seconds_of_their_role(self, run):
        config = (run / "config.yaml").read_text()
        (run / "config.yaml").write_text(config.replace("replicas: 1", "replicas: 4"))
        by_role = {used.role: used for used in utilisation(read_run(run))[0]}
        assert by_role["teacher"].busy == pytest.approx(0.5)

    def test_recorded_utilisation_counts_before_a_derived_one(self, run):
        spent = {"busy_s": 6, "waiting_s": 3, "transferring_s": 1}
        (run / "summary.json").write_text(json.dumps({"utilisation": {"fake_score": spent}}))
        (used,), recorded = utilisation(read_run(run))
        assert recorded
        assert (used.role, used.busy, used.waiting) == ("fake score", 0.6, 0.3)
        assert used.transferring == pytest.approx(0.1)

    def test_ranks_are_shown_one_by_one_and_the_critical_path_by_its_shares(self, run):
        spent = {"busy_s": 3, "waiting_s": 1, "transferring_s": 0}
        content = {
            "utilisation": {"generator[0]": spent, "generator[1]": spent},
            "critical_path_s": {"between calls": 1.0, "fake_score.signal": 3.0},
        }
        (run / "summary.json").write_text(json.dumps(content))
        found = utilisation(read_run(run))[0]
        assert [(used.role, used.busy) for used in found] == [
            ("generator[0]", 0.75),
            ("generator[1]", 0.75),
        ]
        assert critical_path(read_run(run)) == [
            ("fake score signal", 0.75),
            ("between calls", 0.25),
        ]

    def test_a_run_that_has_recorded_no_critical_path_shows_none(self, run):
        (run / "summary.json").write_text(json.dumps({"critical_path_s": 3}))
        assert critical_path(read_run(run)) == []

    def test_stages_of_several_runs_stand_side_by_side(self, run, tmp_path):
        other = start_run(tmp_path / "other", 2)
        rows = dict(role_seconds([read_run(run), read_run(other)]))
        assert rows["generator.rollout"] == [2.0, 0.2]
        assert rows["teacher.denoise"][0] == 8.0
        assert math.isnan(rows["teacher.denoise"][1])


class TestRecords:
    def test_an_iteration_that_was_written_again_counts_once(self, tmp_path):
        folder = start_run(tmp_path / "run", 3)
        append_jsonl(folder / "metrics.jsonl", {"iteration": 1, "losses": {"fisher": 7.0}})
        lines = read_run(folder).metrics
        assert [line.iteration for line in lines] == [0, 1, 2]
        assert lines[1].number("fisher", "losses") == 7.0

    def test_groups_of_numbers_that_are_not_known_get_curves_of_their_own(self, tmp_path):
        folder = start_run(tmp_path / "run", 3)
        append_jsonl(folder / "metrics.jsonl", {"iteration": 3, "queues": {"depth": 2}})
        _, others = training_cards([LabelledRun("a", read_run(folder))])
        assert "queues: depth" in [card.title for card in others]

    def test_a_number_that_is_not_there_is_nan(self):
        assert math.isnan(Line(0, {}, {}).number("fisher", "losses"))


class TestSettings:
    def test_settings_are_named_as_overrides_call_them(self):
        assert flat({"name": "a", "model": {"folder": "b", "name": "c"}, "seed": 0}) == {
            "model.folder": "b",
            "model.name": "c",
            "seed": "0",
        }

    def test_only_what_differs_is_listed(self, tmp_path):
        runs = [
            read_run(start_run(tmp_path / "a", 1, name="a")),
            read_run(start_run(tmp_path / "b", 1, name="b", overrides=("seed=4",))),
        ]
        assert [(row.name, row.values) for row in differing_settings(runs)] == [
            ("seed", ("0", "4"))
        ]


def test_every_measure_stands_in_the_docs_and_is_titled_and_explained():
    """Where this fails, run `make docs`."""
    text = (Path(__file__).parents[3] / "docs" / "judging.md").read_text()
    assert names.measures_table() in text
    for measure in MEASURES:
        assert names.title(measure.name) == measure.title
        assert names.about(measure.name) == measure.about
        assert (measure.name in FIGURES) == measure.ranks


def test_the_columns_of_a_study_are_measures():
    assert {column.figure for column in COLUMNS} <= {measure.name for measure in MEASURES}
