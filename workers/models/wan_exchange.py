"""Files of a Wan denoiser for other programs: one file of weights, or a LoRA, for each expert.

    single-file     names of the original release: Wan's own code, ComfyUI, from_single_file
    comfyui         the same below `model.diffusion_model.`, as ComfyUI saves it
    lora            `transformer.NAME.lora_A`, `lora_B`: WanPipeline.load_lora_weights
    lora-comfyui    `diffusion_model.NAME.lora_down`, `lora_up`, in the names of the original

Each is read back by diffusers, as a user would load it. LoRAs of other programs are read by
`lora_files`, since diffusers leaves out some of their tensors without an error.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from diffusers import WanPipeline, WanTransformer3DModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from cluster.files import whole_file
from workers.models.exchange import COMFYUI, LORA, ScaledLora
from workers.models.lora_files import UNDERSCORED, lora_changes, read_lora
from workers.models.low_rank import LowRank
from workers.models.scaled_weights import ScaledFile, is_beside_weights, open_scaled
from workers.models.sharded_loading import load_sharded
from workers.models.wan import WanVelocity, quiet_networks
from workers.models.wan_configs import LOW_NOISE, TRANSFORMER
from workers.models.wan_folder import check_component
from workers.models.weight_changes import ChangedWeights, WeightChange

_COMFYUI_WEIGHTS = "model.diffusion_model."
_COMFYUI_LORA = "diffusion_model."
_PATCHES = "patch_embedding.weight"  # output channels x input channels x patch
# Parts of Wan's image-to-video and VACE denoisers.
_IMAGE_PART = re.compile(r"img|image_|vace_|ref_conv|control_")

# diffusers -> original, on whole parts of names. `norm2` and `norm3` change places.
_ORIGINAL_PARTS = (
    (r"^condition_embedder\.time_embedder\.linear_1(?=\.|$)", "time_embedding.0"),
    (r"^condition_embedder\.time_embedder\.linear_2(?=\.|$)", "time_embedding.2"),
    (r"^condition_embedder\.text_embedder\.linear_1(?=\.|$)", "text_embedding.0"),
    (r"^condition_embedder\.text_embedder\.linear_2(?=\.|$)", "text_embedding.2"),
    (r"^condition_embedder\.time_proj(?=\.|$)", "time_projection.1"),
    (r"^scale_shift_table$", "head.modulation"),
    (r"^proj_out(?=\.|$)", "head.head"),
    (r"^(blocks\.\d+)\.scale_shift_table$", r"\1.modulation"),
    (r"^(blocks\.\d+)\.norm2(?=\.|$)", r"\1.norm3"),
    (r"^(blocks\.\d+)\.attn1(?=\.)", r"\1.self_attn"),
    (r"^(blocks\.\d+)\.attn2(?=\.)", r"\1.cross_attn"),
    (r"_attn\.to_([qkv])(?=\.|$)", r"_attn.\1"),
    (r"_attn\.to_out\.0(?=\.|$)", "_attn.o"),
    (r"^(blocks\.\d+)\.ffn\.net\.0\.proj(?=\.|$)", r"\1.ffn.0"),
    (r"^(blocks\.\d+)\.ffn\.net\.2(?=\.|$)", r"\1.ffn.2"),
)


def original_name(name: str) -> str:
    """Name that the original release gives to a parameter or layer of `WanTransformer3DModel`."""
    for pattern, replacement in _ORIGINAL_PARTS:
        name = re.sub(pattern, replacement, name)
    return name


@dataclass(frozen=True, slots=True)
class WanPart:
    """One denoiser of a Wan folder.

    Attributes:
        component: Its folder.
        prefix: Of its parameters' names in the `Denoiser`.
    """

    component: str
    prefix: str


ONE = {"": WanPart(TRANSFORMER, "transformer.")}
EXPERTS = {
    "high_noise": WanPart(TRANSFORMER, "high.transformer."),
    "low_noise": WanPart(LOW_NOISE, "low.transformer."),
}
"""Denoisers by part: of a folder with one, and of a folder with two experts."""


class WanExchange:
    """Writes and reads such files; see `ExchangeFiles`.

    Args:
        members: Denoisers by part.
    """

    def __init__(self, members: Mapping[str, WanPart] = MappingProxyType(ONE)) -> None:
        self._members = members

    @property
    def parts(self) -> tuple[str, ...]:
        """Networks that get a file each."""
        return tuple(self._members)

    def write_weights(
        self, form: str, paths: Mapping[str, Path], weights: Mapping[str, Tensor]
    ) -> None:
        """Write each denoiser as one file."""
        prefix = _COMFYUI_WEIGHTS if form == COMFYUI else ""
        for part, path in paths.items():
            own = _own(weights, self._members[part])
            _save(path, {prefix + original_name(name): value for name, value in own.items()})

    def read_weights(self, paths: Mapping[str, Path], base_folder: Path) -> dict[str, Tensor]:
        """Read such files through `WanTransformer3DModel.from_single_file`.

        Raises:
            ValueError: A file has other tensors than its network, which diffusers would leave out,
                or leave as they were drawn, or of other shapes.
            ModelFolderError: Weights are in 8 bits in a way that is not read.
        """
        found: dict[str, Tensor] = {}
        for part, path in paths.items():
            member = self._members[part]
            own = check_component(base_folder, member.component).architecture.shapes
            scaled = open_scaled(path)
            _require_tensors(path, own)
            # Declared to be a path alone.
            given: Any = _given(path, scaled)
            # All of it is read in float32, and diffusers warns that a part should be.
            with quiet_networks():
                # Typed as if it returned nothing.
                network: Any = WanTransformer3DModel.from_single_file(
                    given,
                    config=str(base_folder),
                    subfolder=member.component,
                    torch_dtype=torch.float32,
                    local_files_only=True,
                )
            found |= {member.prefix + name: value for name, value in network.state_dict().items()}
        return found

    def write_low_rank(
        self,
        form: str,
        paths: Mapping[str, Path],
        factors: Mapping[str, LowRank],
        dtype: torch.dtype,
    ) -> None:
        """Write LoRAs; the strength is 1, and the scale lies in the matrices.

        A denoiser that did not change gets no file.
        """
        for part, path in paths.items():
            named: dict[str, Tensor] = {}
            for layer, each in _own(factors, self._members[part]).items():
                if form == LORA:
                    stem, first, second = f"{TRANSFORMER}.{layer}", "lora_A", "lora_B"
                else:
                    stem = _COMFYUI_LORA + original_name(layer)
                    first, second = "lora_down", "lora_up"
                named[f"{stem}.{first}.weight"] = each.down.to(dtype)
                named[f"{stem}.{second}.weight"] = each.up.to(dtype)
            if named:
                _save(path, named)

    def read_low_rank(self, paths: Mapping[str, Path], base_folder: Path) -> dict[str, Tensor]:
        """Read LoRAs through diffusers and return the base's weights with them merged in."""
        found: dict[str, Tensor] = {}
        for part, member in self._members.items():
            network = _load(base_folder, member)
            if part in paths:
                _fuse(network, paths[part])
            found |= {member.prefix + name: value for name, value in network.state_dict().items()}
        return found

    def merge_loras(self, loras: Sequence[ScaledLora], base_folder: Path) -> Mapping[str, Tensor]:
        """Merge LoRAs of any program; every file is checked before a network is loaded."""
        changes: dict[str, list[WeightChange]] = defaultdict(list)
        own = [part for part in self._members if any(part in each.paths for each in loras)]
        for part in own:
            member = self._members[part]
            shapes = check_component(base_folder, member.component).architecture.shapes
            names = names_in_loras(shapes)
            for path, strength in ((e.paths[part], e.strength) for e in loras if part in e.paths):
                found = lora_changes(read_lora(path), shapes, names, strength)
                for name, change in found.items():
                    changes[member.prefix + name].append(change)
        base: dict[str, Tensor] = {}
        for member in (self._members[part] for part in own):
            network = _load(base_folder, member)
            base |= {member.prefix + name: value for name, value in network.state_dict().items()}
        return ChangedWeights(base, changes)


