"""Networks of Wan that diffusers has: the denoiser and the autoencoder.

The only file that knows Wan's time scale, argument names and latent normalisation.

    Denoiser        WanVelocity     (x_t, sigma, text) -> velocity
    pixels          VideoVae        videos in [0, 1] <-> normalised latents
    captions        CaptionEncoder  in `workers.models.wan_text`, which needs no diffusers

All are read from one diffusers folder: model_index.json, transformer/, text_encoder/, tokenizer/,
vae/ and scheduler/.
"""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

import torch
import torch.distributed as dist
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from torch import Tensor, nn

from cluster.files import whole_folder
from sgmd_core.errors import ShapeError
from sgmd_core.phases import Expert
from workers.attention import KERNELS, AttentionName
from workers.models.configs import INDEX_FILE, read_model_json
from workers.models.experts import ExpertDenoiser
from workers.models.exporting import Components, copy_components, place_scheduler
from workers.models.family import Denoiser
from workers.models.folder import ClipGeometry, FolderLayout
from workers.models.loading import load_network
from workers.models.scheduler import build_scheduler
from workers.models.sequence import split_over_ranks, with_summed_gradient
from workers.models.sharded_loading import load_sharded, load_sharded_parts
from workers.models.wan_configs import (
    EXPERTS_LAYOUT,
    LAYOUT,
    TEXT_ENCODER,
    TOKENIZER,
    TRANSFORMER,
    VAE,
    read_boundary,
    read_component,
    require_alike,
    require_supported_index,
    require_wan_index,
)
from workers.models.wan_folder import build_component, check_component
from workers.models.wan_positions import turn_by_products

_TIME_SCALE = 1000.0


@contextmanager
def quiet_networks() -> Iterator[None]:
    """Leaves out what diffusers logs of its networks, where all of it is checked or meant here."""
    chatter = logging.getLogger("diffusers.models.modeling_utils")
    chatter.disabled, before = True, chatter.disabled
    try:
        yield
    finally:
        chatter.disabled = before


