"""`sgmd recipes`: list, show, copy, schema."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from pipelines.commands.options import Json, PlainCommand, PlainGroup, RecipeName
from pipelines.commands.output import show
from sgmd_core.errors import ConfigError

app = typer.Typer(
    cls=PlainGroup, no_args_is_help=True, help="The recipes that ship, to read and to copy."
)


@app.command("list", cls=PlainCommand)
def list_recipes(as_json: Json = False) -> None:
    """List the recipes that ship."""
    from pipelines.config.recipe_files import shipped_recipes

    recipes = shipped_recipes()
    rows = [{"name": r.name, "summary": r.summary, "path": str(r.path)} for r in recipes]
    table = Table("recipe", "what it is", box=None)
    for recipe in recipes:
        table.add_row(recipe.name, recipe.summary)
    show(rows, as_json, table)


@app.command("show", cls=PlainCommand)
def show_recipe(recipe: RecipeName, as_json: Json = False) -> None:
    """Print a recipe, with every key explained."""
    from pipelines.config.recipe_files import find_recipe, recipe_text
    from pipelines.config.yaml_text import read_yaml

    text = recipe_text(find_recipe(recipe))
    show(read_yaml(text), as_json, text.rstrip("\n"))


@app.command("copy", cls=PlainCommand)
def copy_recipe(
    recipe: RecipeName,
    target: Annotated[
        Path | None, typer.Argument(help="File to write; default RECIPE.yaml")
    ] = None,
    as_json: Json = False,
) -> None:
    """Copy a recipe, to be edited."""
    from cluster.storage import write_text
    from pipelines.config.recipe_files import find_recipe, recipe_text
    from pipelines.run.outputs import require_on_disk, require_output_folder

    source = find_recipe(recipe)
    target = target or Path(source.name)
    require_on_disk(target, "the file to write")
    require_output_folder(target, "the file to write", is_file=True)
    if target.exists():
        raise ConfigError(
            f"copying the recipe {recipe}", f"{target} is there already", "a new file"
        )
    write_text(str(target), recipe_text(source))
    show({"path": str(target)}, as_json, f"{target}    run it: sgmd distill {target}")


@app.command("schema", cls=PlainCommand)
def show_schema() -> None:
    """Print the JSON schema of a distillation recipe, for editors that check YAML."""
    from pipelines.config.recipe import json_schema

    show(json_schema(), True)
