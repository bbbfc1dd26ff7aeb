"""Further sets of captions of a recipe: section `data.also`."""

from pydantic import Field

from pipelines.config.section import Section
from pipelines.data.shards.columns import RecipeColumnNames


class FurtherCaptions(Section):
    """Captions besides `data.train`."""

    source: str
    """A folder of shards or a file of captions, local or `s3://`, as `data.train`."""
    weight: float = Field(default=1.0, gt=0, le=1e6)
    """Its share of the samples is this over the sum of all weights."""
    columns: RecipeColumnNames = RecipeColumnNames()
    """Names of its columns; null finds them by their usual names."""
