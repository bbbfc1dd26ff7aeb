"""A dry run says yes only to what it has looked at, and lists both what it did and did not."""

from pathlib import Path

import pytest

from cluster.inventory import memory_bytes
from pipelines.commands.run_summary import dry_run_words
from pipelines.distillation.run import distill, dry_run
from pipelines.run.observer import RunObserver
from sgmd_core.errors import ConfigError
from tests.e2e.conftest import MakeRecipe
from tests.pipelines.commands.rendering import rendered


def test_a_dry_run_lists_what_was_compared_with_what(make_recipe: MakeRecipe) -> None:
    told = dry_run(make_recipe("validation.every=1"))
    assert set(told["checked"]) == {"settings", "model", "data", "held-out", "outputs", "memory"}
    total = f"free of {memory_bytes()[0] / 1e9:.3g} GB"
    assert told["checked"]["memory"].endswith(total)
    for role in ("generator", "teacher", "fake score", "text encoder", "validator"):
        assert role in told["checked"]["memory"]
    assert set(told["not_checked"]) == {"weights", "data", "time"}


@pytest.mark.parametrize("columns", [80, 120])
def test_a_reader_is_shown_both_lists_and_no_promise_beyond_them(
    make_recipe: MakeRecipe, columns: int
) -> None:
    text = rendered(dry_run_words(dry_run(make_recipe())), columns)
    assert "\nchecked" in text
    assert "\nnot checked" in text
    assert "Everything fits" not in text
    assert all(len(line) <= columns for line in text.splitlines())


def test_outputs_that_cannot_be_written_are_refused(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"writing to .*file/runs.*file is a file"):
        dry_run(make_recipe(f"output={tmp_path / 'file' / 'runs'}"))


def test_more_checkpoints_than_the_disk_holds_are_refused(make_recipe: MakeRecipe) -> None:
    with pytest.raises(ConfigError, match=r"free on its disk"):
        dry_run(make_recipe("checkpoint.keep=1000000000"))


@pytest.mark.slow
def test_a_name_that_is_taken_is_met_by_a_dry_run_and_a_resume_is_not_refused(
    make_recipe: MakeRecipe,
) -> None:
    config = make_recipe()
    distill(config.with_settings({"iterations": 1}), observer=RunObserver())
    with pytest.raises(ConfigError, match="a run of that name is already there"):
        dry_run(config)
    assert dry_run(config, resume=True)["checked"]


def test_a_run_that_needs_more_than_the_memory_is_refused_with_bytes_by_role(
    make_recipe: MakeRecipe,
) -> None:
    # A batch in one part keeps every sample's graph at once.
    size = ["batch.micro_batches=1", "video.height=512", "video.width=512", "batch.size=65536"]
    config = make_recipe(*size)
    for attempt in (dry_run, distill):
        with pytest.raises(ConfigError, match=r"the run needs .*GB \(generator .*teacher"):
            attempt(config)
    assert not config.run_folder.exists()


def test_roles_on_gpus_are_refused_where_there_is_none(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match=r"none that torch can use.*generator"):
        dry_run(make_recipe("topology.mode=pools", "topology.generator.gpus=1"))


def test_memory_of_a_cluster_elsewhere_is_listed_as_not_checked(make_recipe: MakeRecipe) -> None:
    told = dry_run(make_recipe("topology.mode=pools", "topology.address=10.0.0.1:6379"))
    assert "memory" not in told["checked"]
    assert "generator" in told["not_checked"]["memory"]
    assert "10.0.0.1:6379" in told["not_checked"]["cluster"]


class TestTracker:
    @pytest.fixture(autouse=True)
    def no_key(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("wandb")
        monkeypatch.delenv("WANDB_API_KEY", raising=False)
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))

    def test_online_without_a_key_is_refused_before_anything_starts(
        self, make_recipe: MakeRecipe
    ) -> None:
        config = make_recipe("tracker.wandb=online")
        for attempt in (dry_run, distill):
            with pytest.raises(ConfigError, match=r"no key of W&B.*WANDB_API_KEY"):
                attempt(config)
        assert not config.run_folder.exists()

    @pytest.mark.slow
    def test_a_key_of_the_environment_or_of_netrc_is_found(
        self, make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = make_recipe("tracker.wandb=online")
        (tmp_path / "netrc").write_text("machine api.wandb.ai login user password abcdefgh\n")
        assert "there is a key" in dry_run(config)["checked"]["tracker"]
        (tmp_path / "netrc").unlink()
        monkeypatch.setenv("WANDB_API_KEY", "abcdefgh")
        assert "there is a key" in dry_run(config)["checked"]["tracker"]
        assert "whether W&B takes it" not in dry_run(config)["checked"]["tracker"]
        assert "takes the key" in dry_run(config)["not_checked"]["tracker"]

    def test_offline_needs_no_key(self, make_recipe: MakeRecipe) -> None:
        assert dry_run(make_recipe("tracker.wandb=offline"))["checked"]["tracker"]
