"""`sgmd doctor`."""

from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from pipelines.commands.options import Json
from pipelines.commands.output import show, working


def doctor(
    address: Annotated[
        str | None, typer.Option(help="Ray cluster to reach: auto, HOST:PORT")
    ] = None,
    storage: Annotated[str | None, typer.Option(help="Folder or s3://bucket/prefix to try")] = None,
    as_json: Json = False,
) -> None:
    """Say what this machine has, what is missing, and how to get it."""
    with working():
        from pipelines.doctor import Status, examine

        findings = examine(address=address, storage=storage)
    table = Table(title="sgmd doctor", title_justify="left")
    for heading in ("check", "", "found", "what to do"):
        table.add_column(heading, overflow="fold")
    colours = {Status.GOOD: "green", Status.LIMITED: "yellow", Status.MISSING: "red"}
    for finding in findings:
        status = Text(finding.status, style=colours[finding.status])
        table.add_row(finding.name, status, finding.found, finding.remedy)
    rows = [
        {"check": item.name, "status": item.status, "found": item.found, "remedy": item.remedy}
        for item in findings
    ]
    show(rows, as_json, table)
    if any(item.status is Status.MISSING for item in findings):
        raise typer.Exit(1)
