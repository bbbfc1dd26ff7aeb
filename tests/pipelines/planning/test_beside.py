"""Memory of the processes beside the roles, against the networks themselves."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLLTXVideo, AutoencoderKLWan
from torch import nn
from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

from pipelines.config.recipe import load_recipe
from pipelines.planning.beside import bytes_beside, host_bytes_beside
from pipelines.planning.hardware import Hardware
from pipelines.planning.kept_bytes import companion_bytes
from pipelines.planning.memory import generator_memory
from pipelines.planning.networks import released_models
from pipelines.planning.pool_maps import PoolMap, map_fits
from pipelines.planning.savings import run_fits
from pipelines.planning.workload import Workload
from tests.pipelines.planning.test_planning import sgmd

XXL = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
GATED = {**XXL, "feed_forward_proj": "gated-gelu"}
WIDE = {
    "base_dim": 160,
    "z_dim": 48,
    "decoder_base_dim": 256,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "temperal_downsample": [False, True, True],
    "latents_mean": [0.0] * 48,
    "latents_std": [1.0] * 48,
}
"""Of the autoencoder of Wan 2.2's 5B, what is not AutoencoderKLWan's default."""


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.slow
def test_released_encoders_have_the_parameters_of_their_configurations():
    with torch.device("meta"):
        umt5 = count(UMT5EncoderModel(UMT5Config(vocab_size=256384, **GATED)))
        t5 = count(T5EncoderModel(T5Config(vocab_size=32128, **GATED)))
        wan, wide = count(AutoencoderKLWan()), count(AutoencoderKLWan(**WIDE))
        ltx = count(AutoencoderKLLTXVideo())
    released = {
        name: (shape.encoders.text, shape.encoders.autoencoder)
        for name, shape in released_models().items()
        if shape.encoders is not None
    }
    assert released == {
        "1.3b": (umt5, wan),
        "14b": (umt5, wan),
        "5b": (umt5, wide),
        "a14b": (umt5, wan),
        "ltx-2b": (t5, ltx),
    }


@pytest.mark.slow
def test_a_plan_counts_the_weights_of_text_encoder_and_validator():
    options = ("--model", "1.3b", "--gpus", 10, "--json", "topology.text.gpus=0.25")
    told = json.loads(sgmd("plan", "wan21-1.3b", *options).stdout)
    text, autoencoder = 5_680_910_336, 126_892_531
    generator = released_models()["1.3b"].denoiser.num_parameters
    needed = told["memory_beside_gb"]
    assert needed["text"] == pytest.approx(2 * text / 1e9, abs=0.01)
    work = Workload.of(load_recipe("wan21-1.3b"), "1.3b")
    # The text encoder is larger than a pass over one clip with and without its caption.
    assert 2 * text > 2 * work.shape.transient_bytes(work.latent_shape, bf16=True)
    whole = 2 * (generator + text + autoencoder)
    assert needed["validator"] == pytest.approx(whole / 1e9, abs=0.01)
    assert any(f"handed {2 * generator / 1e9:.3g} GB" in line for line in told["advice"])


@pytest.mark.slow
def test_a_validator_that_its_gpu_does_not_hold_is_refused_with_what_would_do():
    options = ("--model", "a14b", "--gpus", 33, "--gpu-memory", 64, "--fit")
    refused = sgmd("plan", "wan22-a14b", *options)
    assert refused.exit_code == 2
    assert "validator does not fit" in refused.stderr
    assert "topology.validator.gpus=0" not in refused.stderr
    assert "validation.every=0, and `sgmd evaluate RUN`" in refused.stderr


@pytest.mark.slow
def test_a_folder_is_counted_by_its_weights_and_without_them_not_at_all(tmp_path):
    whole = Path(load_recipe("tiny").model.folder)
    bare = tmp_path / "bare"
    shutil.copytree(whole, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    mute = tmp_path / "mute"
    shutil.copytree(whole, mute, ignore=shutil.ignore_patterns("text_encoder"))
    options = ("--gpus", 2, "--json", "topology.validator.gpus=1")
    counted, not_counted, without_text = (
        json.loads(sgmd("plan", "tiny", *options, f"model.folder={folder}").stdout)
        for folder in (whole, bare, mute)
    )
    # Where the run is, the folder may have the text encoder that its texts need.
    assert without_text["memory_beside_gb"] == {}
    assert counted["memory_beside_gb"].keys() == {"validator"}
    assert not_counted["memory_beside_gb"] == {}
    assert counted["gpus_beside"] == not_counted["gpus_beside"]


@pytest.mark.parametrize(
    ("own", "other"),
    [("17x256x256", "81x480x832"), ("37x480x832", "41x480x832")],
    ids=["a large bucket", "one clip of the bucket, two of its own"],
)
def test_a_validator_samples_clips_of_its_own_size_whatever_is_trained(own, other):
    def size_of(text: str) -> dict[str, int]:
        return dict(zip(("num_frames", "height", "width"), map(int, text.split("x")), strict=True))

    def needed(size: str, *overrides: str) -> float:
        numbers = [f"video.{name}={value}" for name, value in size_of(size).items()]
        config = load_recipe("wan21-1.3b", [*numbers, *overrides])
        work, sizes = Workload.of(config, "1.3b"), released_models()["1.3b"].encoders
        return bytes_beside(config, work, sizes, work.shape.num_parameters, ())["validator"]

    buckets = [{**size_of(size), "weight": 1.0} for size in (other, own)]
    assert abs(needed(own) - needed(other)) > 0.1 * needed(own)
    assert needed(own, f"video.buckets={json.dumps(buckets)}") == needed(own)


@pytest.mark.parametrize(("recipe", "model"), [("wan22-a14b", "a14b"), ("wan21-1.3b-lora", "1.3b")])
def test_a_validator_has_in_main_memory_what_a_gpu_puts_aside_and_what_it_is_handed(recipe, model):
    def host(*overrides: str, encoding=("text", "validator")) -> dict[str, float]:
        config = load_recipe(recipe, ["topology.validator.gpus=1", *overrides])
        work, sizes = Workload.of(config, model), released_models()[model].encoders
        return host_bytes_beside(config, work, sizes, encoding)

    config = load_recipe(recipe)
    trained = Workload.of(config, model).num_trained("generator")
    # Whole networks are handed over in the type of their products, adapters as they are trained.
    weights = (2 if config.generator.lora is None else 4) * trained
    text = 2 * released_models()[model].encoders.text
    assert host() == {"validator": 2 * weights + text}
    assert host(encoding=("text",)) == {"validator": 2 * weights}
    # A CPU puts nothing aside, and has the encoder among its own bytes.
    assert host("topology.validator.gpus=0") == {"validator": weights}
    assert host("validation.every=0") == {}
    if model == "a14b":
        assert [round(part / 1e9) for part in (weights, text)] == [57, 11]


@pytest.mark.slow
def test_two_that_share_a_gpu_must_fit_it_together():
    shares = ("topology.text.gpus=0.4", "topology.validator.gpus=0.6", "data.stored_text=false")
    options = ("--model", "1.3b", "--gpus", 9, "--fit", "--json", *shares)
    together = sgmd("plan", "wan21-1.3b", *options, "--gpu-memory", 24)
    assert together.exit_code == 2
    assert "text and validator do not fit" in together.stderr
    assert "topology.text.gpus=1 topology.validator.gpus=1" in together.stderr
    assert sgmd("plan", "wan21-1.3b", *options, "--gpu-memory", 48).exit_code == 0


SHIPPED = {
    "wan21-1.3b": ("1.3b", 3, 80),
    "wan21-1.3b-lora": ("1.3b", 2, 24),
    "wan21-1.3b-released": ("1.3b", 3, 80),
    "wan21-14b": ("14b", 33, 80),
    "wan22-5b": ("5b", 17, 80),
    "wan22-a14b": ("a14b", 65, 80),
    "ltx-2b": ("ltx-2b", 3, 80),
}
"""Models of the recipes, GPUs that their headers name with one for the validator, and GB of one."""


@pytest.mark.parametrize("recipe", SHIPPED)
def test_a_shipped_recipe_fits_the_gpus_that_it_names_with_text_encoder_and_validator(recipe):
    model, gpus, memory = SHIPPED[recipe]
    config = load_recipe(recipe)
    work, hardware = Workload.of(config, model), Hardware(memory_gb=memory)
    assert run_fits(work, hardware, gpus - 1)
    if config.topology.shares_pools:
        pools = config.topology.role_pools_of(config.roles)
        ranks = {name: pool.ranks for name, pool in pools.items()}
        assert sum(ranks.values()) == gpus - 1
        places = config.topology.places_of(config.roles)
        own = PoolMap(ranks, places, config.batch.micro_batches, config.topology.depth)
        assert map_fits(work, hardware, own)
    sizes = released_models()[model].encoders
    needed = bytes_beside(config, work, sizes, work.shape.num_parameters)
    assert needed.keys() == {"text", "validator"}
    assert max(needed.values()) < hardware.usable_bytes, needed


@pytest.mark.slow
def test_one_expert_alone_takes_its_part_and_a_validator_both():
    def work(*settings):
        return Workload.of(load_recipe("wan22-a14b", settings), "a14b")

    both, high, low = (work(f"model.expert={expert}") for expert in ("both", "high", "low"))
    one = both.shape.num_parameters // 2
    for role in ("generator", "teacher", "fake_score"):
        assert both.shape_of(role).num_parameters == 2 * one
        assert high.shape_of(role).num_parameters == low.shape_of(role).num_parameters == one
    assert (high.rollout, both.rollout, low.rollout) == (2.0, 2.5, 4.0)
    whole, alone, frozen = (generator_memory(each, 32, 1, 2) for each in (both, high, low))
    # Weights, gradients, second moments and the average: 16 bytes of a parameter.
    assert whole.state - alone.state == 16 * one / 32
    # Its rollouts begin with the other expert, in the type of its products.
    assert frozen.state - alone.state == 2 * one / 32
    adapted = work("model.expert=low", "generator.lora={}", "generator.compute.weights=bf16")
    assert generator_memory(adapted, 32, 1, 2).base == 2 * one
    assert companion_bytes(adapted, 32) == 2 * one

    options = ("--model", "a14b", "--gpus", 65, "--json")
    told = [
        json.loads(sgmd("plan", "wan22-a14b", *options, f"model.expert={expert}").stdout)
        for expert in ("both", "high")
    ]
    assert told[0]["memory_beside_gb"] == told[1]["memory_beside_gb"]


@pytest.mark.slow
def test_a_refusal_of_memory_names_the_size_that_it_is_counted_at():
    sizes = "{num_frames: 81, height: 480, width: 832}, {num_frames: 33, height: 832, width: 480}"
    options = ("--model", "14b", "--gpus", 2, "--gpu-memory", 24, "validation.every=0")
    # Weights alone are too much; with fewer samples fewer orders of calls are tried to find that.
    options += ("batch={size: 16, micro_batches: 1}",)
    plain = sgmd("plan", "wan21-14b", *options)
    several = sgmd("plan", "wan21-14b", *options, f"video.buckets=[{sizes}]")
    words = "at 480x832x81, the largest size of video.buckets"
    assert words in " ".join(several.stderr.split())
    assert "video.buckets" not in plain.stderr
