"""`sgmd encode`: captioned clips become latents and text embeddings, by Ray Data actor pools.

    plan (ours: parts) -> Ray Data: read, decode, encode -> rows, in order -> parts -> index

With `text_only`, captions become text embeddings, and no video is read. The empty prompt and the
negative ones are embedded besides (`pipelines.data.shards.prompts`).

The plan and the counting are ours, the execution is Ray Data's. A part is written when all its rows
have come back, good or bad, and under a name that the plan fixes. So a row that Ray computes twice,
or a command that is killed and started again, leaves every sample in the set exactly once.
"""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa

from pipelines.data.clips.bucket_choice import BucketDecoder
from pipelines.data.clips.clip_decoding import ClipDecoder
from pipelines.data.encoding import encode_stages
from pipelines.data.encoding.encode_options import EncodeOptions
from pipelines.data.encoding.encode_plan import Part, digest, plan_parts
from pipelines.data.encoding.encode_writer import PartWriter
from pipelines.data.making.journal import Journal, filling
from pipelines.data.making.set_report import SetReport, set_facts
from pipelines.data.shards.columns import ColumnMap, ColumnNames, column_error, map_columns
from pipelines.data.shards.filesystem import S3Settings, canonical_address
from pipelines.data.shards.index import Shard, write_index
from pipelines.data.shards.prompts import (
    StoredPrompts,
    read_stored_prompts,
    require_few_prompts,
    text_part,
    write_stored_prompts,
)
from pipelines.data.shards.reading import Fault
from pipelines.data.shards.schema import (
    CAPTION,
    REQUIRED_COLUMNS,
    TEXT_EMBEDS,
    VIDEO,
    Encoding,
)
from pipelines.data.shards.stored_buckets import StoredBucket, write_buckets
from pipelines.data.stream.catalogue import Catalogue
from pipelines.data.stream.ray_stream import read_windows
from pipelines.data.stream.source import Source
from pipelines.data.stream.window import REASON
from sgmd_core.errors import ConfigError, DataError
from workers.models.content import fingerprint
from workers.models.families import family_of
from workers.models.folder import require_autoencoder, require_text_encoder
from workers.models.vocabulary import UnknownWords

_CHAPTER_SHARDS = 1000
_NUM_LOOKED_AT = 256  # as many captions as `distill` looks at


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeReport(SetReport):
    """Content of a folder of encoded shards at the end of `sgmd encode`.

    Attributes:
        encoding: Shapes, type, and the fingerprints of the networks.
        columns: Columns of the source that are not named as ours, in words; empty where all are.
        unknown_words: Words of its first captions that the tokenizer does not know.
        prompts: Texts besides the captions whose embeddings are stored.
        buckets: Clips of each size, by its folder; empty where there is one.
    """

    encoding: dict[str, Any]
    columns: str = ""
    prompts: int = 0
    buckets: Mapping[str, int] = field(default_factory=dict)
    unknown_words: UnknownWords

    REPAIR: ClassVar[str] = "repair or remove them, and encode into another folder"

    def to_json(self) -> dict[str, Any]:
        """Names and values as the command prints them."""
        own = {"encoding": self.encoding, "columns": self.columns, "prompts": self.prompts}
        own |= {"buckets": dict(self.buckets)} if self.buckets else {}
        return SetReport.to_json(self) | own | {"unknown_words": asdict(self.unknown_words)}

    def notes(self) -> Sequence[str]:
        """A line for each kind of what is not in the set or not in the tokenizer."""
        unknown = [self.unknown_words.in_words()] if self.unknown_words.num_affected else []
        return [*SetReport.notes(self), *unknown]


