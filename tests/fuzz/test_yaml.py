"""A damaged recipe is read, or refused with a ConfigError in words."""

from pathlib import Path

from pipelines.config.recipe import DistillConfig, load_recipe
from pipelines.config.recipe_files import shipped_recipes
from sgmd_core.errors import ConfigError
from tests.fuzz.mutations import NUM_CASES, mutate_text, time_limit

RECIPES = [
    recipe.path.read_text(encoding="utf-8")
    for recipe in shipped_recipes()
    if "pretrain" not in recipe.name
]


def test_a_damaged_recipe_is_read_or_refused_in_words(tmp_path: Path):
    path, outcomes = tmp_path / "recipe.yaml", set()
    for seed in range(NUM_CASES):
        text = mutate_text(RECIPES[seed % len(RECIPES)], seed)
        path.write_bytes(text.encode("latin-1" if seed % 4 == 0 else "utf-8", "replace"))
        with time_limit():
            try:
                outcome: object = load_recipe(str(path))
            except ConfigError as error:
                outcome = error
        outcomes.add(type(outcome))
        assert len(str(outcome)) < 20_000, seed
    assert outcomes <= {DistillConfig, ConfigError}
    assert ConfigError in outcomes