def _load(base_folder: Path, member: WanPart) -> Any:  # noqa: ANN401  (a network of diffusers)
    """The network of a part in float32."""
    checked = check_component(base_folder, member.component)
    return load_sharded(WanTransformer3DModel, checked, WanVelocity).transformer


T = TypeVar("T")


def _own(values: Mapping[str, T], member: WanPart) -> dict[str, T]:
    """Weights of one denoiser, by its own names."""
    prefix = member.prefix
    return {
        name.removeprefix(prefix): value
        for name, value in values.items()
        if name.startswith(prefix)
    }


def _fuse(network: Any, path: Path) -> None:  # noqa: ANN401  (a network of diffusers)
    """Merge a LoRA that we have written, by diffusers alone."""
    state: Any = WanPipeline.lora_state_dict(str(path.parent), weight_name=path.name)
    network.load_lora_adapter(state, prefix=TRANSFORMER)
    network.fuse_lora()
    network.unload_lora()


def names_in_loras(weights: Iterable[str]) -> dict[str, str]:
    """Weights of `WanTransformer3DModel` by the names that LoRAs have for them, without a prefix.

    Those are its own names, those of the original release, and both with underscores (Kohya).
    """
    found: dict[str, str] = {}
    for name in weights:
        for known in (name, original_name(name)):
            layer, _, end = known.rpartition(".")
            for foreign in (known, f"{UNDERSCORED}{layer.replace('.', '_')}.{end}"):
                assert found.get(foreign, name) == name, f"{foreign} is two weights"
                found[foreign] = name
    return found


