"""Host memory that a rank takes to load its part of a denoiser, over what it keeps.

    python benchmarks/loading.py --output loading.json

Ranks of a gloo group load one Wan of random weights, all at once. The peak is that of the kernel
(VmHWM, reset before loading), less what the process held before: interpreter and libraries. Pages
of mapped files count. It is compared with the rank's share of the weights and the largest layer,
which FSDP2 gathers; `--whole` loads the whole network with diffusers first and cuts it then.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from diffusers import WanTransformer3DModel
from documents import write_document

from workers.models.sharded_loading import load_sharded
from workers.models.wan import WanVelocity
from workers.models.wan_configs import TRANSFORMER
from workers.models.wan_folder import check_component
from workers.sharding import shard

_BYTES = 4


def main() -> None:
    """Measures, and writes the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--layers", type=int, default=16, help="16: 300 M parameters")
    parser.add_argument("--whole", action="store_true", help="as older versions loaded")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(Path(folder), options.ranks, options.layers, whole=options.whole)
    write_document("loading", measured, options.output)


def measure(
    folder: Path, num_ranks: int, num_layers: int, heads: int = 8, *, whole: bool = False
) -> dict[str, Any]:
    """Settings, and peak bytes of each rank.

    Args:
        folder: Empty; for the weights and the ranks' results.
        num_ranks: Ranks.
        num_layers: Layers of the network.
        heads: Heads of 128 of its attention.
        whole: Load the whole network first, and shard it then.
    """
    multiprocessing.spawn(_write, (folder, num_layers, heads), nprocs=1)
    multiprocessing.spawn(_load, (num_ranks, folder, whole), nprocs=num_ranks)
    results = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(num_ranks)]
    return {
        "ranks": num_ranks,
        "whole": whole,
        **torch.load(folder / "network.pt", weights_only=True),
        "results": results,
        "largest_ratio": max(result["ratio"] for result in results),
    }


def _write(_: int, folder: Path, num_layers: int, heads: int) -> None:
    torch.manual_seed(0)
    width = 128 * heads
    network = WanTransformer3DModel(
        num_attention_heads=heads, ffn_dim=4 * width, num_layers=num_layers
    )
    network.save_pretrained(folder / TRANSFORMER)
    layer = sum(value.numel() for value in network.blocks[0].parameters())
    every = sum(value.numel() for value in network.parameters())
    facts = {"parameters": every, "network_bytes": _BYTES * every, "layer_bytes": _BYTES * layer}
    torch.save(facts, folder / "network.pt")


def _load(rank: int, num_ranks: int, folder: Path, whole: bool) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "meeting"), num_ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks)
    facts = torch.load(folder / "network.pt", weights_only=True)
    part = check_component(folder, TRANSFORMER)
    # What the first sharding of a process imports is not part of loading.
    shard(torch.nn.Linear(4, 4), [])
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmHWM")
    if whole:
        made: Any = WanTransformer3DModel.from_pretrained(part.path)
        network = WanVelocity(made)
        shard(network, network.blocks)
    else:
        network = load_sharded(
            WanTransformer3DModel,
            part,
            WanVelocity,
            prepare=lambda made: shard(made, made.blocks, device="cpu"),
        )
    peak = _status("VmHWM") - before
    local: list[Any] = list(network.parameters())
    share = sum(_BYTES * value.to_local().numel() for value in local)
    result = {
        "before_bytes": before,
        "peak_bytes": peak,
        "share_bytes": share,
        "ratio": peak / (share + facts["layer_bytes"]),
    }
    torch.save(result, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    main()
