"""Texts of a run whose embeddings lie with its data, and what a text encoder is needed for.

encoder in the model folder    embeddings count that name the content of its weights
none                           embeddings of all sets must name one maker, and have every text
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cluster.redaction import without_secrets
from pipelines.config.recipe import DistillConfig
from pipelines.data.shards.prompts import read_stored_prompts
from pipelines.data.shards.schema import Encoding
from pipelines.data.shards.values import unpack_rows
from pipelines.data.stream.inspect import FolderFacts, first_texts, inspect_folder
from pipelines.data.stream.source import Source
from pipelines.planning.stored_text import TEXT, VALIDATOR, StoredText, wanted_prompts
from sgmd_core.errors import ConfigError
from workers.models.content import fingerprint
from workers.models.folder import ModelFolder


@dataclass(frozen=True, slots=True)
class LookedAtSet:
    """A set of captions after a first look.

    Attributes:
        source: Where it is, and what is read of it.
        data: What a first look tells.
    """

    source: Source
    data: FolderFacts


def text_maker_of(config: DistillConfig, model: ModelFolder, looked: Sequence[LookedAtSet]) -> str:
    """Fingerprint of what embeds a run's text; empty where no embedding is stored that is used.

    It is that of the text encoder's weights, or, of a folder without them, the one that the
    embeddings of all sets name.

    Raises:
        ConfigError: They name several, and there are no weights to tell which is meant.
    """
    named = {
        one.data.encoding.text_encoder: one.source.url
        for one in looked
        if config.data.stored_text and one.data.encoding is not None
    }
    if not named or model.has_text_encoder:
        return fingerprint(model.path, model.layout.text) if named else ""
    if len(named) > 1:
        makers = (f"{maker} of {without_secrets(url)}" for maker, url in named.items())
        raise ConfigError(
            f"reading embeddings for the model {model.path}, which has no text encoder",
            f"embeddings that name several: {', '.join(makers)}",
            "embeddings of one text encoder in all sets of data.train and data.also",
            "Encode the sets with one model, or download its text encoder into the folder",
        )
    return next(iter(named))


def has_text(data: FolderFacts, config: DistillConfig, model: ModelFolder, maker: str) -> bool:
    """True if a set brings embeddings as the run's text encoder would make them."""
    return data.encoding is not None and _fits(data.encoding, config, model, maker)


def find_stored_text(
    config: DistillConfig,
    model: ModelFolder,
    looked: Sequence[LookedAtSet],
    held_out: Sequence[str],
    maker: str,
) -> StoredText:
    """Embeddings beside those of the training captions, and what a text encoder is needed for.

    Args:
        config: The run.
        model: Its networks.
        looked: Its sets of captions; none where not all of them bring embeddings.
        held_out: Captions of its validations.
        maker: Fingerprint of its text encoder.
    """
    prompts: dict[str, NDArray[np.float32]] = {}
    for one in looked:
        prompts |= _prompts_of(one.source, config, model, maker)
    wanted = wanted_prompts(config)
    lacking = tuple(name for text, name in wanted.items() if text not in prompts)
    found = {TEXT: lacking if looked else ("training captions",)}
    negative = config.model.negative_prompt
    validation: dict[str, NDArray[np.float32]] = {}
    if held_out:
        stored = _validation_texts(config, model, held_out, maker) if looked else {}
        validation = prompts | stored
        names = {**dict.fromkeys(held_out, "validation captions"), negative: wanted[negative]}
        found[VALIDATOR] = tuple(
            dict.fromkeys(name for text, name in names.items() if text not in validation)
        )
        validation = {} if found[VALIDATOR] else {text: validation[text] for text in names}
    return StoredText(
        {name: each for name, each in found.items() if each},
        prompts,
        validation,
        named="" if model.has_text_encoder else maker,
    )


def _validation_texts(
    config: DistillConfig, model: ModelFolder, held_out: Sequence[str], maker: str
) -> dict[str, NDArray[np.float32]]:
    """Embeddings that the set of validation captions brings; none where it brings others' or none.

    Raises:
        DataError: It cannot be read.
    """
    settings = config.data
    names = settings.validation_columns or settings.columns
    source = Source(settings.validation, settings.s3, names=names)
    data = inspect_folder(source, config.seed, settings.shuffle)
    if not has_text(data, config, model, maker):
        return {}
    source = replace(source, encoding=data.encoding)
    return _prompts_of(source, config, model, maker) | first_texts(source, config.seed, held_out)


def _prompts_of(
    source: Source, config: DistillConfig, model: ModelFolder, maker: str
) -> dict[str, NDArray[np.float32]]:
    """Embeddings of the wanted prompts of a set, if the recipe's text encoder made them."""
    place = source.open(probe=False)
    found = read_stored_prompts(place.filesystem, place.root, source.s3)
    if found is None or not _fits(found.encoding, config, model, maker):
        return {}
    wanted = wanted_prompts(config)
    return {
        text: unpack_rows(packed, found.encoding)
        for text, packed in found.packed.items()
        if text in wanted
    }


def require_all_stored(model: ModelFolder, texts: StoredText) -> None:
    """Refuse a folder without text encoder where a text has no stored embedding.

    Raises:
        ConfigError: One lacks it; names the texts.
    """
    if texts.lacking:
        lacking = dict.fromkeys(text for each in texts.lacking.values() for text in each)
        made = f" made by {texts.named}" if texts.named else ""
        raise ConfigError(
            f"preparing the texts of a run of the model {model.path}, which has no text encoder",
            f"no stored embeddings{made} of {', '.join(lacking)}",
            "stored embeddings of every text, of model.text_length positions, and data.stored_text",
            "Store them where the text encoder is, by `sgmd encode` of the training and the "
            "validation captions with --negative; set validation.every=0 to do without the latter; "
            f"or download {model.path / model.layout.text_encoders[0]}",
        )


def _fits(encoding: Encoding, config: DistillConfig, model: ModelFolder, maker: str) -> bool:
    """Returns True if stored embeddings are what the recipe's text encoder would make."""
    shape = (config.model.text_length, model.text_width)
    return encoding.text_shape == shape and encoding.text_encoder == maker != ""
