"""Which resources a recipe asks for."""

from pipelines.config.recipe import load_recipe
from pipelines.distillation.groups import pools_of


def test_every_role_asks_for_what_its_section_says():
    config = load_recipe(
        "tiny",
        [
            "topology.teacher={replicas: 2, cpus: 1, strategy: strict_spread}",
            "topology.text={gpus: 1, labels: {pool: light}}",
            "topology.validator.resources={h100: 0.5}",
        ],
    )
    pools = {pool.name: pool for pool in pools_of(config)}
    assert list(pools) == ["generator", "fake_score", "teacher", "text", "feed", "validator"]
    assert (pools["teacher"].num_ranks, pools["teacher"].strategy) == (2, "STRICT_SPREAD")
    assert pools["text"].bundle == {"CPU": 0.25, "GPU": 1.0}
    assert pools["text"].labels == {"pool": "light"}
    assert pools["validator"].bundle == {"CPU": 0.25, "h100": 0.5}
    assert pools["generator"].bundle == {"CPU": 0.5}


def test_without_validation_nobody_validates():
    config = load_recipe("tiny", ["validation.every=0"])
    assert "validator" not in {pool.name for pool in pools_of(config)}
