"""`report`: one page that needs nothing else, of any run, however far it came."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from pipelines import report
from pipelines.config import load_recipe
from pipelines.contact_sheet import SheetGroup, write_contact_sheet
from pipelines.evaluation import (
    FLOOR,
    GENERATOR,
    REFERENCE,
    TEACHER_FEW,
    Evaluation,
    EvaluationRow,
    Figure,
    judge,
)
from pipelines.records import IterationRecord, ValidationRecord
from pipelines.report import write_report
from pipelines.run_folder import RunFolder, append_jsonl
from sgmd_core.errors import CheckpointError

NUM_ITERATIONS = 60


class Page(HTMLParser):
    """What a browser would fetch, and whether the tags are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.tags: list[str] = []
        self.headings: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href", "srcset")]
        if tag not in ("meta", "img"):
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] in ("h1", "h2"):
            self.headings.append(data)
        if "style" not in self._open:
            self.text += data


def write_sheet(folder: Path, name: str) -> None:
    clip = np.random.default_rng(0).integers(0, 255, (4, 8, 8, 3)).astype(np.uint8)
    groups = [SheetGroup("teacher", "guided", [clip]), SheetGroup("generator", "", [clip])]
    folder.mkdir(exist_ok=True)
    write_contact_sheet(folder / f"{name}.png", folder / f"{name}.gif", groups, ["a <b>"], fps=8)


def start_run(folder: Path, num_iterations: int = NUM_ITERATIONS) -> Path:
    """A run as far as its last recorded iteration."""
    run = RunFolder(folder)
    run.create(load_recipe("tiny", [f"iterations={NUM_ITERATIONS}", "name=demo"]).to_yaml())
    for iteration in range(num_iterations):
        record = IterationRecord(
            iteration=iteration,
            losses={"fisher": 1 / (iteration + 1), "residual_contraction": 0.5, "own_term": 3.0},
            grad_norms={"generator": 0.1 + iteration, "fake_score": math.exp(-iteration / 9)},
            seconds={"generator.rollout": 0.2, "fake_score.signal": 0.3},
            seconds_total=0.4,
            data_wait_s=0.01,
            samples_seen=16 * (iteration + 1),
            epoch=0.1,
            cursor={},
            rejected=0,
            exit_steps=(0, 3),
        )
        append_jsonl(run.metrics, record.to_json())
    return folder


def evaluation() -> Evaluation:
    facts = {"num_steps": 4, "guidance_scale": 1.0, "seed": 1, "remembered": False}
    read = {"colour": 0.9, "shape": 0.9, "direction": 0.8, "speed_spearman": 0.9}
    read |= {"mean_speed_px_per_frame": 1.0, "speed_ratio": 1.0, "seconds_per_clip": 0.5}
    far = {"frechet": Figure(value=3, error=0.1), "above_floor": Figure(value=2, error=0.1)}
    rows = [EvaluationRow(name=REFERENCE, label="teacher, 30 guided steps", **facts, **read)]
    rows += [
        EvaluationRow(
            name=name, label=name, **facts, **read, **far, ratio=Figure(value=0.2, error=0.1)
        )
        for name in (FLOOR, TEACHER_FEW, GENERATOR)
    ]
    return Evaluation(
        generator="generator",
        teacher="teacher",
        captions="captions",
        num_captions=256,
        num_distinct_captions=36,
        batch_size=16,
        device="cpu",
        rows=tuple(rows),
        verdicts=judge(rows),
        sheet_png="samples/evaluation.png",
        sheet_gif="samples/evaluation.gif",
        versions={"torch": "2"},
    )


def finish_run(folder: Path) -> Path:
    """Everything that a finished and evaluated run has."""
    run = RunFolder(start_run(folder))
    for iteration in (20, 40, 60):
        name = f"validation-{iteration:06d}"
        write_sheet(run.samples, name)
        figures = {"frechet": 1 / iteration, "colour": 0.9}
        record = ValidationRecord(iteration, figures, 3.0, f"{name}.png")
        append_jsonl(run.validation, record.to_json())
    summary = {"seed": 0, "config_digest": "abc123", "versions": {"torch": "2.13.0"}}
    run.summary.write_text(json.dumps(summary))
    write_sheet(run.samples, "evaluation")
    evaluation().save(folder / "evaluation.json")
    return folder


@pytest.fixture
def finished(tmp_path) -> Path:
    return finish_run(tmp_path / "demo")


