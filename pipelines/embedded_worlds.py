"""The embedded worlds by name."""

from pipelines.open_shapes import OPEN_SHAPES
from pipelines.shapes import SHAPES_WORLD, EmbeddedWorld
from sgmd_core.worlds import WorldName

_WORLDS = {WorldName.SHAPES: SHAPES_WORLD, WorldName.OPEN: OPEN_SHAPES}


def embedded_world(name: WorldName) -> EmbeddedWorld:
    """The world of that name."""
    return _WORLDS[name]
