"""Settings of memory and speed, one at a time, against what `sgmd plan` says of them.

    plain             as the recipe `wan21-1.3b` has it
    savings           each that `sgmd plan --fit` proposes, where the recipe lacks it
    walk=joint        fake_score.walk: joint, which it takes where it is faster
    selective         compute.checkpointing: selective
    moments in 8 bits optimizer.moment_bits: 8
    adapters          LoRA of generator and fake score over the teacher's weights, kept once
    attention NAME    each kernel of `workers.attention` that can be imported here
    ulysses           two ranks on each sample, where there are two devices
    text encoder      of the released size, in bfloat16, on one caption

Each makes two iterations of one sample, all roles on the card; the second counts. What the time of
the step does not allow is named. A plan is right where its memory is within a tenth.
"""

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import nn
from transformers import UMT5Config, UMT5EncoderModel

from on_gpu.cases import NUM_STEPS, SEED, Case, free, peak_bytes, reset_peak, synchronize
from on_gpu.ranks import join
from on_gpu.step import Context
from on_gpu.whole_iteration import iterations, recipe_of, workload_of
from pipelines.config.recipe import DistillConfig
from pipelines.planning.networks import released_models
from pipelines.planning.pool_maps import fused_memory
from pipelines.planning.savings import Saving, savings
from pipelines.planning.workload import Workload
from sgmd_core.errors import ConfigError
from sgmd_core.objectives.sgmd import SgmdObjective
from sgmd_core.schedule import FlowMatchSchedule
from workers.adapters import add_adapters
from workers.attention import KERNELS, NATIVE, require_kernel
from workers.base_networks import view_of
from workers.compute import prepare_network
from workers.fake_score_tracker import FakeScoreTracker
from workers.generator_learner import GeneratorLearner
from workers.models.family import Denoiser
from workers.network_settings import ComputeSettings, LoraSettings
from workers.score_teacher import ScoreTeacher
from workers.sharding import shard

PLAIN, MOMENTS, ADAPTERS = "plain", "moments in 8 bits", "adapters"
SELECTIVE, ONE_WALK = "checkpointing=selective", "walk=joint"
ULYSSES, TEXT_ENCODER = "ulysses", "text encoder"
LEARNERS, ROLES = ("generator", "fake_score"), ("generator", "fake_score", "teacher")
EXITS = (1,)
TOLERANCE = 0.1
_RANK = 64
# Weights in 8 bits are made of those in bfloat16.
_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}
_CAPTION_TOKENS = 512


def settings_of(case: Case) -> dict[str, list[str]]:
    """Overrides of the recipe by name: what one process can try.

    Args:
        case: Networks and clip, whose plan says what the recipe does without.
    """
    work = workload_of(case, recipe_of(case, EXITS))
    found = {
        PLAIN: [],
        **{name_of(saving): [*saving.settings] for saving in savings(work)},
        ONE_WALK: ["fake_score.walk=joint"],
        SELECTIVE: [f"{role}.compute.checkpointing=selective" for role in LEARNERS],
        MOMENTS: [f"{role}.optimizer.moment_bits=8" for role in LEARNERS],
        ADAPTERS: [
            *(f"{role}.lora={{rank: {_RANK}, alpha: {_RANK}}}" for role in LEARNERS),
            *(f"{role}.compute.weights=bf16" for role in ROLES),
        ],
    }
    for name, kernel in KERNELS.items():
        if name != NATIVE:
            # A kernel without gradients can serve the teacher alone.
            served = ROLES if kernel.differentiable else ("teacher",)
            found[f"attention {name}"] = [f"{role}.compute.attention={name}" for role in served]
    return found


def name_of(saving: Saving) -> str:
    """Its settings, without the roles where they are those that learn."""
    parts = (setting.partition(".") for setting in saving.settings)
    short = (own if role in LEARNERS else f"{role}.{own}" for role, _, own in parts)
    return " ".join(dict.fromkeys(own.removeprefix("compute.") for own in short))