def page(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


class TestFinishedRun:
    def test_the_page_is_well_formed_and_fetches_nothing(self, finished):
        shown = page(finished)
        assert len(shown.sources) == 5
        assert all(source.startswith("data:image/") for source in shown.sources)
        assert not {"script", "link", "iframe", "object"} & set(shown.tags)
        text = (finished / "report.html").read_text()
        assert "http" not in re.sub(r"data:image/[^\"]+", "", text)
        assert "url(" not in text
        assert "@import" not in text

    def test_every_section_is_there(self, finished):
        assert page(finished).headings == [
            "demo",
            "Generator against teacher",
            "Clips",
            "Training",
            "Validation during the training",
            "Where the time went",
            "Settings and versions",
        ]

    def test_every_loss_norm_figure_stage_and_version_is_shown(self, finished):
        text = page(finished).text
        for word in (
            *("fisher", "residual contraction", "own term", "gradient norm"),
            *("frechet", "generator.rollout", "fake_score.signal", "waiting for captions"),
            *("2.13.0", "abc123", "lambda_nr"),
        ):
            assert word in text, word

    def test_verdicts_say_what_was_met_and_what_was_not(self, finished):
        text = write_report(finished).read_text()
        assert text.count('class="met"') == 3
        assert text.count('class="unmet"') == 1

    def test_it_knows_light_and_dark_and_a_narrow_screen(self, finished):
        text = write_report(finished).read_text()
        assert "prefers-color-scheme: dark" in text
        assert 'name="viewport"' in text

    def test_a_finished_run_has_nothing_to_warn_of(self, finished):
        assert 'class="warning"' not in write_report(finished).read_text()

    def test_it_can_be_written_elsewhere(self, finished, tmp_path):
        path = write_report(finished, tmp_path / "elsewhere.html")
        assert path == tmp_path / "elsewhere.html"
        assert not (finished / "report.html").exists()

    def test_pictures_past_the_limit_are_left_out_by_name(self, finished):
        (finished / "samples" / "evaluation.gif").write_bytes(b"0" * (report._MAX_MEDIA_BYTES + 1))
        shown = page(finished)
        assert len(shown.sources) == 4
        assert "samples/evaluation.gif (10.0 MB) is left out" in shown.text
        assert (finished / "report.html").stat().st_size < 15 * 2**20

    def test_a_missing_picture_is_named(self, finished):
        (finished / "samples" / "evaluation.gif").unlink()
        assert "samples/evaluation.gif is not there" in page(finished).text


class TestUnfinishedRun:
    def test_a_stopped_run_shows_its_curves_and_says_how_far_it_came(self, tmp_path):
        shown = page(start_run(tmp_path / "stopped", num_iterations=7))
        assert "iteration 7 of 60" in shown.text
        assert "has not come to its end" in shown.text
        assert "sgmd evaluate" in shown.text
        assert shown.headings == [
            "demo",
            "Training",
            "Where the time went",
            "Settings and versions",
        ]

    def test_a_run_without_an_iteration_has_a_page(self, tmp_path):
        shown = page(start_run(tmp_path / "new", num_iterations=0))
        assert "there are no curves" in shown.text

    def test_a_line_torn_by_a_crash_is_left_out(self, tmp_path):
        folder = start_run(tmp_path / "crashed", num_iterations=5)
        with (folder / "metrics.jsonl").open("a") as file:
            file.write('{"iteration": 5, "los')
        assert "iteration 5 of 60" in page(folder).text

    def test_values_that_are_not_finite_do_not_break_the_page(self, tmp_path):
        folder = start_run(tmp_path / "nan", num_iterations=5)
        lines = (folder / "metrics.jsonl").read_text().replace('"own_term": 3.0', '"own_term": NaN')
        (folder / "metrics.jsonl").write_text(lines)
        assert "No finite values" in page(folder).text


class TestWrongInput:
    def test_a_folder_that_is_no_run_is_refused(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"config\.yaml"):
            write_report(tmp_path)

    @pytest.mark.parametrize("name", ["metrics.jsonl", "summary.json", "config.yaml"])
    def test_a_file_that_cannot_be_read_is_named(self, finished, name):
        (finished / name).write_text("{ [\n\n")
        with pytest.raises(CheckpointError, match=name):
            write_report(finished)

    def test_text_of_the_run_is_never_markup(self, finished):
        config = finished / "config.yaml"
        config.write_text("# <script>alert(1)</script>\n" + config.read_text())
        assert "script" not in page(finished).tags