def _bare(name: str) -> str:
    """Name of a weight without the prefix of ComfyUI, of which community files leave out a part."""
    return name.removeprefix(_COMFYUI_WEIGHTS).removeprefix(_COMFYUI_LORA)


def _given(path: Path, scaled: ScaledFile | None) -> str | dict[str, Tensor]:
    """A file as `from_single_file` takes it, or its weights where it takes another prefix."""
    if scaled is not None:
        return {_bare(name): value for name, value in scaled.read().items()}
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        if not any(name.startswith(_COMFYUI_LORA) for name in names):
            return str(path)
        return {_bare(name): file.get_tensor(name) for name in names}


def _require_tensors(path: Path, own: Mapping[str, tuple[int, ...]]) -> None:
    """Refuses a file with other tensors, or tensors of other shapes, than a network of ours."""
    with safe_open(path, framework="pt") as file:
        names = [name for name in file.keys() if not is_beside_weights(name)]  # noqa: SIM118
        stored = {_bare(name): tuple(file.get_slice(name).get_shape()) for name in names}
    for bare in stored if len(stored) < len(names) else ():
        if len(twins := sorted((name for name in names if _bare(name) == bare), key=len)) > 1:
            raise ValueError(f"{bare} is there twice, as {' and as '.join(twins)}")
    expected = {original_name(name): shape for name, shape in own.items()}
    if stored.keys() & (own.keys() - expected.keys()):
        expected = dict(own)
    takes_more = _takes_more_than_text(stored, expected)
    lacking, others = expected.keys() - stored.keys(), stored.keys() - expected.keys()
    for kind, names in (("missing", lacking), ("not in the network", others)):
        if names:
            count = f"{len(names)} tensors are {kind}, such as {min(names)}"
            raise ValueError(count + takes_more)
    for name, shape in expected.items():
        if stored[name] != shape:
            found, wanted = ("x".join(map(str, each)) for each in (stored[name], shape))
            raise ValueError(f"{name} is {found}, where the base has {wanted}{takes_more}")


def _takes_more_than_text(
    stored: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> str:
    """Words on a file of a denoiser with an image or a video beside the text; else none."""
    has_image = any(_IMAGE_PART.search(name) for name in stored.keys() - expected.keys())
    channels = [shapes.get(_PATCHES, ())[1:2] for shapes in (stored, expected)]
    if has_image or (all(channels) and channels[0] > channels[1]):
        return ": a denoiser that takes an image or a video besides the text"
    return ""


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    whole = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with whole_file(path) as draft:
        save_file(whole, draft, metadata={"format": "pt"})
