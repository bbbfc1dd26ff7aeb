"""Fresh, untrained parts of a Wan pipeline, sized by the recipe."""

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from pipelines.pretraining.config import (
    ROPE_LENGTH,
    SPATIAL_FACTOR,
    TEMPORAL_FACTOR,
    DenoiserSettings,
    TextSettings,
    VaeSettings,
)

_RGB = 3
_FIRST_LOG_VARIANCE = -6.0


def build_vae(settings: VaeSettings) -> AutoencoderKLWan:
    """An untrained video autoencoder that halves the frame size and the frame rate twice."""
    channels = settings.latent_channels
    patch = settings.patch_size
    vae = AutoencoderKLWan(
        base_dim=settings.base_dim,
        decoder_base_dim=settings.base_dim,
        z_dim=channels,
        dim_mult=list(settings.dim_mult),
        num_res_blocks=settings.num_res_blocks,
        temperal_downsample=[True, True],
        is_residual=settings.residual_resampling,
        patch_size=patch if patch > 1 else None,
        in_channels=_RGB * patch**2,
        out_channels=_RGB * patch**2,
        latents_mean=[0.0] * channels,
        latents_std=[1.0] * channels,
        scale_factor_spatial=SPATIAL_FACTOR * patch,
        scale_factor_temporal=TEMPORAL_FACTOR,
    )
    vae.apply(_keep_signal_scale)
    # Start with narrow posteriors: noise of unit size would drown what little is encoded at first.
    with torch.no_grad():
        bias = vae.quant_conv.bias
        assert bias is not None, "the autoencoder's last convolution has a bias"
        bias[channels:] = _FIRST_LOG_VARIANCE
    return vae


def build_transformer(
    settings: DenoiserSettings, text: TextSettings, latent_channels: int
) -> WanTransformer3DModel:
    """A denoiser with the first values of diffusers, drawn from torch's global generator."""
    return WanTransformer3DModel(
        patch_size=settings.patch_size,
        num_attention_heads=settings.num_heads,
        attention_head_dim=settings.head_dim,
        in_channels=latent_channels,
        out_channels=latent_channels,
        text_dim=text.hidden_dim,
        freq_dim=settings.freq_dim,
        ffn_dim=settings.ffn_dim,
        num_layers=settings.num_layers,
        rope_max_seq_len=ROPE_LENGTH,
    )


def train_tokenizer(captions: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each word of the captions; every caption ends with </s>."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordLevelTrainer(special_tokens=["<pad>", "</s>", "<unk>"])
    tokenizer.train_from_iterator(captions, trainer)
    end = ("</s>", tokenizer.token_to_id("</s>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[end])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
        model_input_names=["input_ids", "attention_mask"],
    )


def new_text_encoder(settings: TextSettings, vocabulary_size: int) -> UMT5EncoderModel:
    """A caption encoder with the first values of transformers, from torch's global generator."""
    config = UMT5Config(
        vocab_size=vocabulary_size,
        d_model=settings.hidden_dim,
        d_kv=settings.hidden_dim // settings.num_heads,
        d_ff=settings.ffn_dim,
        num_layers=settings.num_layers,
        num_heads=settings.num_heads,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
    )
    return UMT5EncoderModel(config)


def num_parameters(network: torch.nn.Module) -> int:
    """Number of scalar parameters of a network."""
    return sum(parameter.numel() for parameter in network.parameters())


def _keep_signal_scale(layer: torch.nn.Module) -> None:
    """Give convolutions unit gain.

    With torch's default weights the signal shrinks by about 1/sqrt(3) at every convolution and
    the biases drown it; the autoencoder then rests on the mean picture for a long time.
    """
    if isinstance(layer, torch.nn.Conv2d | torch.nn.Conv3d):
        torch.nn.init.normal_(layer.weight, std=layer.weight[0].numel() ** -0.5)
