"""Captions of a recipe, in one set or several: section `data`."""

from pydantic import Field

from pipelines.config.section import Section
from pipelines.data.shards.columns import RecipeColumnNames
from pipelines.data.shards.filesystem import S3Settings
from pipelines.data.stream.plan import ShuffleSettings
from pipelines.data.stream.ray_stream import ReadAheadSettings


class FurtherCaptions(Section):
    """Captions besides `data.train`."""

    source: str
    """A folder of shards or a file of captions, local or `s3://`, as `data.train`."""
    weight: float = Field(default=1.0, gt=0, le=1e6)
    """Its share of the samples is this over the sum of all weights."""
    columns: RecipeColumnNames = RecipeColumnNames()
    """Names of its columns; null finds them by their usual names."""


class DataSettings(Section):
    """Captions: folders of Parquet shards or files of captions, local or `s3://`.

    A file is a `.txt` with one prompt a line, or a `.csv`, `.tsv`, `.json`, `.jsonl` or `.parquet`
    with a column `caption`, `prompt` or `text`.
    """

    train: str
    """Captions that the generator is trained on."""
    validation: str = ""
    """Held-out captions; needed when `validation.every` is above 0, and to evaluate."""
    columns: RecipeColumnNames = RecipeColumnNames()
    """Names of the columns in the shards of `train`; null finds them by their usual names."""
    validation_columns: RecipeColumnNames | None = None
    """The same for `validation`; null: as in `columns`."""
    stored_text: bool = True
    """Use embeddings that shards carry, if the recipe's text encoder made them."""
    text_cache: int = Field(default=1024, ge=0)
    """Captions whose embeddings are remembered; a full one of 512 x 4096 takes 8 MB."""
    max_caption_chars: int = Field(default=4096, ge=1)
    """Longer captions are quarantined."""
    prompt_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the training captions that are replaced by the empty one, drawn for each sample of
    each iteration."""
    max_bad_fraction: float = Field(default=0.01, ge=0, le=1)
    """Share of the rows that may be unusable; past it the run stops and names the worst shards."""
    shuffle: ShuffleSettings = ShuffleSettings()
    """Mixing of rows."""
    read_ahead: ReadAheadSettings = ReadAheadSettings()
    """Reading of data ahead of the training."""
    s3: S3Settings = S3Settings()
    """Requests to an S3 server. Endpoint and keys come from the usual AWS variables."""
    weight: float = Field(default=1.0, gt=0, le=1e6)
    """Weight of `train` among several sets; its share of samples is this over the sum of all."""
    also: tuple[FurtherCaptions, ...] = Field(default=(), max_length=64)
    """Further sets of captions, such as `[{source: more.txt, weight: 0.5}]`. Each sample is of a
    set that is drawn by weight; each set has epochs of its own."""
