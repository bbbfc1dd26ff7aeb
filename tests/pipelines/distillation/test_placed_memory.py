"""Memory of a run's ranks, compared with that of the machines that they are placed on."""

from dataclasses import replace

import pytest

from cluster.ray.capacity import Capacity
from pipelines.config.recipe import load_recipe
from pipelines.distillation.groups import open_groups
from pipelines.distillation.placed_memory import placed_needs, require_room
from pipelines.distillation.pools import pools_of
from pipelines.distillation.preflight import run_preflight
from pipelines.distillation.readiness import process_needs
from pipelines.planning.stored_text import ENCODING
from pipelines.planning.workload import Workload
from pipelines.run.folder import RunFolder
from sgmd_core.errors import ConfigError
from workers.models.families import family_of

TIB = 2**40
OPTIONS = {
    "map": (
        "topology.mode=map",
        "topology.pools={learn: {ranks: 2, gpus: 1}, score: {ranks: 1, gpus: 1}}",
        "topology.roles={generator: learn, fake_score: score, teacher: [learn, score]}",
        "batch.micro_batches=1",
    ),
    "pools": ("topology.mode=pools", "topology.generator={ranks: 2, gpus: 0.5}"),
    "fused": ("topology.mode=fused", "topology.fused={ranks: 2, gpus: 1}"),
}


def needs_of(mode: str, *options: str):
    config = load_recipe("tiny", ["sweep.settings={}", *OPTIONS[mode], *options])
    model = family_of(config.model_folder).inspect(config.model_folder)
    return config, process_needs(config, model, ENCODING)


@pytest.mark.parametrize("mode", OPTIONS)
def test_every_rank_of_the_pools_of_a_run_has_a_need_but_the_feed(mode):
    config, needs = needs_of(mode, "validation.every=10")
    pools = pools_of(config)
    placed = placed_needs(needs, {pool.name: ["here"] * pool.num_ranks for pool in pools})
    expected = {f"{pool.name}[{rank}]" for pool in pools for rank in range(pool.num_ranks)}
    assert {one.rank for one in placed} == expected - {"feed[0]"}
    assert all(one.need.num_bytes > 0 for one in placed)


def test_a_validator_on_a_gpu_has_a_need_of_main_memory():
    config, needs = needs_of("pools", "validation.every=10", "topology.validator.gpus=1")
    (placed,) = placed_needs(needs, {"validator": ["n1"]})
    handed = 4 * Workload.of(config).num_trained("generator")
    assert placed.main_bytes > 2 * handed
    with pytest.raises(ConfigError, match=r"main memory of machine one.*validator\[0\]"):
        require_room([placed], {"n1": Capacity(handed, (), "one")}, Workload.of(config))


def test_a_gpu_that_is_too_small_is_refused_by_machine_pool_and_rank():
    config, needs = needs_of("map")
    nodes = {"learn": ["n1", "n2"], "score": ["n1"]}
    placed, work = placed_needs(needs, nodes), Workload.of(config)
    room = {
        "n1": Capacity(TIB, (TIB,) * 2, "large", 2.0),
        "n2": Capacity(TIB, (TIB,), "small", 1.0),
    }
    assert require_room(placed, room, work) == []
    # A machine whose GPUs torch does not see, and one that did not answer, are not judged.
    assert require_room(placed, {"n2": Capacity(TIB, (), "small", 1.0)}, work) == []
    with pytest.raises(ConfigError) as refused:
        require_room(placed, {**room, "n2": replace(room["n2"], gpu_bytes=(2**20,))}, work)
    words = str(refused.value)
    assert "machine small" in words
    assert "learn[1]" in words
    assert "0.00105 GB" in words
    assert "topology.pools.NAME.labels" in words
    assert "generator.compute.checkpointing=true" in words


