"""`sgmd encode`: captioned clips become latents and text embeddings, by Ray Data actor pools.

    plan (ours: parts) -> Ray Data: read, decode, encode -> rows, in order -> parts -> index

The plan and the counting are ours, the execution is Ray Data's. A part is written when all its rows
have come back, good or bad, and under a name that the plan fixes. So a row that Ray computes twice,
or a command that is killed and started again, leaves every sample in the set exactly once.
"""

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipelines.data.making import encode_stages
from pipelines.data.making.encode_options import EncodeOptions
from pipelines.data.making.encode_plan import digest, plan_parts
from pipelines.data.making.encode_writer import PartWriter
from pipelines.data.making.journal import filling
from pipelines.data.making.set_report import SetReport, set_facts
from pipelines.data.shards.filesystem import canonical_address, open_folder
from pipelines.data.shards.schema import Encoding
from sgmd_core.errors import DataError
from workers.models.content import fingerprint
from workers.models.families import family_of


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeReport(SetReport):
    """Content of a folder of encoded shards at the end of `sgmd encode`.

    Attributes:
        encoding: Shapes, type, and the fingerprints of the networks.
    """

    encoding: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Names and values as the command prints them."""
        return SetReport.to_json(self) | {"encoding": self.encoding}


def encode(
    src: str,
    dst: str,
    model: str,
    options: EncodeOptions,
    on_progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> EncodeReport:
    """Encodes a set of captioned clips; run again, it goes on where it was stopped.

    Args:
        src: Folder of video shards, local or `s3://bucket/prefix`.
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
    encoding = encoding_for(model, options)
    parts = plan_parts(*open_folder(src), options.shard_clips)
    if not parts:
        raise DataError(
            f"encoding {src}",
            "no such folder, or no shard in it",
            "shards of captioned videos",
            "`sgmd prepare` makes some",
        )
    settings = {
        "source": canonical_address(src),
        "parts": digest(parts),
        "encoding": asdict(encoding),
        "format": asdict(options.wanted),
    }
    with filling(dst, "encode", settings) as journal:
        num_before = sum(shard.num_rows for shard in journal.shards.values())
        missing = [part for part in parts if part.name not in journal.parts]
        if missing and not journal.is_complete:
            writer = PartWriter(
                journal, missing, encoding, options.max_bad_fraction, f"encoding {src}"
            )
            readable = [part for part in missing if part.num_rows]
            total = sum(part.num_rows for part in parts)
            with closing(encode_stages.run_encoding(src, model, options, readable)) as lines:
                for line in lines:
                    writer.take(line)
                    on_progress("clips", total - writer.num_waiting, total)
            writer.close()
        journal.finish()
    return EncodeReport(**set_facts(dst, journal, num_before, started), encoding=asdict(encoding))


def encoding_for(model: str, options: EncodeOptions) -> Encoding:
    """Returns what the shards state about their values.

    Raises:
        ModelFolderError: the model folder cannot be used.
        ShapeError: the clips do not fit the networks.
    """
    folder = family_of(model).inspect(Path(model))
    num_frames, height, width, _ = options.pixel_shape
    return Encoding(
        latent_shape=folder.latent_shape(num_frames, height, width),
        text_shape=(options.text_length, folder.text_width),
        dtype=options.dtype,
        vae=fingerprint(model, [folder.layout.autoencoder]),
        text_encoder=fingerprint(model, folder.layout.text),
    )
