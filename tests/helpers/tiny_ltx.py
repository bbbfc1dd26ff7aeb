"""An LTX-Video small enough for a test: the real architecture with seeded random weights."""

from collections.abc import Sequence
from pathlib import Path

from diffusers import (
    AutoencoderKLLTXVideo,
    FlowMatchEulerDiscreteScheduler,
    LTXPipeline,
    LTXVideoTransformer3DModel,
)
from transformers import T5Config, T5EncoderModel

from tests.helpers.tiny_wan import TEXT_DIM, with_seeded_weights, word_tokenizer

CHANNELS = 8


def write_tiny_ltx(folder: Path, words: Sequence[str], seed: int = 0) -> Path:
    """Writes a complete `LTXPipeline` folder whose tokenizer knows `words`; returns it."""
    transformer = LTXVideoTransformer3DModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=TEXT_DIM,
    )
    widths, layers = (8, 8, 8, 8), (1, 1, 1, 1, 1)
    vae = AutoencoderKLLTXVideo(
        latent_channels=CHANNELS,
        block_out_channels=widths,
        decoder_block_out_channels=widths,
        layers_per_block=layers,
        decoder_layers_per_block=layers,
    )
    vocabulary = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    text_encoder = T5EncoderModel(
        T5Config(
            vocab_size=len(vocabulary),
            d_model=TEXT_DIM,
            d_kv=4,
            d_ff=16,
            num_layers=1,
            num_heads=2,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            pad_token_id=0,
            eos_token_id=1,
        )
    )
    pipeline = LTXPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        vae=with_seeded_weights(vae, seed),
        text_encoder=with_seeded_weights(text_encoder, seed),
        tokenizer=word_tokenizer(vocabulary),
        transformer=with_seeded_weights(transformer, seed),
    )
    pipeline.save_pretrained(folder)
    return folder