def test_ranks_that_share_gpus_and_main_memory_must_fit_together():
    config, needs = needs_of("pools")
    work = Workload.of(config)
    placed = placed_needs(needs, {"generator": ["n1", "n1"], "text": ["n2"], "feed": ["n2"]})
    (first, _, text) = placed
    one, main = first.need.num_bytes, text.main_bytes
    gpu = Capacity(TIB, (int(2 * one) + 1,), "one", 1.0)
    room = {"n1": gpu, "n2": Capacity(int(main) + 1, (), "two")}
    assert require_room(placed, room, work) == []
    with pytest.raises(ConfigError, match=r"machine one.*generator\[0\].*generator\[1\]"):
        require_room(placed, {"n1": replace(gpu, gpu_bytes=(int(1.5 * one),))}, work)
    with pytest.raises(ConfigError, match=r"main memory of machine two.*text\[0\]"):
        require_room(placed, {"n2": Capacity(int(main / 1.3), (), "two")}, work)


def test_a_model_that_is_a_little_above_a_memory_is_warned_of_and_ends_no_run():
    config, needs = needs_of("pools")
    work = Workload.of(config)
    placed = placed_needs(needs, {"generator": ["n1", "n1"], "text": ["n2"]})
    one, main = placed[0].need.num_bytes, placed[-1].main_bytes
    share = Capacity(TIB, (int(2 * one / 1.1),), "one", 1.0)
    alone = Capacity(TIB, (int(one / 1.1),) * 3, "one", 3.0)
    less = Capacity(int(main / 1.1), (), "two")
    for room, words in (
        ({"n1": share}, ("While checking the GPUs of machine one", "generator[1]", "in all")),
        ({"n1": alone}, ("While checking the GPUs of machine one", "generator[0]", "to fit its")),
        ({"n2": less}, ("While checking the main memory of machine two", "text[0]")),
    ):
        (told,) = require_room(placed, room, work)
        assert all(word in told for word in (*words, "The run continues")), told
    for factor, refused in ((1.19, False), (1.21, True)):
        edge = {"n2": replace(less, memory_bytes=int(main / factor))}
        if refused:
            with pytest.raises(ConfigError, match="main memory of machine two"):
                require_room(placed, edge, work)
        else:
            assert len(require_room(placed, edge, work)) == 1


def test_nodes_of_one_address_are_judged_apart_and_instances_of_a_gpu_by_rank():
    config, needs = needs_of("pools")
    work = Workload.of(config)
    placed = placed_needs(needs, {"generator": ["n1", "n2"]})
    one = placed[0].need.num_bytes
    # Two raylets of a host, each with one of its GPUs and one rank that takes most of it.
    gpu = Capacity(TIB, (int(1.3 * one),), "10.0.0.1#n1", 1.0)
    assert require_room(placed, {"n1": gpu, "n2": replace(gpu, name="10.0.0.1#n2")}, work) == []
    both = placed_needs(needs, {"generator": ["n1", "n1"]})
    with pytest.raises(ConfigError, match=r"10\.0\.0\.1#n1"):
        require_room(both, {"n1": gpu}, work)
    # Ray has seven instances of a GPU, of which torch sees the first.
    seven = replace(gpu, num_gpus=7.0)
    assert require_room(both, {"n1": seven}, work) == []
    with pytest.raises(ConfigError, match=r"generator\[0\]"):
        require_room(both, {"n1": replace(seven, gpu_bytes=(int(one / 2),))}, work)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_run_whose_machine_is_too_small_ends_before_a_role_loads(tmp_path, monkeypatch):
    import cluster.ray.capacity as capacity

    monkeypatch.setattr(capacity, "memory_bytes", lambda: (2**20, 2**20))
    small = [f"topology.{name}.cpus=0.1" for name in ("generator", "fake_score", "teacher")]
    (tmp_path / "prompts.txt").write_text("a red circle moves left\n")
    small += [f"data.train={tmp_path / 'prompts.txt'}", "validation.every=0"]
    small += ["checkpoint.keep_best=0"]
    config = load_recipe("tiny", [f"output={tmp_path}", "topology.mode=pools", *small])
    started = open_groups(config, run_preflight(config), RunFolder(tmp_path), None, 1)
    with pytest.raises(ConfigError, match=r"main memory of machine.*generator\[0\]"), started:
        pytest.fail("the roles have been started")