def measure(context: Context, case: Case, budget_s: float) -> None:
    """Tries every setting for which there is time.

    Args:
        context: Where they are recorded.
        case: Networks, clip and device.
        budget_s: Seconds for all of them.
    """
    context.record(num_frames=case.num_frames, samples=len(EXITS), settings={}, left_out=[])
    end_s, longest_s = time.monotonic() + budget_s, 0.0
    tries = {name: lambda own=own: _try(case, own) for name, own in settings_of(case).items()}
    tries = {
        PLAIN: tries.pop(PLAIN),
        MOMENTS: tries.pop(MOMENTS),
        ADAPTERS: tries.pop(ADAPTERS),
        TEXT_ENCODER: lambda: _encode_text(case),
        ULYSSES: lambda: _split_tokens(case),
        **tries,
    }
    for name, attempt in tries.items():
        if time.monotonic() + longest_s > end_s:
            context.record(left_out=[*context.results["left_out"], name])
            continue
        started_s = time.monotonic()
        try:
            row = attempt()
        except Exception as error:  # A kernel or a library that refuses this card.
            # Of a process that was started, the last line says what it ended with.
            row = {"failed": f"{type(error).__name__}: {str(error).strip().splitlines()[-1:]}"}
        free(case.device)
        longest_s = max(longest_s, time.monotonic() - started_s)
        context.record(settings=context.results["settings"] | {name: row})


def _try(case: Case, settings: Sequence[str]) -> dict[str, Any]:
    """Two iterations by a recipe with these settings, or why they are skipped here."""
    config = recipe_of(case, EXITS, settings)
    try:
        for role in ROLES:
            require_kernel(_compute(config, role).attention, case.device.partition(":")[0])
    except ConfigError as error:
        return {"skipped": error.found}
    # Captions and weights are made up, the same for every setting.
    torch.manual_seed(SEED)
    *_, row = iterations(case, config, roles_of(case, config), EXITS)
    return _against(row, fused_memory(_work(case, config), 1).total)


def _against(row: Mapping[str, Any], planned_bytes: float) -> dict[str, Any]:
    """Figures of an iteration beside its plan."""
    peak = 1e9 * row["peak_gb"]
    ratio = peak / planned_bytes if peak else None
    return {
        "seconds": row["seconds"],
        "peak_gb": row["peak_gb"],
        "planned_gb": planned_bytes / 1e9,
        "over_plan": ratio,
        "holds": None if ratio is None else abs(ratio - 1) <= TOLERANCE,
        "losses": row.get("losses", {}),
    }


def roles_of(case: Case, config: DistillConfig) -> dict[str, Any]:
    """The three roles as a recipe has them, over networks of random weights on the device.

    Roles with adapters, and their teacher, share one base.
    """
    lora = {role: _lora(config, role) for role in ROLES}
    base = None
    if any(lora.values()):
        base = case.network(ComputeSettings()).eval().requires_grad_(False)
        nn.Module.to(base, _TYPES[config.teacher.compute.weights])
    networks: dict[str, Denoiser] = {}
    for role in ROLES:
        compute, own = _compute(config, role), lora[role]
        if base is not None and (own is not None or role == "teacher"):
            network = view_of(base)
        else:
            network = case.network(ComputeSettings())
            if role == "teacher":
                nn.Module.to(network, _TYPES[compute.weights])
        if own is not None:
            add_adapters(network, own, SEED, role)
        prepare_network(network, compute)
        shard(network, network.blocks, dtype=network.autocast_dtype)
        if compute.weights == "fp8":
            network.store_in_fp8()
        networks[role] = network
    return {
        "generator": GeneratorLearner(
            networks["generator"],
            FlowMatchSchedule(),
            replace(config.generator, num_steps=NUM_STEPS),
            case.latent_shape,
            SEED,
        ),
        "fake_score": FakeScoreTracker(networks["fake_score"], SgmdObjective(), config.fake_score),
        "teacher": ScoreTeacher(networks["teacher"], config.teacher),
    }