def encode(
    src: str,
    dst: str,
    model: str,
    options: EncodeOptions,
    on_progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> EncodeReport:
    """Encodes a set of captioned clips or of captions; run again, it goes on where it was stopped.

    Args:
        src: Folder of shards, local or `s3://bucket/prefix`; with videos, unless `text_only`,
            which takes a file of captions too.
        dst: Folder of the new shards.
        model: Diffusers folder; every machine of the cluster must see it under this path.
        options: What is made, and with how many actors.
        on_progress: Called with (what, clips done, clips in all).

    Raises:
        DataError: a folder cannot be used, the source or the model has changed since an earlier
            run, or too many clips are bad.
        ModelFolderError: the model folder cannot be used.
        ShapeError: the clips do not fit the networks.
    """
    started = time.monotonic()
    encodings = encodings_for(model, options)
    encoding = next(iter(encodings.values()))
    source = _source_of(src, options)
    place = source.open()
    _require_apart(src, dst)
    catalogue = Catalogue(
        place.filesystem, place.root, _CHAPTER_SHARDS, only=place.only, in_order=False
    )
    source, columns = _with_columns(source, catalogue, place.names)
    parts = plan_parts(catalogue, options.shard_clips)
    settings = _settings(src, parts, encoding, options, columns)
    with filling(dst, "encode", settings) as journal:
        num_before = journal.num_good
        num_prompts = _fill(journal, source, model, options, parts, encodings, on_progress)
        if options.buckets:
            _finish_buckets(journal, options)
        journal.finish()
        rows = _rows_of_buckets(journal, options)
    return EncodeReport(
        **set_facts(dst, journal, num_before, started),
        encoding=asdict(encoding),
        columns=columns.in_words(),
        prompts=num_prompts,
        buckets=rows,
        unknown_words=_unknown_words(source, model, parts),
    )


def _fill(
    journal: Journal,
    source: Source,
    model: str,
    options: EncodeOptions,
    parts: Sequence[Part],
    encodings: Mapping[str, Encoding],
    on_progress: Callable[[str, int, int], None],
) -> int:
    """Encodes what the folder lacks, of parts and of prompts; returns how many prompts it has."""
    missing = [part for part in parts if part.name not in journal.parts]
    if journal.is_complete:
        missing = []
    encoding = next(iter(encodings.values()))
    prompts = _prompts_in(journal, encoding)
    lacking = [text for text in dict.fromkeys(("", *options.negatives)) if text not in prompts]
    require_few_prompts(len(prompts) + len(lacking), f"encoding {source.url}")
    writer = None
    if missing:
        attempted = f"encoding {source.url}"
        writer = PartWriter(journal, missing, encodings, options.max_bad_fraction, attempted)
    unit = "captions" if options.text_only else "clips"
    readable = [part for part in missing if part.num_rows]
    total = sum(part.num_rows for part in parts)
    made = encode_stages.run_encoding(source, model, options, readable, lacking)
    with closing(made) as lines:
        for line in lines:
            if line[encode_stages.PART] == encode_stages.PROMPTS:
                prompts[line[CAPTION]] = line[TEXT_EMBEDS]
            elif writer is not None:
                writer.take(line)
                on_progress(unit, total - writer.num_waiting, total)
    if writer is not None:
        writer.close()
    if lacking:
        journal.lease.check()
        # A bucket is a set of its own; runs of one size read it alone.
        for folder in {"": None, **encodings}:
            root = f"{journal.root}/{folder}".rstrip("/")
            write_stored_prompts(journal.filesystem, root, StoredPrompts(encoding, prompts))
    return len(prompts)


def _rows_of_buckets(journal: Journal, options: EncodeOptions) -> dict[str, int]:
    """Clips of each bucket; nothing where there is one size."""
    if not options.buckets:
        return {}
    return {
        folder: sum(each.num_rows for each in _shards_of(journal, folder))
        for folder in options.folders
    }


def _shards_of(journal: Journal, folder: str) -> list[Shard]:
    """Shards of a bucket, by their paths within it."""
    start = f"{folder}/"
    return [
        replace(each, path=each.path.removeprefix(start))
        for each in journal.shards.values()
        if each.path.startswith(start)
    ]


def _finish_buckets(journal: Journal, options: EncodeOptions) -> None:
    """Makes a set of each bucket's folder, and names all of them."""
    journal.lease.check()
    rows = _rows_of_buckets(journal, options)
    for folder in options.folders:
        root = f"{journal.root}/{folder}"
        write_index(journal.filesystem, root, _shards_of(journal, folder))
    sizes = (shape[:3] for shape in options.pixel_shapes)
    buckets = [
        StoredBucket(folder, *size, rows[folder])
        for folder, size in zip(options.folders, sizes, strict=True)
    ]
    write_buckets(journal.filesystem, journal.root, buckets)


def _prompts_in(journal: Journal, encoding: Encoding) -> dict[str, bytes]:
    """Prompts that the folder has in this encoding."""
    found = read_stored_prompts(journal.filesystem, journal.root)
    fits = found is not None and found.encoding == text_part(encoding)
    return dict(found.packed) if found is not None and fits else {}


def _source_of(src: str, options: EncodeOptions) -> Source:
    """Captions of a set, and pixels unless text embeddings are made alone."""
    source = Source(
        src,
        # A reader a task: opening Arrow's client would cost more than it saves.
        S3Settings(native_reads=False),
        max_caption_chars=options.max_caption_chars,
        names=options.names,
        max_hang_s=options.max_hang_s,
    )
    if options.text_only:
        return source
    shape, *further = options.pixel_shapes
    return replace(
        source,
        columns=(VIDEO,),
        decode=BucketDecoder(options.buckets, options.limits)
        if options.buckets
        else ClipDecoder(options.wanted, options.limits),
        pixel_shape=shape,
        further_shapes=tuple(further),
    )


def _with_columns(
    source: Source, catalogue: Catalogue, names: ColumnNames
) -> tuple[Source, ColumnMap]:
    """The source with the names of its columns, and where the first shard that fits has them.

    Raises:
        DataError: None of the first shards has them, or it is not clear which they are.
    """
    wanted = (*REQUIRED_COLUMNS, *source.columns)
    settled = catalogue.settle_names(names)
    schemas = catalogue.first_schemas
    found = {path: map_columns(schema, settled, wanted) for path, schema in schemas.items()}
    fitting = [columns for columns in found.values() if isinstance(columns, ColumnMap)]
    if schemas and not fitting:
        if VIDEO in wanted:
            _require_videos(source.url, schemas.values(), settled)
        path, fault = next(iter(found.items()))
        assert isinstance(fault, Fault), "none of them fits"
        raise column_error(source.url, path, fault, names, wanted)
    return replace(source, settled=settled), fitting[0] if fitting else ColumnMap({})


def _unknown_words(source: Source, model: str, parts: Sequence[Part]) -> UnknownWords:
    """Counts words of the source's first captions that the tokenizer does not know."""
    source = replace(source, columns=(), decode=None)
    reader = source.open_reader()
    windows = enumerate(each for part in parts for each in part.windows)
    tables = read_windows(reader, source, windows)
    good = (table.filter(table.column(REASON).is_null()) for table in tables)
    texts = (text for table in good for text in table.column(CAPTION).to_pylist())
    captions = [*islice(texts, _NUM_LOOKED_AT)]
    return family_of(model).load_tokenizer(Path(model)).unknown_words(captions)


def _require_videos(src: str, schemas: Collection[pa.Schema], names: ColumnNames) -> None:
    """Names the remedy for a set that has captions and no videos.

    Raises:
        DataError: No shard has a column of videos, and one has all that text embeddings need.
    """
    if names.video is not None or any(VIDEO in schema.names for schema in schemas):
        return
    if any(isinstance(map_columns(each, names, REQUIRED_COLUMNS), ColumnMap) for each in schemas):
        raise DataError(
            f"encoding {src}",
            f"captions without a column {VIDEO}",
            "captioned videos",
            "Add --text-only to make text embeddings alone, which is what `sgmd distill` reads of"
            f" an encoded set, or name the column of videos: {names.setting_of(VIDEO)}",
        )


def _settings(
    src: str,
    parts: Sequence[Part],
    encoding: Encoding,
    options: EncodeOptions,
    columns: ColumnMap,
) -> dict[str, Any]:
    """Everything that decides the content of the new shards; see `open_journal`."""
    wanted: dict[str, Any] = {"format": asdict(options.wanted)}
    if options.text_only:
        wanted = {"text_only": True}
    elif options.buckets:
        wanted["buckets"] = [*options.folders]
    return {
        "source": canonical_address(src),
        "parts": digest(parts),
        "encoding": asdict(encoding),
        **wanted,
        **({"columns": dict(columns.stored)} if columns.in_words() else {}),
    }


def encodings_for(model: str, options: EncodeOptions) -> dict[str, Encoding]:
    """Returns what the shards state about their values, by their folder within the set's.

    Raises:
        ModelFolderError: the model folder cannot be used.
        ShapeError: the clips do not fit the networks.
    """
    folder = family_of(model).inspect(Path(model))
    require_text_encoder(folder, f"encoding captions with {model}")
    shapes: list[tuple[int, ...]] = [()]
    vae = ""
    if not options.text_only:
        require_autoencoder(folder, f"encoding videos with {model}")
        shapes = [folder.latent_shape(*shape[:3]) for shape in options.pixel_shapes]
        vae = fingerprint(model, [folder.layout.autoencoder])
    text_shape = (options.text_length, folder.text_width)
    text_encoder = fingerprint(model, folder.layout.text)
    return {
        name: Encoding(shape, text_shape, options.dtype, vae, text_encoder)
        for name, shape in zip(options.folders, shapes, strict=True)
    }


def _require_apart(src: str, dst: str) -> None:
    """Refuses to write new shards among those that are read."""
    source, target = canonical_address(src), canonical_address(dst)
    if f"{target}/".startswith(f"{source.rstrip('/')}/"):
        raise ConfigError(
            f"encoding {src} into {dst}",
            "a folder inside the source, whose next reader would take the new shards for clips",
            "a folder apart from the source",
            "Choose another DST",
        )
