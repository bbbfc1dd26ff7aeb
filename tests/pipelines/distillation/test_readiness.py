"""Memory of a run, compared with a machine's before a role loads."""

import re
from types import SimpleNamespace

import pytest
import torch

from pipelines.config.recipe import load_recipe
from pipelines.distillation import readiness
from pipelines.distillation.network_checks import require_computable
from sgmd_core.errors import ConfigError
from workers.models.families import family_named, family_of

ON_GPUS = ("topology.mode=fused", "topology.fused.gpus=1")
OFFLOADED = (
    "generator.optimizer.moments=cpu",
    "fake_score.compute.checkpointing=offload",
    "generator.compute.checkpointing=offload",
)


def check(tmp_path, *options):
    config = load_recipe("tiny", [f"output={tmp_path}", *ON_GPUS, *options])
    model = family_of(config.model_folder).inspect(config.model_folder)
    return readiness.check_machine(config, model)


@pytest.fixture
def gpu(monkeypatch):
    """A machine with one GPU of a given number of bytes: this one may have none."""

    def of(num_bytes: int) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        properties = SimpleNamespace(total_memory=num_bytes)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)

    return of


def test_a_gpu_that_is_too_small_is_met_with_the_settings_that_save_memory(tmp_path, gpu):
    gpu(2**20)
    with pytest.raises(ConfigError) as refused:
        check(tmp_path)
    words = str(refused.value)
    assert "all roles" in words
    for setting in ("generator.compute.checkpointing=true", "generator.optimizer.moments=cpu"):
        assert setting in words
    # Settings that the recipe has are not proposed again.
    with pytest.raises(ConfigError) as refused:
        check(tmp_path, "generator.optimizer.moments=cpu", "fake_score.optimizer.moments=cpu")
    assert "optimizer.moments" not in str(refused.value)


def test_what_is_offloaded_and_what_a_save_copies_is_counted_with_main_memory(
    tmp_path, gpu, monkeypatch
):
    gpu(2**40)
    kept, more = (
        float(re.search(r"all roles, beside the GPU ([\d.]+) GB", found)[1])
        for found in (
            check(tmp_path).checked["memory"],
            check(tmp_path, *OFFLOADED).checked["memory"],
        )
    )
    # Weights, moments and average of a save; and moments and average once more.
    assert 0 < kept < more
    monkeypatch.setattr(readiness, "memory_bytes", lambda: (2**20, 2**20))
    with pytest.raises(ConfigError, match="all roles, beside the GPU"):
        check(tmp_path, *OFFLOADED)


@pytest.mark.parametrize("name", ["wan-experts", "ltx"])
def test_one_walk_is_refused_for_networks_that_are_no_chain_of_layers_or_were_not_tried(name):
    config = load_recipe("tiny", ["fake_score.compute.checkpointing=true", "fake_score.walk=joint"])
    require_computable(config, {"fake_score": family_named("wan")})
    with pytest.raises(ConfigError, match="fake_score asks for joint") as refused:
        require_computable(config, {"fake_score": family_named(name)})
    assert "fake_score.walk=apart" in str(refused.value)
