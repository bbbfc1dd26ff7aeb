"""A Wan small enough for a test: the real architecture, seeded random weights, milliseconds a pass.

`tiny_velocity` is a denoiser alone; `write_tiny_wan` a whole diffusers folder.
"""

from collections.abc import Sequence
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from workers.models.wan import WanVelocity

LATENT_CHANNELS = 4
LATENT_SHAPE = (LATENT_CHANNELS, 3, 4, 4)
TEXT_LENGTH = 6
TEXT_DIM = 8
NUM_FRAMES, HEIGHT, WIDTH = 9, 16, 16
"""Size of the clips whose latents have `LATENT_SHAPE`."""


def tiny_velocity(seed: int = 0, channels: int = LATENT_CHANNELS) -> WanVelocity:
    """A denoiser of 2 layers and 2 heads of 16, the caller's own; draws no global random number."""
    return copied(_first_velocity(seed, channels))


@cache
def _first_velocity(seed: int, channels: int) -> WanVelocity:
    with torch.random.fork_rng([]):
        transformer = WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=channels,
            out_channels=channels,
            text_dim=TEXT_DIM,
            freq_dim=16,
            ffn_dim=32,
            num_layers=2,
            rope_max_seq_len=16,
        )
    return WanVelocity(with_seeded_weights(transformer, seed))


def copied(network: WanVelocity) -> WanVelocity:
    """As `deepcopy`, in a fraction of the time: most of what a module has is empty."""
    copies: dict[int, Any] = {}
    for value in (*network.parameters(), *network.buffers()):
        copy = value.detach().clone()
        is_parameter = isinstance(value, nn.Parameter)
        copies[id(value)] = nn.Parameter(copy, value.requires_grad) if is_parameter else copy
    modules = list(network.modules())
    for module in modules:
        copies[id(module)] = module.__new__(type(module))
    for module in modules:
        own = vars(copies[id(module)])
        for name, value in vars(module).items():
            if name in ("_parameters", "_buffers", "_modules"):
                own[name] = {key: copies.get(id(part)) for key, part in value.items()}
            elif isinstance(value, dict | list | set) and not value:
                own[name] = type(value)()
            else:
                own[name] = deepcopy(value, copies)
    return copies[id(network)]


def with_seeded_weights(network: nn.Module, seed: int) -> nn.Module:
    """Draws every weight again: gains around 1, biases small, matrices of unit gain."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in network.named_parameters():
            drawn = torch.randn(value.shape, generator=generator)
            if value.ndim >= 2:
                value.copy_(drawn * value[0].numel() ** -0.5)
            else:
                value.copy_(0.1 * drawn + float(name.endswith("weight")))
    return network


def write_tiny_wan(folder: Path, words: Sequence[str], seed: int = 0) -> Path:
    """Writes a complete `WanPipeline` folder whose tokenizer knows `words`; returns it."""
    return _write(folder, words, seed, tiny_vae())


def tiny_vae() -> AutoencoderKLWan:
    """An autoencoder of 4 channels and stride 4."""
    return AutoencoderKLWan(
        base_dim=4,
        decoder_base_dim=4,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
        scale_factor_spatial=4,
        scale_factor_temporal=4,
    )


def write_tiny_wan22_5b(folder: Path, words: Sequence[str], seed: int = 0) -> Path:
    """Writes a narrow Wan 2.2 TI2V-5B: 48 channels, stride 16, a time step for every token."""
    channels = 48
    vae = AutoencoderKLWan(
        base_dim=4,
        decoder_base_dim=4,
        z_dim=channels,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * channels,
        latents_std=[1.0] * channels,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
        scale_factor_temporal=4,
    )
    return _write(folder, words, seed, vae, channels, expand_timesteps=True)


def write_tiny_experts(
    folder: Path, words: Sequence[str], seed: int = 0, boundary: float = 0.5
) -> Path:
    """Writes a narrow Wan 2.2 A14B: two experts, and the noise level at which they change."""
    second = tiny_velocity(seed + 1).transformer
    return _write(folder, words, seed, tiny_vae(), transformer_2=second, boundary_ratio=boundary)


def _write(
    folder: Path,
    words: Sequence[str],
    seed: int,
    vae: AutoencoderKLWan,
    channels: int = LATENT_CHANNELS,
    **options: Any,
) -> Path:
    vocabulary, text_encoder = tiny_text_encoder(words, seed)
    pipeline = WanPipeline(
        tokenizer=word_tokenizer(vocabulary),
        text_encoder=text_encoder,
        vae=with_seeded_weights(vae, seed),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        transformer=tiny_velocity(seed, channels).transformer,
        **options,
    )
    pipeline.save_pretrained(folder)
    return folder


def tiny_text_encoder(words: Sequence[str], seed: int) -> tuple[dict[str, int], UMT5EncoderModel]:
    """A vocabulary of words, and a text encoder of one layer for it."""
    vocabulary = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    text_encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(vocabulary),
            d_model=TEXT_DIM,
            d_kv=4,
            d_ff=16,
            num_layers=1,
            num_heads=2,
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
        )
    )
    return vocabulary, with_seeded_weights(text_encoder, seed)


def word_tokenizer(vocabulary: dict[str, int]) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words that ends every caption."""
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
