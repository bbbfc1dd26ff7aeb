"""The command line: what is printed where, and which exit codes say what."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from pipelines.cli import app
from pipelines.config.recipe_files import shipped_recipes

COMMANDS = (
    "doctor",
    "recipes",
    "shapes",
    "prepare",
    "check",
    "encode",
    "pretrain",
    "distill",
    "sweep",
    "study",
    "evaluate",
    "export",
    "experts",
    "transition",
    "import",
    "generate",
    "report",
    "ledger",
    "submit",
    "plan",
    "bench",
)


def sgmd(*arguments: str | Path) -> Result:
    """Runs the command line in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


class TestHelp:
    def test_help_names_every_command_of_this_release_and_no_other(self):
        text = sgmd("--help").output
        assert [name for name in COMMANDS if f" {name} " not in text] == []
        known = {
            command.name or getattr(command.callback, "__name__", "")
            for command in app.registered_commands
        }
        assert known == {*COMMANDS} - {"recipes"}

    @pytest.mark.parametrize("command", COMMANDS)
    def test_every_command_explains_itself(self, command):
        result = sgmd(command, "--help")
        assert result.exit_code == 0
        assert "Usage" in result.output

    def test_an_unknown_option_is_a_wrong_request(self):
        assert sgmd("distill", "--fast").exit_code == 2

    def test_the_version_is_told(self):
        assert sgmd("--version").output.startswith("sgmd")


class TestRecipes:
    def test_list_names_every_recipe(self):
        rows = json.loads(sgmd("recipes", "list", "--json").stdout)
        assert [row["name"] for row in rows] == [recipe.name for recipe in shipped_recipes()]
        assert "tiny" in sgmd("recipes", "list").stdout

    def test_show_prints_the_file_with_its_comments(self):
        recipe = next(recipe for recipe in shipped_recipes() if recipe.name == "tiny")
        assert sgmd("recipes", "show", "tiny").stdout.strip() == recipe.path.read_text().strip()

    def test_a_copy_can_be_run_and_nothing_is_overwritten(self, empty_folder):
        assert sgmd("recipes", "copy", "tiny", "deep/mine.yaml").exit_code == 0
        assert sgmd("recipes", "show", "deep/mine.yaml").exit_code == 0
        again = sgmd("recipes", "copy", "tiny", "deep/mine.yaml")
        assert again.exit_code == 2
        assert "is there already" in again.stderr

    @pytest.mark.slow
    def test_the_schema_is_json(self):
        schema = json.loads(sgmd("recipes", "schema").stdout)
        assert "objective" in schema["properties"]


class TestErrors:
    def test_a_wrong_setting_is_one_paragraph_on_standard_error(self):
        result = sgmd("distill", "tiny", "objective.lambda_n=1", "--dry-run")
        assert result.exit_code == 2
        assert result.stdout == ""
        assert result.stderr.startswith("ConfigError: ")
        assert "objective.lambda_nr" in result.stderr
        assert "Traceback" not in result.stderr

    def test_debug_lets_the_traceback_through(self):
        result = sgmd("--debug", "distill", "tiny", "objective.lambda_n=1", "--dry-run")
        assert "ConfigError" in type(result.exception).__name__

    def test_a_distillation_needs_a_recipe_or_a_run(self):
        result = sgmd("distill")
        assert result.exit_code == 2
        assert "sgmd recipes list" in result.stderr

    def test_a_run_that_is_not_there_cannot_be_resumed(self, empty_folder):
        result = sgmd("distill", "--resume", "runs/none")
        assert result.exit_code == 2
        assert "runs/none: no config.yaml there" in result.stderr

    def test_a_missing_model_folder_is_met_by_a_dry_run(self, empty_folder):
        result = sgmd("distill", "tiny", "model.folder=nowhere", "--dry-run")
        assert result.exit_code == 2
        assert result.stderr.splitlines()[-1].startswith("ModelFolderError: ")
        assert "nowhere" in result.stderr

    def test_overrides_may_follow_resume_without_a_recipe(self, empty_folder):
        run = empty_folder / "runs" / "mine"
        run.mkdir(parents=True)
        recipe = next(recipe for recipe in shipped_recipes() if recipe.name == "tiny")
        (run / "config.yaml").write_text(recipe.path.read_text())
        result = sgmd("distill", "objective.lambda_n=1", "--resume", run)
        assert "objective.lambda_nr" in result.stderr


