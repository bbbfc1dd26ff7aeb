"""Words of captions that a tokenizer does not know."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from diffusers.pipelines.wan.pipeline_wan import prompt_clean

from workers.models.loading import load_tokenizer

_NUM_WORDS_SHOWN = 5


@dataclass(frozen=True, slots=True)
class UnknownWords:
    """Words that a tokenizer does not know: the model sees the same token for each of them.

    Attributes:
        num_captions: Captions that were looked at.
        num_affected: How many of them hold such a word.
        words: The commonest of them, most frequent first.
    """

    num_captions: int
    num_affected: int
    words: tuple[str, ...]

    def in_words(self) -> str:
        """One line."""
        examples = f", such as {', '.join(map(repr, self.words))}" if self.words else ""
        return (
            f"{self.num_affected} of the {self.num_captions} captions looked at hold words that the"
            f" tokenizer does not know{examples}; each becomes the same token"
        )


def unknown_words(folder: str | Path, captions: Sequence[str]) -> UnknownWords:
    """Counts the captions in which a word becomes the token for unknown words.

    Raises:
        ModelFolderError: the folder has no tokenizer.
    """
    tokenizer = load_tokenizer(Path(folder))
    is_fast = bool(tokenizer.is_fast)
    words: Counter[str] = Counter()
    num_affected = 0
    for caption in map(prompt_clean, captions):
        encoded = tokenizer(caption, return_offsets_mapping=is_fast)
        ids = cast("list[int]", encoded["input_ids"])
        unknown = [at for at, each in enumerate(ids) if each == tokenizer.unk_token_id]
        num_affected += bool(unknown)
        if is_fast:
            borders = cast("list[tuple[int, int]]", encoded["offset_mapping"])
            words.update(caption[slice(*borders[at])].strip() for at in unknown)
    shown = tuple(word for word, _ in words.most_common(_NUM_WORDS_SHOWN))
    return UnknownWords(len(captions), num_affected, shown)
