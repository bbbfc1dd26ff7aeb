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

from pipelines.config.recipe import DistillConfig
from pipelines.data.shards.filesystem import open_folder
from pipelines.data.shards.prompts import read_stored_prompts
from sgmd_core.errors import DataError

TEXT, VALIDATOR = "text", "validator"
"""Sections of `topology` whose processes embed text."""

ENCODING = frozenset((TEXT, VALIDATOR))


@dataclass(frozen=True, slots=True)
class StoredText:
    """Texts of a run that need no text encoder.

    Attributes:
        lacking: By section, in words, the texts for which its process loads one.
        prompts: Embeddings (rows, width) of prompts, for the text process.
        validation: Those of all that a validator embeds; empty where it has a text encoder.
    """

    lacking: Mapping[str, tuple[str, ...]]
    prompts: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    validation: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)

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
        if not self.lacking:
            return "no process loads the text encoder: all embeddings lie with the data"
        parts = (f"{section}: {', '.join(texts)}" for section, texts in self.lacking.items())
        remedy = "`sgmd encode` stores embeddings of captions and, by --negative, of prompts"
        return f"the text encoder is loaded for {'; '.join(parts)}. {remedy}"


def wanted_prompts(config: DistillConfig) -> dict[str, str]:
    """Prompts that the text process embeds beside captions, each with its name."""
    wanted = {"": "the empty prompt (data.prompt_dropout)"} if config.data.prompt_dropout else {}
    return wanted | {config.model.negative_prompt: "the negative prompt"}


def encoding_sections(config: DistillConfig) -> frozenset[str]:
    """Sections that a plan counts a text encoder for: all, but for sets on this machine that say.

    A set with prompts has embeddings of its captions, too. Who made them is compared before a run
    starts, not here: it takes reading the text encoder's weights.
    """
    data = config.data
    if not data.stored_text:
        return ENCODING
    trained = [_local_prompts(url, config) for url in (data.train, *(s.source for s in data.also))]
    known = frozenset[str]().union(*trained)
    if not all(trained) or not known.issuperset(wanted_prompts(config)):
        return ENCODING
    held_out = _local_prompts(data.validation, config)
    stored = bool(held_out) and config.model.negative_prompt in known | held_out
    return frozenset() if stored else frozenset({VALIDATOR})


def _local_prompts(url: str, config: DistillConfig) -> frozenset[str]:
    """Texts of the prompts of a set that is a folder of this machine; else none."""
    if not url or "://" in url or not Path(url).is_dir():
        return frozenset()
    try:
        found = read_stored_prompts(*open_folder(url))
    except DataError:
        return frozenset()
    if found is None or found.encoding.text_shape[0] != config.model.text_length:
        return frozenset()
    return frozenset(found.packed)
