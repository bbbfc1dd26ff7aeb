"""Interfaces of a model family to everything outside of it, and the records it hands out.

    ModelFamily    folder -> checked folder, networks, sampler, arithmetic; weights -> folder
    Denoiser       (x_t, sigma, text) -> velocity, with blocks, precision and checkpointing

A family is one file with a class of each, and a place in `workers.models.families`. Nothing here
imports a library of networks, and a family imports its own where it loads them: a plan reads
configurations only.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from sgmd_core.errors import ModelFolderError
from sgmd_core.types import Text
from workers.attention import NATIVE, AttentionName
from workers.models.exchange import ExchangeFiles
from workers.models.exporting import Components
from workers.models.folder import FolderLayout, ModelFolder
from workers.models.sampling import ClipSampler, SamplingRules
from workers.models.shape import DenoiserShape, ModelShape
from workers.models.vocabulary import CaptionTokenizer
from workers.network_settings import LoraSettings


class Denoiser(nn.Module, ABC):
    """Base class of a family's network, which predicts the velocity `noise - x0`.

    A class and not a protocol: FSDP2, `functional_call` and state dicts need an `nn.Module`.

    Attributes:
        autocast_dtype: Type of matrix products; None: the network's own.
        layer_function: Computes a layer under checkpointing, `workers.recomputation`; None: the
            library's own. A family that takes it has `selective` and `offload` in its `computes`.
        lora: Settings of its adapters, `workers.adapters`; None: it has none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.autocast_dtype: torch.dtype | None = None
        self.layer_function: Callable[..., Any] | None = None
        self.lora: LoraSettings | None = None

    @abstractmethod
    def forward(self, x_t: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        """Predict the velocity `noise - x0`.

        Args:
            x_t: Noisy latents (B, C, T, H, W).
            sigma: Noise level of each sample (B,), in [0, 1].
            text: Text embeddings (B, L, D), zeros after the caption's end.

        Returns:
            Velocity in float32, shaped like `x_t`, no view: FSDP2 hooks it.

        Raises:
            ShapeError: The latents do not fit the network.
        """

    def store_in_fp8(self) -> None:
        """Keep the weights of products in float8_e4m3fn, and compute with them in bfloat16.

        A family that can has `fp8` in its `computes`.
        """
        raise NotImplementedError

    def set_attention(self, name: AttentionName) -> None:
        """Compute attention by one of the kernels of `workers.attention`.

        A family that can has `attention` in its `computes`.
        """
        if name != NATIVE:
            raise NotImplementedError

    def split_tokens(self, ranks: int) -> None:
        """Split the tokens of every sample over so many ranks in a row of the role.

        All of them are called with the same samples and return the whole velocity; the gradient at
        `x_t` is whole, those at the parameters are parts whose sum is whole. A family that can has
        `ulysses` in its `computes`.
        """
        raise NotImplementedError

    @property
    def patch_size(self) -> tuple[int, int, int]:
        """Latent frames, rows and columns of a token; tokens are ordered along them."""
        return 1, 1, 1

    @property
    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """Layers, in order: sharded, checkpointed and compiled one at a time."""

    @property
    def trained_blocks(self) -> list[nn.Module]:
        """Layers that adapters are for; those of a part that stays frozen are not among them."""
        return self.blocks

    @property
    def frozen_part(self) -> str:
        """Prefix of the names of parameters that are never trained; empty: there are none."""
        return ""

    @abstractmethod
    def set_checkpointing(self, enabled: bool) -> None:
        """Recompute the activations of the layers in the backward pass, or keep them."""


class TransitionDenoiser(Denoiser):
    """A denoiser whose answer is a sample of the velocity, by the inner flow of a head.

    `forward` also takes inner noise, and inner states to answer for; see `sgmd_core.inner_flow`.

    Attributes:
        inner_levels: Levels of the inner flow, from 1 to 0.
    """

    inner_levels: Tensor

    @property
    def inner_steps(self) -> int:
        """Steps of the inner flow."""
        return len(self.inner_levels) - 1

    @abstractmethod
    def forward(
        self,
        x_t: Tensor,
        sigma: Tensor,
        text: Tensor,
        states: Tensor | None = None,
        levels: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> Tensor:
        """Sample the velocity, or answer for inner states.

        Args:
            x_t: Noisy latents (B, C, T, H, W).
            sigma: Noise level of each sample (B,).
            text: Text embeddings (B, L, D).
            states: Inner noise, shaped like `x_t`; None draws it from a hash of `x_t`. With
                `levels`, inner states (K, B, C, T, H, W).
            levels: Inner levels (K, B) of states to answer for, in place of a sample.
            targets: Level (B,) that each stride leads to, with `levels`.

        Returns:
            The sample in float32, shaped like `x_t`; with `levels`, the head's answers (K, B, C, T,
            H, W), of which the first has a graph. The others have full precision from the backbone
            on, so that their difference has digits.

        Raises:
            ShapeError: The latents do not fit the network.
        """


class TextEmbedder(Protocol):
    """Tokenizer and text encoder."""

    @property
    def network(self) -> nn.Module:
        """The text encoder, to be moved to a device."""
        ...

    def encode(self, captions: Sequence[str], max_length: int) -> Text:
        """Embed captions without gradient, (B, max_length, D), zeros after each caption's end."""
        ...


class Autoencoder(Protocol):
    """Videos (B, 3, T, H, W) in [0, 1] to normalised latents (B, C, T', H', W') and back."""

    @property
    def network(self) -> nn.Module:
        """The network, to be moved to a device."""
        ...

    def encode(self, video: Tensor) -> Tensor:
        """Encode videos; the same latents each time.

        Raises:
            ShapeError: The clips do not divide into latent cells.
        """
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents to float32 videos in [0, 1]."""
        ...


@dataclass(frozen=True, slots=True)
class FamilyTraits:
    """Facts of a family that need no folder.

    Attributes:
        about: One line for readers.
        layout: Components of its folders.
        sampling: How a folder is sampled that does not say so.
        computes: What its denoiser supports, of `bf16`, `checkpointing`, `selective`, `offload`,
            `compile`, `fp8`, `lora`, `attention`, `ulysses` and `joint`: one backward pass for two
            gradients, `workers.joint_walk`.
        relatives: Kind of model by `_class_name` of pipelines that cannot be distilled.
        released: Shapes of released models by name, to plan for before a folder is there.
        on_hub: Names of `released` by the names of their folders on the hub.
        keep_fp32: Parts of names, between dots, of weights that exports keep in float32.
        exchange: Makes what writes the denoiser for other programs; None: nothing does.
        taught_by: Families of teachers and fake scores, for models whose velocities are samples and
            can be neither; empty: its own.
        limits: Reason for what `computes` leaves out, as the end of a sentence; empty: none.
        modules: What loading its networks imports, by name. Processes of a private cluster are
            forked with it where there is no GPU; a family without it starts slower.
    """

    about: str
    layout: FolderLayout
    sampling: SamplingRules
    computes: frozenset[str] = frozenset({"bf16", "checkpointing", "compile", "lora"})
    relatives: Mapping[str, str] = field(default_factory=dict)
    released: Mapping[str, ModelShape] = field(default_factory=dict)
    keep_fp32: frozenset[str] = frozenset()
    exchange: Callable[[], ExchangeFiles] | None = None
    modules: tuple[str, ...] = ()
    taught_by: frozenset[str] = frozenset()
    limits: str = ""
    on_hub: Mapping[str, str] = field(default_factory=dict)


@runtime_checkable
class ModelFamily(Protocol):
    """Everything that is known of one kind of text-to-video model.

    Methods that take a folder raise `ModelFolderError` where a file is missing, torn or of another
    model, and name it.
    """

    @property
    def name(self) -> str:
        """Name in messages and results."""
        ...

    @property
    def traits(self) -> FamilyTraits:
        """Facts that need no folder."""
        ...

    def explain_files(self, folder: Path) -> ModelFolderError | None:
        """Refusal of a folder without model_index.json that holds this family in another layout."""
        ...

    def read_shape(self, folder: Path) -> ModelShape:
        """Read the shape from configurations alone; weights need not be there."""
        ...

    def shape_from_record(self, record: Mapping[str, Any]) -> DenoiserShape:
        """Rebuild a shape from the JSON object that a benchmark has written of it."""
        ...

    def inspect(self, folder: Path) -> ModelFolder:
        """Check configurations and weight headers, without reading a value."""
        ...

    def load_denoiser(
        self,
        folder: Path,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        prepare: Callable[[Denoiser], object] | None = None,
    ) -> Denoiser:
        """Load the denoiser in evaluation mode, every tensor from the files.

        Args:
            folder: Model folder.
            dtype: Of the weights.
            device: Device of the weights.
            prepare: Called before values are read, with the weights on the meta device; shards the
                denoiser, so that each rank reads its own rows alone. See `load_sharded`.
        """
        ...

    def load_text(self, folder: Path, dtype: torch.dtype | None = None) -> TextEmbedder:
        """Load tokenizer and text encoder, frozen; None keeps the library's own type."""
        ...

    def load_autoencoder(self, folder: Path, dtype: torch.dtype = torch.float32) -> Autoencoder:
        """Load the autoencoder, frozen."""
        ...

    def load_tokenizer(self, folder: Path) -> CaptionTokenizer:
        """Load the tokenizer alone, which counts the tokens of captions; no weights are read."""
        ...

    def open_sampler(self, folder: Path, device: str) -> ClipSampler:
        """Load what turns prompts into clips, as users of the folder would sample it."""
        ...

    def export(
        self,
        dst: Path,
        base_folder: Path,
        weights: Mapping[str, Tensor],
        *,
        flow_shift: float | None,
        components: Components = "copy",
    ) -> None:
        """Write a model folder: a new denoiser beside the other components of a base folder.

        Args:
            dst: Folder to write; an existing one is replaced whole.
            base_folder: Source of the other components and of the denoiser's configuration.
            weights: Parameters of the `Denoiser` by name, written in the types that they have.
            flow_shift: Shift of the noise levels that the folder is sampled with, by a scheduler
                of its own; None: by the base's scheduler, which is there.
            components: Whether the other components are linked or copied.
        """
        ...
