"""A Wan denoiser as a transition: its first layers once, its last ones as a flow head.

    backbone    all layers but the last ones, at (x_t, sigma, text)      tokens m, once
    head        flow head, last layers and projection at (m, y_s, s, r)  once an inner step

`sgmd_core.inner_flow` says what is made of it.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file
from torch import Tensor, nn

from cluster.files import whole_folder, write_whole
from sgmd_core.inner_flow import inner_grid, inner_sample
from sgmd_core.seeds import derived_noise
from workers.models.architecture import CheckedComponent, NetworkKind, check_network
from workers.models.configs import CONFIG_FILE, INDEX_FILE, read_model_json
from workers.models.exporting import Components, copy_components, place_scheduler
from workers.models.family import Denoiser, TransitionDenoiser
from workers.models.flow_head import FlowHead, with_first_weights
from workers.models.sampling import EulerSampler
from workers.models.scheduler import build_scheduler
from workers.models.sharded_loading import load_sharded_parts
from workers.models.wan import WanVelocity, load_vae
from workers.models.wan_configs import (
    LAYOUT,
    TEXT_ENCODER,
    TOKENIZER,
    TRANSFORMER,
    TRANSITION_CLASSES,
    VAE,
    require_supported_index,
)
from workers.models.wan_folder import build_component, check_component, inspect_wan_folder
from workers.models.wan_text import load_text
from workers.models.wan_transition_configs import (
    FLOW_HEAD,
    PREFIXES,
    TRANSITION_LAYOUT,
    WAN_TRANSITION,
    read_head_config,
)
from workers.models.weights import DIFFUSERS_STEM

_TIME_SCALE = 1000.0
_OWN_NOISE = 2
"""Counter of inner noise that is drawn from a state, where nobody gives any."""


class WanTransition(TransitionDenoiser):
    """A Wan denoiser whose last layers are a flow head.

    Args:
        velocity: The whole denoiser.
        head: What its last layers have besides.
    """

    def __init__(self, velocity: WanVelocity, head: FlowHead) -> None:
        super().__init__()
        self.velocity = velocity
        self.head = head
        self.inner_levels = inner_grid(head.config["num_steps"], head.config["shift"])

    def forward(
        self,
        x_t: Tensor,
        sigma: Tensor,
        text: Tensor,
        states: Tensor | None = None,
        levels: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> Tensor:
        """Sample the velocity, or answer for inner states; see `TransitionDenoiser.forward`."""
        self.velocity.require_latents(x_t)
        with self._cast(x_t.device.type, self.autocast_dtype):
            backbone = self._backbone(x_t, sigma, text)
            if levels is None or targets is None or states is None:
                if states is None:
                    states = derived_noise(x_t, _OWN_NOISE)
                noise = states.to(x_t.dtype)
                sample = inner_sample(
                    lambda y, s, r: self._answer(backbone, y, s, r), noise, self.inner_levels
                )
                # A copy, as of every family: FSDP hooks the output, and must not hook a view.
                return sample.to(torch.float32, copy=True)
            first = self._answer(backbone, states[0], levels[0], targets)
        with torch.no_grad(), self._cast(x_t.device.type, None):
            exact = backbone.in_float32()
            others = [
                self._answer(exact, state, level, targets)
                for state, level in zip(states[1:], levels[1:], strict=True)
            ]
        return torch.stack([first, *others])

    @property
    def patch_size(self) -> tuple[int, int, int]:
        """Latent frames, rows and columns of a token."""
        return self.velocity.patch_size

    @property
    def blocks(self) -> list[nn.Module]:
        """The layers of backbone and head, in order."""
        return self.velocity.blocks

    def set_checkpointing(self, enabled: bool) -> None:
        """Recompute the activations of the layers in the backward pass, or keep them."""
        self.velocity.set_checkpointing(enabled)

    def _cast(self, device: str, dtype: torch.dtype | None) -> torch.autocast:
        return torch.autocast(device, dtype, enabled=dtype is not None)

    def _backbone(self, x_t: Tensor, sigma: Tensor, text: Tensor) -> "_Backbone":
        network = self.velocity.transformer
        dtype = network.patch_embedding.weight.dtype
        place, modulation, embedded, _ = network.condition_embedder(
            _TIME_SCALE * sigma, text.to(dtype), None
        )
        found = _Backbone(
            tokens=self._embedded(x_t),
            text=embedded,
            place=place,
            modulation=modulation.unflatten(1, (6, -1)),
            rotary=network.rope(x_t),
        )
        own = len(network.blocks) - self.head.config["num_layers"]
        found.tokens = self._layers(found, found.tokens, network.blocks[:own])
        return found

    def _answer(self, backbone: "_Backbone", y_s: Tensor, s: Tensor, r: Tensor) -> Tensor:
        network = self.velocity.transformer
        tokens = self.head(backbone.tokens, self._embedded(y_s), s, r)
        own = len(network.blocks) - self.head.config["num_layers"]
        tokens = self._layers(backbone, tokens, network.blocks[own:])
        table = network.scale_shift_table.to(backbone.place.device) + backbone.place[:, None]
        shift, scale = table.chunk(2, dim=1)
        normed = (network.norm_out(tokens.float()) * (1 + scale) + shift).type_as(tokens)
        return self._latents(network.proj_out(normed), y_s).float()

    def _embedded(self, latents: Tensor) -> Tensor:
        """Tokens of latents, by the denoiser's embedding of patches."""
        embedding = self.velocity.transformer.patch_embedding
        tokens = embedding(latents.to(embedding.weight.dtype))
        return tokens.flatten(2).transpose(1, 2).contiguous()

    def _latents(self, patches: Tensor, like: Tensor) -> Tensor:
        sizes = zip(like.shape[2:], self.patch_size, strict=True)
        grid = [size // patch for size, patch in sizes]
        cells = patches.reshape(len(like), *grid, *self.patch_size, -1)
        cells = cells.permute(0, 7, 1, 4, 2, 5, 3, 6)
        return cells.flatten(6, 7).flatten(4, 5).flatten(2, 3)

    def _layers(self, backbone: "_Backbone", tokens: Tensor, blocks: nn.ModuleList) -> Tensor:
        network = self.velocity.transformer
        given = backbone.text, backbone.modulation, backbone.rotary
        again = network._gradient_checkpointing_func  # pyright: ignore[reportPrivateUsage]
        checkpointed = torch.is_grad_enabled() and network.gradient_checkpointing
        for block in blocks:
            if checkpointed and again is not None:
                tokens = again(block, tokens, *given)
            else:
                tokens = block(tokens, *given)
        return tokens


@dataclass(slots=True)
class _Backbone:
    """Tokens of the backbone, and what every layer is given."""

    tokens: Tensor
    text: Tensor
    place: Tensor
    modulation: Tensor
    rotary: tuple[Tensor, Tensor]

    def in_float32(self) -> "_Backbone":
        """The same values in float32, without a graph."""
        own = (self.tokens, self.text, self.place, self.modulation)
        return _Backbone(*(value.detach().float() for value in own), rotary=self.rotary)


def check_head(folder: Path) -> CheckedComponent:
    """Check the flow head of a folder, reading its configuration and its weight headers.

    Raises:
        ModelFolderError: A file is missing or torn, or is of another network.
    """
    kind = NetworkKind(FlowHead.from_config, DIFFUSERS_STEM)
    return check_network(folder / FLOW_HEAD, read_head_config(folder), kind)


def load_transition(
    folder: str | Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    prepare: Callable[[Denoiser], object] | None = None,
) -> WanTransition:
    """Load transformer and flow head as one denoiser; see `load_transformer`."""
    path = Path(folder)
    require_supported_index(path, TRANSITION_LAYOUT)

    def joined(transformer: WanTransformer3DModel, head: FlowHead) -> WanTransition:
        return WanTransition(WanVelocity(transformer), head)

    parts = [check_component(path, TRANSFORMER), check_head(path)]
    networks = (WanTransformer3DModel, FlowHead)
    return load_sharded_parts(networks, parts, joined, [dtype] * len(parts), device, prepare)


def open_transition_sampler(folder: Path, device: str) -> EulerSampler:
    """Load what samples clips by outer and inner steps, in float32."""
    checked = inspect_wan_folder(folder, WAN_TRANSITION, TRANSITION_LAYOUT)
    denoiser = load_transition(folder, device=device)
    text, codec = load_text(folder), load_vae(folder)
    for network in (text.network, codec.network):
        nn.Module.to(network, device)
    return EulerSampler(denoiser, text, codec, checked.latent_shape)


def write_transition(
    dst: Path,
    base: Path,
    num_layers: int,
    num_steps: int,
    shift: float,
    components: Components = "link",
) -> None:
    """Write a folder of a base model with a flow head that changes nothing yet.

    Args:
        dst: Folder to write; an existing one is replaced whole.
        base: Wan folder of one denoiser.
        num_layers: Last layers that belong to the head.
        num_steps: Steps of the inner flow.
        shift: Shift of its levels.
        components: Whether weight files of the base are linked or copied.
    """
    config = check_component(base, TRANSFORMER).config
    width = config["num_attention_heads"] * config["attention_head_dim"]
    head = with_first_weights(FlowHead(width, num_layers, num_steps, shift))
    with whole_folder(dst) as draft:
        copy_components(base, draft, LAYOUT, LAYOUT.components, components)
        _write_head(draft, head)
        _write_index(draft, base, {})


def save_transition(
    dst: Path,
    base: Path,
    weights: Mapping[str, Tensor],
    *,
    flow_shift: float | None,
    components: Components = "copy",
) -> None:
    """Write a folder of a trained transition beside the other components of its base.

    Args:
        dst: Folder to write; an existing one is replaced whole.
        base: Folder of the transition that it started from.
        weights: Parameters by name, in the types of the files.
        flow_shift: Shift of the outer noise levels; None: with the base's scheduler.
        components: Whether the other components are linked or copied.
    """
    require_supported_index(base, TRANSITION_LAYOUT)
    parts = {
        name: {key.removeprefix(prefix): weights[key] for key in weights if key.startswith(prefix)}
        for name, prefix in PREFIXES.items()
    }
    transformer = build_component(base, TRANSFORMER)
    transformer.load_state_dict(parts[TRANSFORMER], assign=True)
    with torch.device("meta"):
        head = FlowHead.from_config(read_head_config(base))
    head.load_state_dict(parts[FLOW_HEAD], assign=True)
    with whole_folder(dst) as draft:
        copy_components(base, draft, LAYOUT, (TOKENIZER, VAE, TEXT_ENCODER), components)
        own = None if flow_shift is None else build_scheduler(flow_shift)
        scheduler = place_scheduler(base, draft, LAYOUT, own)
        transformer.save_pretrained(draft / TRANSFORMER)
        _write_head(draft, head)
        _write_index(draft, base, scheduler)


def _write_head(draft: Path, head: FlowHead) -> None:
    (draft / FLOW_HEAD).mkdir()
    config = {"_class_name": FlowHead.__name__, **head.config}
    write_whole(draft / FLOW_HEAD / CONFIG_FILE, (json.dumps(config, indent=2) + "\n").encode())
    weights = {name: value.detach().contiguous() for name, value in head.state_dict().items()}
    save_file(weights, draft / FLOW_HEAD / f"{DIFFUSERS_STEM}.safetensors", {"format": "pt"})


def _write_index(draft: Path, base: Path, others: Mapping[str, list[str]]) -> None:
    index = dict(read_model_json(base / INDEX_FILE))
    index |= {
        "_class_name": TRANSITION_LAYOUT.pipeline_class,
        FLOW_HEAD: ["workers", FlowHead.__name__],
        **TRANSITION_CLASSES,
        **others,
    }
    write_whole(draft / INDEX_FILE, (json.dumps(index, indent=2) + "\n").encode())
