"""Tokens of captions: how many a caption has, and which of its words a tokenizer does not know."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

from torch import Tensor, nn

from sgmd_core.errors import ModelFolderError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
        """Number of captions with unknown words, and some of these words, in one sentence."""
        examples = f", such as {', '.join(map(repr, self.words))}" if self.words else ""
        return (
            f"{self.num_affected} of the {self.num_captions} captions read have words that the"
            f" tokenizer does not know{examples}; each becomes the same token"
        )


def require_known_tokens(ids: Tensor, text_encoder: nn.Module) -> None:
    """Checks that a text encoder has an embedding for each token of its tokenizer.

    On a GPU a number beyond its table ends the process.

    Args:
        ids: Numbers of the tokens, on the CPU.
        text_encoder: A network of transformers.

    Raises:
        ModelFolderError: The tokenizer is that of another model.
    """
    size = cast("Any", text_encoder).get_input_embeddings().num_embeddings
    if ids.numel() and int(ids.max()) >= size:
        raise ModelFolderError(
            "embedding captions",
            f"token {int(ids.max())} of the tokenizer",
            f"tokens below {size}, the embeddings of the text encoder",
            "Copy tokenizer and text encoder again from one model",
        )


class CaptionTokenizer(Protocol):
    """The tokenizer of a model."""

    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        """Count the tokens of each caption, uncut, end included."""
        ...

    def unknown_words(self, captions: Sequence[str]) -> UnknownWords:
        """Count the captions in which a word becomes the token for unknown words."""
        ...


class LibraryTokenizer:
    """A tokenizer of transformers.

    Args:
        tokenizer: The tokenizer.
        clean: What the model's pipeline does to a caption first.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        clean: Callable[[str], str] = lambda caption: caption,
    ) -> None:
        self._tokenizer = tokenizer
        self._clean = clean

    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        """Count the tokens of each caption, uncut, end included."""
        tokens = self._tokenizer([self._clean(caption) for caption in captions])
        return [len(ids) for ids in cast("list[list[int]]", tokens.input_ids)]

    def unknown_words(self, captions: Sequence[str]) -> UnknownWords:
        """Count the captions in which a word becomes the token for unknown words."""
        tokenizer = self._tokenizer
        is_fast = bool(tokenizer.is_fast)
        words: Counter[str] = Counter()
        num_affected = 0
        for caption in map(self._clean, captions):
            encoded = tokenizer(caption, return_offsets_mapping=is_fast)
            ids = cast("list[int]", encoded["input_ids"])
            unknown = [at for at, each in enumerate(ids) if each == tokenizer.unk_token_id]
            num_affected += bool(unknown)
            if is_fast:
                borders = cast("list[tuple[int, int]]", encoded["offset_mapping"])
                words.update(caption[slice(*borders[at])].strip() for at in unknown)
        shown = tuple(word for word, _ in words.most_common(_NUM_WORDS_SHOWN))
        return UnknownWords(len(captions), num_affected, shown)
