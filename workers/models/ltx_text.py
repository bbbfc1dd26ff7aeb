"""Captions to text embeddings, as LTXPipeline makes them; needs transformers and no diffusers.

    caption -> tokenizer, padded -> T5 encoder -> zeros after the caption's end

The pipeline gives T5 no mask, so an embedding depends on the number of padded positions, and hands
the mask to the denoiser. Here the mask is where an embedding is not zero.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, T5Config, T5EncoderModel

from workers.models.architecture import NetworkKind, check_network
from workers.models.loading import load_network, load_tokenizer, require_telling_apart
from workers.models.ltx_configs import (
    LAYOUT,
    TEXT_ENCODER,
    TOKENIZER,
    read_ltx_component,
    require_ltx_index,
)
from workers.models.vocabulary import require_known_tokens


class LtxCaptions:
    """Tokenizer and text encoder of an LTX-Video folder.

    Args:
        tokenizer: Tokenizer of the text encoder.
        text_encoder: T5 encoder.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text_encoder: T5EncoderModel) -> None:
        self._tokenizer = tokenizer
        self.text_encoder = text_encoder

    @property
    def network(self) -> nn.Module:
        """The text encoder."""
        return self.text_encoder

    @torch.no_grad()
    def encode(self, captions: Sequence[str], max_length: int) -> Tensor:
        """Embed captions without gradient, (B, max_length, D), zeros after each caption's end."""
        tokens = self._tokenizer(
            list(captions),
            padding="max_length",
            max_length=max_length,
            truncation=True,
            return_tensors="pt",
        )
        require_known_tokens(tokens.input_ids, self.text_encoder)
        tokens = tokens.to(self.text_encoder.device)
        encoder: Any = self.text_encoder
        hidden = encoder(tokens.input_ids).last_hidden_state
        return hidden * tokens.attention_mask[..., None].to(hidden.dtype)


def text_encoder_kind() -> NetworkKind:
    """The text encoder as far as its files are concerned."""
    return NetworkKind(
        lambda config: T5EncoderModel(T5Config(**config)),
        LAYOUT.weights[TEXT_ENCODER],
        counts=("num_layers", "num_decoder_layers"),
        # The decoder of the model that the encoder was taken from.
        ignored=(r"^(decoder|lm_head)\.",),
    )


def load_ltx_text(folder: Path, dtype: torch.dtype | None = None) -> LtxCaptions:
    """Load tokenizer and text encoder of an LTX-Video folder, frozen.

    Args:
        folder: The folder.
        dtype: Of the text encoder; None takes what transformers takes by default.

    Raises:
        ModelFolderError: A file is missing, torn or of another model, or all captions get the same
            embedding.
    """
    require_ltx_index(folder)
    part = folder / TEXT_ENCODER
    checked = check_network(part, read_ltx_component(folder, TEXT_ENCODER), text_encoder_kind())
    options = {} if dtype is None else {"dtype": dtype}
    text_encoder = load_network(T5EncoderModel, checked, **options)
    tokenizer = load_tokenizer(folder / TOKENIZER)
    require_telling_apart(part, tokenizer, text_encoder)
    return LtxCaptions(tokenizer, text_encoder.requires_grad_(False))
