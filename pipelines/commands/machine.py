"""`sgmd doctor`."""

from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from pipelines.commands.options import Json, Overrides
from pipelines.commands.output import show, working


def doctor_command(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="[RECIPE]", help="Recipe that names the output and the models to check."
        ),
    ] = None,
    overrides: Overrides = None,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster whose machines are checked: auto, HOST:PORT")
    ] = None,
    storage: Annotated[
        str | None, typer.Option(help="Folder or s3://bucket/prefix whose access is checked")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Model folder or address that all machines must have")
    ] = None,
    as_json: Json = False,
) -> None:
    """List what this machine or a cluster has and lacks, and how to get what is missing."""
    with working():
        from pipelines.doctoring.examine import examine
        from pipelines.doctoring.findings import Status, summarize_machines

        config = None
        if recipe is not None:
            from pipelines.config.recipe import load_recipe

            config = load_recipe(recipe, overrides or [])
        findings = examine(address, storage, model, config)
    table = Table(title="sgmd doctor", title_justify="left")
    for heading in ("check", "", "found", "what to do"):
        table.add_column(heading, overflow="fold")
    colours = {Status.GOOD: "green", Status.LIMITED: "yellow", Status.MISSING: "red"}
    for finding in summarize_machines(findings):
        status = Text(finding.status, style=colours[finding.status])
        table.add_row(finding.name, status, Text(finding.found), Text(finding.remedy))
    rows = [
        {
            "check": item.name,
            "machine": item.machine,
            "status": item.status,
            "found": item.found,
            "remedy": item.remedy,
        }
        for item in findings
    ]
    show(rows, as_json, table)
    if any(item.status is Status.MISSING for item in findings):
        raise typer.Exit(1)
