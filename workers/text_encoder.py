"""Captions to embeddings, each computed once.

A caption is encoded alone, never beside others: the shape of a batch changes the rounding of matrix
products, and an embedding must not depend on which captions came with it, or a resumed run, whose
cache is empty, would see other numbers than the run it continues.
"""

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sgmd_core.errors import NonFiniteError
from sgmd_core.types import Text, TextBatch


class CaptionEmbedder(Protocol):
    """A tokenizer and its network, such as a `workers.models.family.TextEmbedder`."""

    def encode(self, captions: Sequence[str], max_length: int) -> Text:
        """Embeds captions, zero after each caption's end."""
        ...


class TextEncoder:
    """Embeds captions and remembers the latest ones.

    Args:
        embedder: Tokenizer and network, or a function that loads them. The function is called for
            a caption that is neither stored nor remembered, and what it loaded is freed after it:
            it is for runs whose captions bring their embeddings.
        text_length: Text positions; longer captions are cut, shorter ones end in zeros.
        num_cached: Captions remembered, 0 for none; the least recently used one is forgotten first.
            The zeros at the end are not stored, so a caption of 40 tokens costs 0.7 MB at a width
            of 4096.
        raises: Raise at an embedding that is not finite; False passes it on, and the role that it
            reaches reports it.
        stored: Embeddings (rows, width) by caption that the network is not needed for.
    """

    def __init__(
        self,
        embedder: CaptionEmbedder | Callable[[], CaptionEmbedder],
        text_length: int,
        num_cached: int = 1024,
        *,
        raises: bool = True,
        stored: Mapping[str, NDArray[np.float32]] | None = None,
    ) -> None:
        self._raises = raises
        self._stored = {caption: torch.tensor(rows) for caption, rows in (stored or {}).items()}
        self._embedder = embedder
        self._text_length = text_length
        self._num_cached = num_cached
        self._cache: OrderedDict[str, Tensor] = OrderedDict()

    def encode(self, captions: Sequence[str], sample_indices: Sequence[int]) -> TextBatch:
        """Embeds the captions of a micro-batch.

        Args:
            captions: One per sample.
            sample_indices: Position of each sample in the whole batch of the iteration.

        Returns:
            Embeddings (b, text_length, d) and the positions.

        Raises:
            NonFiniteError: An embedding is not finite; names its caption.
        """
        text = torch.stack([self._embed(caption) for caption in captions])
        return TextBatch(text=text, sample_indices=tuple(sample_indices))

    def place(
        self,
        text: Text,
        rows: Sequence[int],
        first_sample: int = 0,
        dropped: Collection[int] = (),
    ) -> TextBatch:
        """Picks a micro-batch out of embeddings that were stored with the data.

        Args:
            text: Embeddings of the whole batch, (B, text_length, d).
            rows: Which of them are wanted.
            first_sample: Position of row 0 among the samples of the iteration.
            dropped: Rows that get the embedding of the empty caption.
        """
        indices = tuple(first_sample + row for row in rows)
        picked = text[list(rows)]
        empty = [at for at, row in enumerate(rows) if row in dropped]
        if empty:
            picked[empty] = self._embed("").to(picked)
        return TextBatch(text=picked, sample_indices=indices)

    def encode_negative(self, prompt: str) -> Text:
        """Embeds the negative prompt, (1, text_length, d); "" is the unconditional caption.

        Raises:
            NonFiniteError: The embedding is not finite; every prediction of the teacher needs it.
        """
        return self._embed(prompt, raises=True)[None]

    def _embed(self, caption: str, *, raises: bool = False) -> Tensor:
        found = self._stored.get(caption)
        if found is None:
            found = self._remembered(caption)
        if (raises or self._raises) and not found.isfinite().all():
            raise NonFiniteError(
                f"encoding the caption {caption[:80]!r}",
                "an embedding that is not finite",
                "finite numbers",
                "No weight was updated from it; look at the text encoder's weights",
            )
        # In float32 whatever computed it: what travels is rounded by `topology.wire_dtype` alone.
        return nn.functional.pad(found.float(), (0, 0, 0, self._text_length - len(found)))

    def _remembered(self, caption: str) -> Tensor:
        found = self._cache.pop(caption, None)
        if found is None:
            embedder = self._embedder() if callable(self._embedder) else self._embedder
            found = _without_end(embedder.encode([caption], self._text_length)[0])
        # At the end stands what was used last.
        self._cache[caption] = found
        if len(self._cache) > self._num_cached:
            self._cache.popitem(last=False)
        return found


def _without_end(embedding: Tensor) -> Tensor:
    """A copy of the rows (l, d) up to the last one that is not zero."""
    rows = embedding.any(dim=1).nonzero()
    length = int(rows[-1]) + 1 if len(rows) else 0
    return embedding[:length].clone()