def _compute(config: DistillConfig, role: str) -> ComputeSettings:
    return getattr(config, role).compute


def _lora(config: DistillConfig, role: str) -> LoraSettings | None:
    return getattr(getattr(config, role), "lora", None)


def _work(case: Case, config: DistillConfig) -> Workload:
    """The iteration, with the adapters of this network's projections, all of which have them."""
    widths = sum(sum(pair) for pair in case.shape.projections.values())
    adapters = tuple(
        (role, case.shape.num_layers * lora.rank * widths)
        for role in LEARNERS
        if (lora := _lora(config, role)) is not None
    )
    return replace(workload_of(case, config), adapters=adapters)


def _encode_text(case: Case) -> dict[str, Any]:
    """A text encoder of the released size, or a small one; `sgmd plan` counts its weights."""
    small = case.model == "tiny"
    sizes = {"d_model": 64, "d_ff": 128, "num_heads": 4, "num_layers": 2, "vocab_size": 100}
    released = {"d_model": 4096, "d_ff": 10240, "num_heads": 64, "num_layers": 24}
    chosen = sizes if small else {**released, "vocab_size": 256384}
    config = UMT5Config(d_kv=chosen["d_model"] // chosen["num_heads"], **chosen)
    reset_peak(case.device)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(case.device):
            encoder = UMT5EncoderModel(config).eval().requires_grad_(False)
            tokens = torch.ones(1, case.text_length if small else _CAPTION_TOKENS, dtype=torch.long)
    finally:
        torch.set_default_dtype(torch.float32)
    for _ in range(2):
        synchronize(case.device)
        reset_peak(case.device)
        started_s = time.perf_counter()
        encoder(tokens)
        synchronize(case.device)
        spent_s = time.perf_counter() - started_s
    own = sum(value.numel() for value in encoder.parameters())
    encoders = None if small else released_models()[case.model].encoders
    planned = 2 * (own if encoders is None else encoders.text)
    return _against({"seconds": spent_s, "peak_gb": peak_bytes(case.device) / 1e9}, planned)


def _split_tokens(case: Case) -> dict[str, Any]:
    """An iteration of two ranks that work on each sample together."""
    on_card = case.device != "cpu"
    if on_card and torch.cuda.device_count() < 2:
        return {"skipped": f"{torch.cuda.device_count()} device; it takes two"}
    with tempfile.TemporaryDirectory() as scratch:
        multiprocessing.set_forkserver_preload(["workers.build", "workers.models.wan"])
        method = "spawn" if on_card else "forkserver"
        arguments = (2, on_card, scratch, case)
        multiprocessing.start_processes(_enter, arguments, nprocs=2, start_method=method)
        return torch.load(Path(scratch) / "row.pt", weights_only=True)


def _enter(rank: int, size: int, on_card: bool, scratch: str, case: Case) -> None:
    """One of the ranks; the first writes what it has found."""
    with join(rank, size, on_card, scratch) as device:
        # All ranks have the same captions and weights.
        torch.manual_seed(SEED)
        own = replace(case, device=device)
        plain = recipe_of(own, EXITS)
        # The ranks are these processes, whatever a recipe would have.
        split = {role: _split_over(getattr(plain, role), size) for role in ROLES}
        config = plain.model_copy(update=split)
        *_, row = iterations(own, plain, roles_of(own, config), EXITS)
        dist.barrier()
        if rank == 0:
            planned = fused_memory(_work(own, config), size).total
            torch.save(_against(row, planned), Path(scratch) / "row.pt")


def _split_over(settings: Any, size: int) -> Any:  # noqa: ANN401  (of any role)
    return replace(settings, compute=replace(settings.compute, ulysses=size))