class TestShapes:
    def test_shapes_writes_both_splits_and_says_where(self, empty_folder):
        sizes = ("--train-clips", "6", "--held-out-clips", "4", "--shard-size", "4")
        result = sgmd("shapes", "data/shapes", *sizes, "--json")
        assert result.exit_code == 0
        data = json.loads(result.stdout)
        assert data["clips"] == {"train": 6, "held_out": 4}
        assert len(data["shards"]["train"]) == 2
        assert len(list((empty_folder / "data" / "shapes" / "train").glob("*.parquet"))) == 2

    def test_the_open_world_is_written_on_request(self, empty_folder):
        sizes = ("--train-clips", "3", "--held-out-clips", "2")
        result = sgmd("shapes", "data/open", "--world", "open", *sizes)
        assert result.exit_code == 0
        shards = sorted(path.name for path in (empty_folder / "data" / "open").glob("*/*.parquet"))
        assert shards == ["open-0000-held_out-0000000.parquet", "open-0000-train-0000000.parquet"]

    def test_a_count_below_one_is_refused(self, empty_folder):
        result = sgmd("shapes", "data/shapes", "--train-clips", "0")
        assert result.exit_code == 2
        assert "train_clips=0" in result.stderr


class TestDoctor:
    def test_doctor_prints_its_findings_as_json(self):
        result = sgmd("doctor", "--json")
        assert result.exit_code == 0
        assert {"H.264", "packages"} <= {row["check"] for row in json.loads(result.stdout)}

    def test_doctor_fails_when_something_necessary_is_missing(self, tmp_path):
        (tmp_path / "file").write_text("")
        result = sgmd("doctor", "--storage", tmp_path / "file" / "folder")
        assert result.exit_code == 1
        assert "missing" in result.stdout


class TestOddRequests:
    """Each is refused in one sentence that names what was found and what to do."""

    @pytest.mark.parametrize(
        ("arguments", "found", "expected"),
        [
            (("distill", "--resume", "nowhere"), "no config.yaml", "folder of an earlier run"),
            (("distill", "tiny", f"name={'n' * 300}"), "name is", "a shorter text"),
            (("plan", "tiny", "--tflops", "0"), "--tflops 0", "a number above 0"),
            (("plan", "tiny", "--tflops", "-1"), "--tflops -1", "a number above 0"),
            (("plan", "tiny", "--gpu-memory", "nan"), "--gpu-memory nan", "a number above 0"),
            (("plan", "tiny", "--gpus", "100000000"), "100000000", "4096"),
            (("recipes", "copy", "tiny", "file/x.yaml"), "is a file", "a folder"),
            (("recipes", "copy", "tiny", "s3://b/x.yaml"), "object store", "folder on a disk"),
            (("plan", "tiny", "--write", "file/x.yaml"), "is a file", "a folder"),
        ],
    )
    def test_an_odd_request_says_what_is_wrong(self, arguments, found, expected, empty_folder):
        (empty_folder / "file").write_text("")
        result = sgmd(*arguments)
        told = " ".join(result.stderr.split())
        assert result.exit_code in (1, 2)
        assert found in told
        assert expected in told
        assert "Traceback" not in told
        assert "not a failure that sgmd knows" not in told


class TestBench:
    def test_without_a_name_it_lists_what_there_is_and_no_helper(self):
        told = json.loads(sgmd("bench", "--json").stdout)
        names = {one["name"] for one in told}
        assert {"orchestration", "iteration", "gpu_check", "one_process", "planning"} <= names
        assert "harness" not in names
        assert all(one["measures"].endswith(".") for one in told)

    def test_an_unknown_name_is_a_wrong_request(self):
        result = sgmd("bench", "speed")
        assert result.exit_code == 2
        assert "orchestration" in result.stderr

    @pytest.mark.slow
    def test_a_benchmark_gets_its_own_options_and_its_exit_code_is_passed_on(self):
        assert sgmd("bench", "gpu_check", "--", "--no-such-option").exit_code == 2