class WanVelocity(Denoiser):
    """A Wan denoiser as a velocity model.

    Wan 2.2 TI2V-5B takes a time step for every token, because clean frames of an image may stand
    among noisy ones. In text to video all tokens of a sample share one, so the network is called
    with that one: the same numbers, without a modulation for every token and layer.

    Args:
        transformer: The network of diffusers.
    """

    def __init__(self, transformer: WanTransformer3DModel) -> None:
        super().__init__()
        self.transformer = transformer
        turn_by_products(transformer)
        self._company: dist.ProcessGroup | None = None

    def forward(self, x_t: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        """Predict the velocity `noise - x0`.

        Args:
            x_t: Noisy latents (B, C, T, H, W).
            sigma: Noise level of each sample (B,), in [0, 1].
            text: Text embeddings (B, L, D), zeros after the caption's end.

        Returns:
            Velocity in float32, of a network in float64 in float64, shaped like `x_t`.

        Raises:
            ShapeError: the latents do not fit the network.
        """
        self.require_latents(x_t)
        if self._company is not None:
            x_t = with_summed_gradient(x_t, self._company)
        # `ModelMixin.dtype` walks all modules at each call; this is the parameter that it finds.
        dtype = self.transformer.patch_embedding.weight.dtype
        with torch.autocast(
            x_t.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None
        ):
            prediction = self.transformer(
                hidden_states=x_t.to(dtype),
                timestep=_TIME_SCALE * sigma,
                encoder_hidden_states=text.to(dtype),
                return_dict=False,
            )[0]
        # A copy also where it is float32 already: FSDP hooks the output, and must not hook a view.
        return prediction.to(torch.promote_types(prediction.dtype, torch.float32), copy=True)

    @property
    def patch_size(self) -> tuple[int, int, int]:
        """Latent frames, rows and columns of a token."""
        frames, rows, columns = self.transformer.config["patch_size"]
        return frames, rows, columns

    @property
    def blocks(self) -> list[nn.Module]:
        """The layers, in order: what is gathered one at a time when the network is sharded."""
        return list(self.transformer.blocks)

    def store_in_fp8(self) -> None:
        """Keep the layers' projections in 8 bits; norms and embeddings stay as they are."""
        self.transformer.enable_layerwise_casting(
            storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16
        )

    def set_attention(self, name: AttentionName) -> None:
        """Compute attention by a kernel of diffusers, in this network alone."""
        active, _ = _AttentionBackendRegistry.get_active_backend()
        try:
            with quiet_networks():
                self.transformer.set_attention_backend(name)
        finally:
            # diffusers also makes it the default of the process, where other roles may live.
            _AttentionBackendRegistry.set_active_backend(active)
        kernel = KERNELS[name]
        # Libraries that take float32, too, want one type of queries, keys and values.
        if kernel.in_bf16 or kernel.module:
            self._keep_types_of_queries()

    def split_tokens(self, ranks: int) -> None:
        """Split the tokens of every sample over so many ranks in a row."""
        # Its plan also splits time steps, where every token has its own.
        self._company = split_over_ranks(self.transformer, ranks, skipped=("",))
        # Its attention is walked backward without autocast, which would make them alike.
        self._keep_types_of_queries()

    def _keep_types_of_queries(self) -> None:
        """Give queries and keys the type of values, for attention that autocast does not reach."""
        for name, module in self.transformer.named_modules():
            if name.endswith((".norm_q", ".norm_k")):
                module.register_forward_hook(_in_the_type_of_its_input)

    def set_checkpointing(self, enabled: bool) -> None:
        """Recompute the activations of the layers in the backward pass, or keep them."""
        if enabled:
            self.transformer.enable_gradient_checkpointing(self.layer_function)
        else:
            self.transformer.disable_gradient_checkpointing()

    def require_latents(self, x_t: Tensor) -> None:
        """Check that latents fit the network.

        Raises:
            ShapeError: They do not.
        """
        channels = self.transformer.config["in_channels"]
        patch_size = self.patch_size
        expected = f"(batch, {channels}, T, H, W) with T, H, W divisible by {patch_size}"
        if x_t.ndim != 5 or x_t.shape[1] != channels:
            raise ShapeError("denoising", f"latents of shape {tuple(x_t.shape)}", expected)
        sizes = zip(x_t.shape[2:], patch_size, strict=True)
        if any(size % patch for size, patch in sizes):
            raise ShapeError("denoising", f"latents of shape {tuple(x_t.shape)}", expected)
        patches = [size // patch for size, patch in zip(x_t.shape[2:], patch_size, strict=True)]
        most = self.transformer.config["rope_max_seq_len"]
        if max(patches) > most:
            raise ShapeError(
                "denoising",
                f"{'x'.join(map(str, patches))} patches of latents of shape {tuple(x_t.shape)}",
                f"at most {most} along each axis, for which the network has positions "
                "(rope_max_seq_len)",
                "Take shorter or smaller clips",
            )


def _in_the_type_of_its_input(
    _module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
) -> Tensor:
    # Where autocast makes norms in float32, torch's attention would cast their output; others fail.
    return output.type_as(inputs[0])


class VideoVae:
    """A Wan autoencoder between videos in [0, 1] and normalised latents.

        latents = (posterior mode - latents_mean) / latents_std

    Args:
        vae: The network of diffusers.
    """

    def __init__(self, vae: AutoencoderKLWan) -> None:
        self.vae = vae

    @property
    def network(self) -> nn.Module:
        """The network of diffusers."""
        return self.vae

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Encode videos (B, 3, T, H, W) in [0, 1] to normalised latents (B, C, T', H', W')."""
        self.latent_shape(*video.shape[2:])
        pixels = (2 * video - 1).to(self.vae.dtype)
        latents = self.vae.encode(pixels, return_dict=False)[0].mode().float()
        mean, std = self._statistics(latents)
        return (latents - mean) / std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode normalised latents to videos (B, 3, T, H, W), clamped to [0, 1]."""
        mean, std = self._statistics(latents)
        pixels = self.vae.decode((latents * std + mean).to(self.vae.dtype), return_dict=False)[0]
        return ((pixels.float() + 1) / 2).clamp(0, 1)

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Latent shape (C, T, H, W) of a video.

        Raises:
            ShapeError: A size is not a multiple of what the autoencoder needs.
        """
        config = self.vae.config
        geometry = ClipGeometry(
            config["z_dim"], config["scale_factor_temporal"], config["scale_factor_spatial"]
        )
        return geometry.latent_shape(num_frames, height, width)

    def _statistics(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        config = self.vae.config
        mean = torch.tensor(config["latents_mean"]).to(latents)
        std = torch.tensor(config["latents_std"]).to(latents)
        return mean[None, :, None, None, None], std[None, :, None, None, None]


def load_transformer(
    folder: str | Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    prepare: Callable[[Denoiser], object] | None = None,
) -> WanVelocity:
    """Load the denoiser of a Wan folder in evaluation mode.

    Args:
        folder: The Wan folder.
        dtype: Of the weights, except for those that diffusers keeps in float32.
        device: Device of the weights.
        prepare: As `load_sharded` calls it.

    Raises:
        ModelFolderError: The folder or a file is missing, corrupt or not Wan's, or the weights are
            not those of the network.
    """
    require_supported_index(Path(folder))
    part = check_component(Path(folder), TRANSFORMER)
    return load_sharded(WanTransformer3DModel, part, WanVelocity, dtype, device, prepare)


def load_experts(
    folder: str | Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    prepare: Callable[[Denoiser], object] | None = None,
    expert: Expert | None = None,
    companion: torch.dtype | None = None,
) -> ExpertDenoiser:
    """Load the experts of a Wan folder as one denoiser; see `load_transformer`.

    Args:
        folder: The Wan folder.
        dtype: As `load_transformer`.
        device: As `load_transformer`.
        prepare: As `load_transformer`.
        expert: The one that is trained alone, and loaded alone; None: both.
        companion: Loads the other one besides, frozen, with weights of this type.

    Raises:
        ModelFolderError: As `load_transformer`; or the folder does not have two experts.
    """
    path = Path(folder)
    # Text encoder and autoencoder may be left out of a folder: they are not asked for.
    require_supported_index(path, EXPERTS_LAYOUT)
    require_alike(path, [read_component(path, name) for name in EXPERTS_LAYOUT.denoisers])
    boundary = read_boundary(path)
    names = dict(zip(("high", "low"), EXPERTS_LAYOUT.denoisers, strict=True))
    if expert is not None and companion is None:
        names = {expert: names[expert]}

    def joined(*networks: WanTransformer3DModel) -> ExpertDenoiser:
        made = {own: WanVelocity(each) for own, each in zip(names, networks, strict=True)}
        denoiser = ExpertDenoiser(made.get("high"), made.get("low"), boundary)
        if expert is not None:
            denoiser.train_alone(expert)
        return denoiser

    parts = [check_component(path, name) for name in names.values()]
    types = [dtype if companion is None or own == expert else companion for own in names]
    networks = [WanTransformer3DModel] * len(parts)
    return load_sharded_parts(networks, parts, joined, types, device, prepare)


def load_vae(folder: str | Path, dtype: torch.dtype = torch.float32) -> VideoVae:
    """Load the autoencoder of a Wan folder, frozen.

    Raises:
        ModelFolderError: the folder or a file is missing, corrupt or not Wan's.
    """
    require_wan_index(Path(folder))
    return open_autoencoder(Path(folder) / VAE, dtype)


def open_autoencoder(folder: str | Path, dtype: torch.dtype = torch.float32) -> VideoVae:
    """Load an autoencoder that is not part of a Wan folder, frozen.

    Args:
        folder: Folder called `vae` that diffusers has saved.
        dtype: Of its weights.

    Raises:
        ModelFolderError: As `load_transformer`.
    """
    part = check_component(Path(folder).parent, Path(folder).name)
    vae = load_network(AutoencoderKLWan, part, dtype=dtype)
    return VideoVae(vae.requires_grad_(False))


def save_generator_pipeline(
    dst: str | Path,
    base_folder: str | Path,
    weights: Mapping[str, Tensor],
    *,
    flow_shift: float | None,
    components: Components = "copy",
    layout: FolderLayout = LAYOUT,
    prefixes: Mapping[str, str] = MappingProxyType({TRANSFORMER: ""}),
) -> None:
    """Write a diffusers folder: a new denoiser beside the other components of a base folder.

    Args:
        dst: Folder to write; an existing one is replaced whole.
        base_folder: Where autoencoder, text encoder and tokenizer come from, and the denoiser's
            configuration.
        weights: Parameters of the denoiser to write, in the types of the file.
        flow_shift: Shift of the noise levels that the pipeline will sample with; None: with the
            base's scheduler.
        components: Whether the other components are linked or copied.
        layout: Components of the folder.
        prefixes: Prefix of the names of a denoiser's parameters in `weights`, by its component;
            components that are not named stay as they are in the base folder.

    Raises:
        ModelFolderError: the base folder is not a Wan folder.
    """
    dst, base = Path(dst), Path(base_folder)
    require_supported_index(base, layout)
    denoisers: dict[str, WanVelocity] = {}
    for name, prefix in prefixes.items():
        # The base's own weights are not read: they would all be replaced.
        denoisers[name] = WanVelocity(build_component(base, name))
        own = {key.removeprefix(prefix): weights[key] for key in weights if key.startswith(prefix)}
        denoisers[name].load_state_dict(own, assign=True)
    # The base's own scheduler may take other steps than a generator was trained on.
    scheduler = None if flow_shift is None else build_scheduler(flow_shift)
    index = read_model_json(base / INDEX_FILE)
    kept = [name for name in layout.denoisers if name not in prefixes]
    # A pipeline without one of its denoisers is none, whatever else is left out.
    whole: Components = "copy" if components == "none" else components
    with whole_folder(dst) as draft:
        copy_components(base, draft, layout, (TOKENIZER, VAE, TEXT_ENCODER), components)
        copy_components(base, draft, layout, kept, whole)
        index |= place_scheduler(base, draft, layout, scheduler)
        (draft / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
        for name, denoiser in denoisers.items():
            denoiser.transformer.save_pretrained(draft / name)
