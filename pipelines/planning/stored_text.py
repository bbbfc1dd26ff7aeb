"""Text whose embeddings lie with a run's data, and what needs a text encoder all the same.

    text       embeds training captions, the negative prompt and, with prompt dropout, the empty one
    validator  embeds validation captions and the negative prompt

A process whose texts are all stored loads no text encoder.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cluster.redaction import without_secrets
from pipelines.config.recipe import DistillConfig
from pipelines.data.shards.filesystem import open_folder
from pipelines.data.shards.listing import is_shard, list_chapters
from pipelines.data.shards.prompts import read_stored_prompts
from pipelines.data.shards.scan import open_shards
from pipelines.data.shards.schema import encoding_of
from sgmd_core.errors import DataError

TEXT, VALIDATOR = "text", "validator"
"""Sections of `topology` whose processes embed text."""

ENCODING = frozenset((TEXT, VALIDATOR))
_LOOKED_AT = 8
"""Shards of which the first that can be read tells how captions are stored."""


@dataclass(frozen=True, slots=True)
class StoredText:
    """Texts of a run that need no text encoder.

    Attributes:
        lacking: By section, in words, the texts for which its process loads one.
        prompts: Embeddings (rows, width) of prompts, for the text process.
        validation: Those of all that a validator embeds; empty where it has a text encoder.
        named: Fingerprint of the text encoder as all embeddings name it, where the model folder has
            none to compare them with; else empty.
    """

    lacking: Mapping[str, tuple[str, ...]]
    prompts: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    validation: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    named: str = ""

    @property
    def digests(self) -> dict[str, str]:
        """Digest of each prompt's embedding, as a run's identity has it."""
        return {
            text: hashlib.sha256(repr(rows.shape).encode() + rows.tobytes()).hexdigest()[:16]
            for text, rows in self.prompts.items()
        }

    @property
    def encoding(self) -> frozenset[str]:
        """Sections whose processes load a text encoder."""
        return frozenset(self.lacking)

    def in_words(self) -> str:
        """One line that says which process loads the text encoder, and for what."""
        if self.named:
            return (
                "the model folder has no text encoder: all embeddings lie with the data, and name "
                f"{self.named} as their maker, which is not verified"
            )
        if not self.lacking:
            return "no process loads the text encoder: all embeddings lie with the data"
        parts = (f"{section}: {', '.join(texts)}" for section, texts in self.lacking.items())
        remedy = "`sgmd encode` stores embeddings of captions and, by --negative, of prompts"
        return f"the text encoder is loaded for {'; '.join(parts)}. {remedy}"


def wanted_prompts(config: DistillConfig) -> dict[str, str]:
    """Prompts that the text process embeds beside captions, each with its name."""
    wanted = {"": "the empty prompt (data.prompt_dropout)"} if config.data.prompt_dropout else {}
    return wanted | {config.model.negative_prompt: "the negative prompt"}


def encoding_sections(config: DistillConfig, *, at_addresses: bool = False) -> frozenset[str]:
    """Sections that a plan counts a text encoder for: all but those of sets here that name theirs.

    Who made embeddings is compared before a run starts, not here: it takes reading the text
    encoder's weights.

    Args:
        config: The recipe.
        at_addresses: Take it that sets at addresses, which a plan does not look at, have embeddings
            of their captions and the prompts.
    """
    data = config.data
    if not data.stored_text:
        return ENCODING
    wanted = frozenset(wanted_prompts(config))

    def look(url: str) -> frozenset[str] | None:
        if _is_address(url):
            return wanted if at_addresses else None
        return _local_prompts(url, config) if _has_embeddings(url, config) else None

    trained = [look(url) for url in _trained(config)]
    if None in trained:
        return ENCODING
    known = frozenset[str]().union(*(each for each in trained if each is not None))
    held_out = look(data.validation)
    judged = held_out is not None and config.model.negative_prompt in known | held_out
    needed = {TEXT: not known.issuperset(wanted), VALIDATOR: not judged}
    return frozenset(section for section in needed if needed[section])


def unseen_sets(config: DistillConfig) -> list[str]:
    """Addresses of sets that a plan does not look at, and that may bring stored embeddings."""
    sets = [*_trained(config), *([config.data.validation] if config.validation.every else [])]
    if not config.data.stored_text:
        return []
    return [*dict.fromkeys(without_secrets(url) for url in sets if _is_address(url))]


def lacks_prompts_alone(config: DistillConfig) -> bool:
    """True where all training captions have embeddings, in sets on this machine."""
    return config.data.stored_text and all(_has_embeddings(url, config) for url in _trained(config))


def _trained(config: DistillConfig) -> list[str]:
    return [config.data.train, *(each.source for each in config.data.also)]


def _is_address(url: str) -> bool:
    return "://" in url


def _has_embeddings(url: str, config: DistillConfig) -> bool:
    """True if the first shard of a set of this machine says that it has fitting embeddings."""
    path = Path(url)
    if not url or _is_address(url) or not path.exists():
        return False
    folder, only = (path.parent, path.name) if path.is_file() else (path, "")
    if only and not is_shard(only):
        return False
    try:
        place = open_folder(str(folder))
        first = next(list_chapters(*place, _LOOKED_AT, only=only), ())
        footers = (shard.footer for shard in open_shards(*place, first))
        schema = next((footer.schema for footer in footers if footer is not None), None)
        encoding = None if schema is None else encoding_of(schema)
    except DataError:
        return False
    return encoding is not None and encoding.text_shape[0] == config.model.text_length


def _local_prompts(url: str, config: DistillConfig) -> frozenset[str]:
    """Texts of the prompts that lie with a set of this machine."""
    path = Path(url)
    try:
        found = read_stored_prompts(*open_folder(str(path.parent if path.is_file() else path)))
    except DataError:
        return frozenset()
    if found is None or found.encoding.text_shape[0] != config.model.text_length:
        return frozenset()
    return frozenset(found.packed)
