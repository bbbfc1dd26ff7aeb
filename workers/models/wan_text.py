"""Captions to text embeddings, as WanPipeline makes them; needs transformers and no diffusers.

    caption -> clean_caption -> tokenizer -> UMT5 encoder -> zeros after the caption's end

A file of its own, because importing diffusers' networks takes a process seconds of CPU that the
text encoder has no use for.
"""

import html
from collections.abc import Sequence
from pathlib import Path

import ftfy
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from workers.models.loading import (
    load_network,
    load_tokenizer,
    require_telling_apart,
    require_tied_embeddings,
)
from workers.models.vocabulary import require_known_tokens
from workers.models.wan_configs import TEXT_ENCODER, TOKENIZER, require_wan_index
from workers.models.wan_folder import check_component


def clean_caption(caption: str) -> str:
    """Repair broken Unicode, resolve HTML entities and fold white space, as WanPipeline does.

    Entities are resolved twice: captions from the web are often escaped twice.
    """
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(caption))).split())


class CaptionEncoder:
    """Tokenizer and text encoder of a Wan folder.

    Args:
        tokenizer: Tokenizer of the text encoder.
        text_encoder: UMT5 encoder.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text_encoder: UMT5EncoderModel) -> None:
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder

    @property
    def network(self) -> nn.Module:
        """The text encoder."""
        return self.text_encoder

    def encode(self, captions: Sequence[str], max_length: int) -> Tensor:
        """Embed captions exactly as WanPipeline does; no gradient.

        Args:
            captions: Captions; "" is the unconditional one.
            max_length: Number of text positions; longer captions are cut.

        Returns:
            Embeddings (B, max_length, D), zeros after each caption's end.
        """
        with torch.no_grad():
            return embed_captions(self.tokenizer, self.text_encoder, captions, max_length)


def embed_captions(
    tokenizer: PreTrainedTokenizerBase,
    text_encoder: UMT5EncoderModel,
    captions: Sequence[str],
    max_length: int,
) -> Tensor:
    """Embed captions with gradients; see `CaptionEncoder.encode`."""
    tokens = tokenizer(
        [clean_caption(caption) for caption in captions],
        padding=True,
        max_length=max_length,
        truncation=True,
        return_attention_mask=True,
        return_tensors="pt",
    )
    require_known_tokens(tokens.input_ids, text_encoder)
    tokens = tokens.to(text_encoder.device)
    mask = tokens.attention_mask
    hidden = text_encoder(tokens.input_ids, mask).last_hidden_state
    # Wan gives its cross-attention no mask: what follows a caption must be zero, and counts.
    hidden = hidden * mask[..., None].to(hidden.dtype)
    return nn.functional.pad(hidden, (0, 0, 0, max_length - hidden.shape[1]))


def load_text(folder: str | Path, dtype: torch.dtype | None = None) -> CaptionEncoder:
    """Load tokenizer and text encoder of a Wan folder, frozen.

    Args:
        folder: The Wan folder.
        dtype: Of the text encoder; None takes what transformers takes by default.

    Raises:
        ModelFolderError: As `load_transformer`; or all captions get the same embedding.
    """
    require_wan_index(Path(folder))
    require_tied_embeddings(Path(folder) / TEXT_ENCODER)
    options = {} if dtype is None else {"dtype": dtype}
    part = check_component(Path(folder), TEXT_ENCODER)
    text_encoder = load_network(UMT5EncoderModel, part, **options)
    tokenizer = load_tokenizer(Path(folder) / TOKENIZER)
    require_telling_apart(Path(folder) / TEXT_ENCODER, tokenizer, text_encoder)
    return CaptionEncoder(tokenizer, text_encoder.requires_grad_(False))
