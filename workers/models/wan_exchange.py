"""Files of a Wan denoiser for other programs: one file of weights, or a LoRA.

    single-file     names of the original release: Wan's own code, ComfyUI, from_single_file
    comfyui         the same below `model.diffusion_model.`, as ComfyUI saves it
    lora            `transformer.NAME.lora_A`, `lora_B`: WanPipeline.load_lora_weights
    lora-comfyui    `diffusion_model.NAME.lora_down`, `lora_up`, in the names of the original

Each is read back by diffusers, as a user would load it.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import WanPipeline, WanTransformer3DModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from cluster.files import whole_file
from workers.models.exchange import COMFYUI, LORA
from workers.models.low_rank import LowRank
from workers.models.wan import load_transformer
from workers.models.wan_family import TRANSFORMER

_OWN = f"{TRANSFORMER}."
_COMFYUI_WEIGHTS = "model.diffusion_model."
_LORA_NAME = re.compile(r"lora_|\.(alpha|diff|diff_b)$")
_COMFYUI_LORA = "diffusion_model."

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


class WanExchange:
    """Writes and reads such files; see `ExchangeFiles`."""

    def write_weights(self, form: str, path: Path, weights: Mapping[str, Tensor]) -> None:
        """Write the denoiser as one file."""
        prefix = _COMFYUI_WEIGHTS if form == COMFYUI else ""
        named = {
            prefix + original_name(name.removeprefix(_OWN)): value
            for name, value in weights.items()
        }
        _save(path, named)

    def read_weights(self, path: Path, base_folder: Path) -> dict[str, Tensor]:
        """Read such a file through `WanTransformer3DModel.from_single_file`."""
        # Typed as if it returned nothing.
        network: Any = WanTransformer3DModel.from_single_file(
            str(path),
            config=str(base_folder),
            subfolder=TRANSFORMER,
            torch_dtype=torch.float32,
            local_files_only=True,
        )
        return {_OWN + name: value for name, value in network.state_dict().items()}

    def write_low_rank(
        self, form: str, path: Path, factors: Mapping[str, LowRank], dtype: torch.dtype
    ) -> None:
        """Write a LoRA; the strength is 1, and the scale lies in the matrices."""
        named: dict[str, Tensor] = {}
        for name, each in factors.items():
            layer = name.removeprefix(_OWN)
            if form == LORA:
                keys = f"{_OWN}{layer}.lora_A.weight", f"{_OWN}{layer}.lora_B.weight"
            else:
                layer = _COMFYUI_LORA + original_name(layer)
                keys = f"{layer}.lora_down.weight", f"{layer}.lora_up.weight"
            named |= dict(zip(keys, (each.down.to(dtype), each.up.to(dtype)), strict=True))
        _save(path, named)

    def read_low_rank(self, path: Path, base_folder: Path) -> dict[str, Tensor]:
        """Read a LoRA through diffusers and return the weights of the base with it merged in."""
        with safe_open(path, framework="pt") as file:
            others = [name for name in file.keys() if not _LORA_NAME.search(name)]  # noqa: SIM118
        if others:
            # diffusers would leave them out, or take nothing at all, without an error.
            raise ValueError(f"{others[0]} belongs to no LoRA")
        network: Any = load_transformer(base_folder).transformer
        state: Any = WanPipeline.lora_state_dict(str(path.parent), weight_name=path.name)
        network.load_lora_adapter(state, prefix=TRANSFORMER)
        network.fuse_lora()
        network.unload_lora()
        return {_OWN + name: value for name, value in network.state_dict().items()}


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    whole = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with whole_file(path) as draft:
        save_file(whole, draft, metadata={"format": "pt"})
