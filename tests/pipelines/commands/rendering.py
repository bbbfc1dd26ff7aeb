"""Renders results as the command line shows them at a width."""

import io
from collections.abc import Sequence

from rich.console import Console, RenderableType


def rendered(parts: Sequence[RenderableType], columns: int) -> str:
    """The text that a terminal of so many columns shows."""
    console = Console(file=io.StringIO(), width=columns, highlight=False, markup=False)
    for part in parts:
        console.print(part)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()
