"""Negative prompts of the recipes that ship, by the model folders that they name."""

from collections.abc import Iterator
from pathlib import Path

from pipelines.config.recipe import DistillConfig
from pipelines.config.recipe_files import recipe_sections, shipped_recipes

_HUB_PREFIX = "models--"


def shipped_negatives(folder: Path) -> Iterator[str]:
    """The negative prompt of each shipped recipe whose model has the name of a folder.

    Args:
        folder: Model folder, or one inside a folder of that name, as the hub's cache has them.
    """
    parts = folder.expanduser().absolute().parts
    names = {part.rpartition("--")[2] if part.startswith(_HUB_PREFIX) else part for part in parts}
    for recipe in shipped_recipes():
        model = recipe_sections(recipe.path, DistillConfig).get("model", {})
        if Path(str(model.get("folder", ""))).name in names and model.get("negative_prompt"):
            yield str(model["negative_prompt"])
