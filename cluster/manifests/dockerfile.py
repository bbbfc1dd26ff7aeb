"""Dockerfile of an image with the program and everything that it needs."""

from collections.abc import Sequence

from cluster.manifests.deployment import commented, filled_in


def dockerfile(image: str, folders: Sequence[str], python: str, made_by: str) -> str:
    """The Dockerfile, to be built in the source tree.

    Args:
        image: Name of the image.
        folders: Folders of the source tree that the program needs.
        python: Version of Python, such as 3.11.
        made_by: Command that made it, for its first line.
    """
    words = {"image": image, "folders": folders, "python": python, "made_by": commented(made_by)}
    return filled_in("Dockerfile.j2", **words)
