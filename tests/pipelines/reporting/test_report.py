"""`report`: one page that needs nothing else, of any runs, however far they came."""

import base64
import html
import json
import re
import shutil
from base64 import b64decode
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pipelines.data.clips.clip_decoding import decode_video
from pipelines.evaluation.result import GENERATOR
from pipelines.reporting.clips import MAX_MEDIA_BYTES, Media, clip_table
from pipelines.reporting.curves import LabelledRun
from pipelines.reporting.page import write_report
from pipelines.reporting.records import read_run
from pipelines.run.folder import append_jsonl
from pipelines.run.records import RunEvent
from sgmd_core.errors import CheckpointError, ConfigError
from tests.helpers.runs import finish_run, start_run, write_alarms
from workers.samplings import REFERENCE

VOID_TAGS = ("meta", "img", "link", "input", "br")


class Page(HTMLParser):
    """What a browser would fetch, what it shows, and whether the tags are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.tags: list[str] = []
        self.headings: list[str] = []
        self.warnings = ""
        self.text = ""
        self._open: list[tuple[str, str]] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        named = [value for name, value in attrs if name in ("src", "poster", "href")]
        self.sources += [value for value in named if value is not None]
        if tag not in VOID_TAGS:
            self._open.append((tag, dict(attrs).get("class") or ""))

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag

    def handle_data(self, data):
        tags = [tag for tag, _ in self._open]
        if tags and tags[-1] in ("h1", "h2"):
            self.headings.append(data)
        if any(css == "warning" for _, css in self._open):
            self.warnings += data
        if "style" not in tags and "script" not in tags:
            self.text += data


def page(*folders: Path) -> Page:
    return Page(write_report(folders).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return finish_run(tmp_path_factory.mktemp("runs") / "demo")


@pytest.fixture
def finished(original, tmp_path) -> Path:
    """A finished run that a test may change."""
    return Path(shutil.copytree(original, tmp_path / "demo"))


class TestFinishedRun:
    @pytest.mark.slow
    def test_the_page_is_well_formed_and_fetches_nothing(self, finished):
        shown = page(finished)
        assert all(source.startswith("data:") for source in shown.sources)
        assert not {"iframe", "object", "embed"} & set(shown.tags)
        text = (finished / "report.html").read_text()
        outside_of_data = re.sub(r"data:[^\"]+", "", text)
        assert "http:" not in outside_of_data
        assert "https:" not in outside_of_data
        assert "url(" not in text
        assert "@import" not in text

    @pytest.mark.slow
    def test_its_policy_forbids_requests(self, finished):
        text = write_report([finished]).read_text()
        assert "default-src 'none'" in text

    @pytest.mark.slow
    def test_every_section_is_there(self, finished):
        assert page(finished).headings == [
            "demo",
            "Generator against teacher",
            "Clips",
            "Alarms",
            "Training",
            "Validation during the training",
            "Checkpoints",
            "Where the time went",
            "Configuration and versions",
        ]

    def test_every_loss_norm_figure_stage_and_version_is_shown(self, finished):
        text = page(finished).text
        for word in (
            *("fisher", "residual contraction", "own term", "gradient norm"),
            *("distance", "rollout", "signal", "waiting for captions"),
            *("2.13.0", "abc123", "lambda_nr"),
        ):
            assert word in text, word

    def test_measures_stand_with_their_ratios_and_intervals(self, finished):
        text = page(finished).text
        for word in ("flow of fastest 5 %", "saturation", "diversity of seeds", "[0.7, 0.8]"):
            assert word in text, word

    def test_checkpoints_are_ranked_and_it_is_told_which_are_kept(self, finished):
        text = page(finished).text
        assert "60, best" in " ".join(text.split())
        assert "flow of fastest 5 % ÷ teacher's" in text
        assert text.count("kept") == 2

    def test_the_clips_are_videos_with_a_first_picture(self, finished):
        shown = page(finished)
        # Three ways of sampling and two captions.
        assert shown.tags.count("video") == 6
        assert sum(source.startswith("data:video/mp4") for source in shown.sources) == 6
        assert sum(source.startswith("data:image/jpeg") for source in shown.sources) == 6

    def test_verdicts_say_what_was_met_and_what_was_not(self, finished):
        text = write_report([finished]).read_text()
        assert text.count('class="met"') == 3
        assert text.count('class="unmet"') == 1

    def test_the_tiles_say_how_many_steps_and_how_much_faster(self, finished):
        text = page(finished).text
        assert "4steps, where the teacher takes 30" in text
        assert "4×faster a video" in text

    @pytest.mark.parametrize("sampled", [REFERENCE, GENERATOR])
    def test_seconds_of_another_command_make_nobody_faster(self, finished, sampled):
        path = finished / "evaluation.json"
        content = json.loads(path.read_text())
        for row in content["rows"]:
            row["remembered"] = row["name"] == sampled
        path.write_text(json.dumps(content))
        text = page(finished).text
        assert "4steps, where the teacher takes 30" in text
        assert "faster a video" not in text

    def test_a_finished_run_has_nothing_to_warn_of(self, finished):
        assert page(finished).warnings == ""

    def test_it_can_be_written_elsewhere(self, finished, tmp_path):
        path = write_report([finished], tmp_path / "elsewhere.html")
        assert path == tmp_path / "elsewhere.html"
        assert not (finished / "report.html").exists()


class TestClips:
    @pytest.mark.slow
    def test_clips_larger_than_their_share_are_shrunk(self, finished):
        runs = [LabelledRun("demo", read_run(finished))]
        sizes = []
        for room in (10 * 2**20, 40_000):
            table = clip_table(runs, Media(left_bytes=room))
            assert table is not None
            found = [clip for row in table.rows for clip in row.clips if clip]
            videos = [b64decode(clip.source.partition(",")[2]) for clip in found]
            assert all(len(decode_video(video)) == 13 for video in videos)
            sizes.append(sum(map(len, videos)))
        assert sizes[1] < 0.9 * sizes[0]

    def test_pictures_past_the_limit_are_left_out_by_name(self, finished):
        (finished / "samples" / "evaluation.png").write_bytes(b"0" * (MAX_MEDIA_BYTES + 1))
        shown = page(finished)
        assert "samples/evaluation.png (10.0 MB) is left out" in shown.warnings
        assert (finished / "report.html").stat().st_size < 15 * 2**20

    def test_a_missing_picture_is_named(self, finished):
        (finished / "samples" / "evaluation.png").unlink()
        assert "samples/evaluation.png is not there" in page(finished).warnings

    def test_a_torn_clip_is_named_and_the_others_are_shown(self, finished):
        clip = finished / "samples" / "evaluation" / "2-1.mp4"
        clip.write_bytes(clip.read_bytes()[:400])
        shown = page(finished)
        assert "evaluation/2-1.mp4 is missing or is not a video" in shown.warnings
        assert shown.tags.count("video") == 5

    def test_a_run_without_clip_files_shows_its_looping_sheet(self, finished):
        for list_file in finished.glob("samples/*/clips.json"):
            list_file.unlink()
        shown = page(finished)
        assert "video" not in shown.tags
        assert any(source.startswith("data:image/gif") for source in shown.sources)

    def test_before_an_evaluation_the_last_validation_has_the_clips(self, finished):
        (finished / "evaluation.json").unlink()
        assert page(finished).tags.count("video") == 6


class TestUnfinishedRun:
    def test_a_stopped_run_shows_its_curves_and_says_how_far_it_came(self, tmp_path):
        shown = page(start_run(tmp_path / "stopped", num_iterations=7))
        assert "iteration 7 of 60" in shown.warnings
        assert "has not come to its end" in shown.warnings
        assert "sgmd evaluate" in shown.warnings
        assert shown.headings == [
            "demo",
            "Alarms",
            "Training",
            "Where the time went",
            "Configuration and versions",
        ]

    def test_a_lag_is_a_curve_over_the_iterations_that_it_was_measured_before(self, tmp_path):
        folder = start_run(tmp_path / "measured", num_iterations=7)
        assert "lag of the fake score" not in page(folder).text
        path = folder / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for at, lag in ((2, 0.125), (4, 0.25)):
            lines[at]["lag"] = {"tracking_lag": lag, "copy_rate": 10.0, "generator_rate": 0.5}
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert "lag of the fake score" in page(folder).text
        assert "rate of the generator" in page(folder).text
        curve = '{"label": "lag of the fake score", "x": [2, 4], "y": [0.125, 0.25]}'
        assert curve in html.unescape(write_report([folder]).read_text())

    def test_a_run_without_an_iteration_has_a_page(self, tmp_path):
        shown = page(start_run(tmp_path / "new", num_iterations=0))
        assert "there are no curves" in shown.warnings

    def test_values_that_are_not_finite_do_not_break_the_page(self, tmp_path):
        folder = start_run(tmp_path / "nan", num_iterations=5)
        lines = (folder / "metrics.jsonl").read_text().replace('"own_term": 3.0', '"own_term": NaN')
        (folder / "metrics.jsonl").write_text(lines)
        assert "No finite values" in page(folder).text


class TestBadRecords:
    @pytest.mark.parametrize(
        "torn", ['{"iteration": 5, "los', "[1, 2]", '{"losses": {}}', '{"iteration": "5"}']
    )
    def test_a_wrong_line_is_left_out_and_counted(self, tmp_path, torn):
        folder = start_run(tmp_path / "crashed", num_iterations=5)
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        (folder / "metrics.jsonl").write_text("\n".join([*lines[:2], torn, *lines[2:]]))
        shown = page(folder)
        assert "metrics.jsonl: 1 line left out, torn or wrong (3)" in shown.warnings
        assert "iteration 5 of 60" in shown.warnings

    @pytest.mark.parametrize("content", ["{ [\n\n", "", "[]", "\x00\x01"])
    @pytest.mark.parametrize("name", ["summary.json", "evaluation.json", "config.yaml"])
    def test_a_file_that_cannot_be_read_is_named_and_the_rest_is_shown(
        self, finished, name, content
    ):
        (finished / name).write_text(content)
        shown = page(finished)
        assert name in shown.warnings
        assert "Training" in shown.headings

    def test_records_of_unexpected_types_do_not_break_the_page(self, finished):
        found = {"rows": [{"name": "generator", "colour": "red"}, 7], "verdicts": {"a": 1}}
        (finished / "evaluation.json").write_text(json.dumps(found))
        (finished / "summary.json").write_text(json.dumps({"versions": 3, "utilisation": [1]}))
        append_jsonl(finished / "metrics.jsonl", {"iteration": 99, "losses": 3, "seconds": None})
        (finished / "samples" / "evaluation" / "clips.json").write_text("{}")
        assert "Training" in page(finished).headings

    def test_a_folder_without_settings_has_a_page(self, finished):
        (finished / "config.yaml").unlink()
        assert "config.yaml is not there" in page(finished).warnings

    def test_a_folder_that_is_no_run_is_refused(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"config\.yaml"):
            write_report([tmp_path])

    @pytest.mark.slow
    def test_text_of_the_run_is_never_markup(self, finished):
        config = finished / "config.yaml"
        config.write_text("# <script>alert(1)</script>\n" + config.read_text())
        write_alarms(finished, {"iteration": 3, "name": "<b>", "message": "<script>alert(2)"})
        # Our own script is the only one.
        assert page(finished).tags.count("script") == 1
        assert "alert(2)" in page(finished).text

    def test_events_are_a_table_only_where_there_are_any(self, finished):
        assert "Events" not in page(finished).headings
        event = RunEvent(
            kind="worker_died",
            cause="<i>ended by signal 9",
            action="It was replaced",
            role="teacher",
            rank=1,
            iteration=4,
            last_lines=("<script>alert(3)",),
            lost_s=90.0,
        )
        append_jsonl(finished / "events.jsonl", event.to_json())
        append_jsonl(finished / "events.jsonl", {"kind": "torn"})
        shown = page(finished)
        assert "Events" in shown.headings
        for text in (
            "worker died",
            "teacher rank 1",
            "ended by signal 9",
            "1 min 30 s",
            "alert(3)",
        ):
            assert text in shown.text
        assert shown.tags.count("script") == 1
        assert "events.jsonl: 1 line left out" in shown.warnings


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> tuple[Path, Path]:
    """Two runs of one teacher, the second one with another weight and a weaker generator."""
    root = tmp_path_factory.mktemp("two")
    first = finish_run(root / "a")
    second = finish_run(
        root / "b",
        name="weaker",
        overrides=("objective.lambda_nr=0.05",),
        generator_seed=2,
        generator_colour=0.7,
    )
    return first, second


class TestComparison:
    @pytest.mark.slow
    def test_it_is_written_beside_the_first_run(self, two):
        assert write_report(two) == two[0].parent / "comparison.html"

    @pytest.mark.slow
    def test_it_shows_the_settings_that_differ_and_no_others(self, two):
        text = page(*two).text
        differing = text[text.index("What differs") : text.index("Generators against")]
        assert "objective.lambda_nr" in differing
        assert "0.05" in differing
        assert "lambda_rc" not in differing

    @pytest.mark.slow
    def test_clips_that_two_runs_share_are_shown_once(self, two):
        # Two captions; two teachers for both runs, and a generator of each.
        assert page(*two).tags.count("video") == 2 * (2 + 2)

    def test_both_runs_have_their_figures_and_verdicts(self, two):
        text = page(*two).text
        assert "0.70" in text or "0.7" in text
        markup = write_report(two).read_text()
        assert markup.count('class="met"') == 3 + 2
        assert markup.count('class="unmet"') == 1 + 2

    def test_curves_of_both_runs_lie_in_one_picture(self, two):
        assert 'aria-label="demo, weaker"' in write_report(two).read_text()

    def test_runs_of_one_name_are_told_apart_by_their_folders(self, two, tmp_path):
        other = start_run(tmp_path / "again", num_iterations=3)
        assert 'aria-label="a, again"' in write_report([two[0], other]).read_text()

    def test_a_run_that_was_not_evaluated_may_be_compared(self, two, tmp_path):
        other = start_run(tmp_path / "young", num_iterations=3, name="young")
        shown = page(two[0], other)
        assert "young: The run is at iteration 3 of 60" in shown.warnings
        assert "Generators against their teacher" in shown.headings


class TestRunFromElsewhere:
    """What a folder names is shown only where it lies in the folder and is a picture or a clip."""

    def test_a_link_in_the_folder_does_not_lead_the_page_over_another_file(
        self, finished, tmp_path
    ):
        precious = tmp_path / "precious"
        precious.write_text("mine")
        (finished / "report.html").symlink_to(precious)
        with pytest.raises(ConfigError, match=r"a link that leads to .*precious.*--output"):
            write_report([finished])
        assert precious.read_text() == "mine"
        assert write_report([finished], tmp_path / "page.html").exists()

    @pytest.mark.parametrize("name", ["../secret.png", "{outside}", "linked.png", "notes.png"])
    def test_no_file_from_elsewhere_gets_into_the_page(self, finished, tmp_path, name):
        secret = tmp_path / "secret.png"
        secret.write_bytes(b"\x89PNG\r\n\x1a\n" + b"top-secret" * 100)
        (finished / "linked.png").symlink_to(secret)
        (finished / "notes.png").write_text("top-secret" * 100)
        path = finished / "evaluation.json"
        content = json.loads(path.read_text())
        content["sheet_png"] = content["sheet_gif"] = name.format(outside=secret)
        path.write_text(json.dumps(content))
        text = write_report([finished]).read_text()
        assert base64.b64encode(b"top-secret" * 3).decode()[4:-4] not in text
        assert b64_of(secret) not in text

    def test_a_file_of_figures_that_is_a_link_elsewhere_is_not_followed(self, finished, tmp_path):
        outside = tmp_path / "other.yaml"
        outside.write_text("password: top-secret\n")
        (finished / "config.yaml").unlink()
        (finished / "config.yaml").symlink_to(outside)
        text = write_report([finished]).read_text()
        assert "top-secret" not in text
        assert "config.yaml is left out" in text

    def test_clips_of_other_folders_are_not_shown(self, finished, tmp_path):
        listing = next(finished.rglob("clips.json"))
        content = json.loads(listing.read_text())
        stolen = next(listing.parent.glob("*.mp4")).rename(tmp_path / "stolen.mp4")
        for column in content["columns"]:
            column["files"] = [f"../../../{stolen.name}"] * len(content["prompts"])
        listing.write_text(json.dumps(content))
        shown = page(finished)
        assert not [source for source in shown.sources if source.startswith("data:video")]

    def test_a_sheet_of_another_kind_is_left_out_with_a_note(self, finished):
        path = finished / "evaluation.json"
        content = json.loads(path.read_text())
        (finished / "sheet.svg").write_text("<svg onload='alert(1)'/>")
        content["sheet_png"] = "sheet.svg"
        path.write_text(json.dumps(content))
        text = write_report([finished]).read_text()
        assert "sheet.svg is left out: it is not a PNG, GIF, JPEG or MP4" in text
        assert "onload" not in text


def b64_of(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()[:400]
