"""Dockerfile of an image with the program and everything that it needs."""

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from cluster.manifests.deployment import commented


def dockerfile(image: str, folders: Sequence[str], python: str, made_by: str) -> str:
    """The Dockerfile, to be built in the source tree.

    Args:
        image: Name of the image.
        folders: Folders of the source tree that the program needs.
        python: Version of Python, such as 3.11.
        made_by: Command that made it, for its first line.
    """
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "assets"),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,
    )
    return templates.get_template("Dockerfile.j2").render(
        image=image, folders=folders, python=python, made_by=commented(made_by)
    )
