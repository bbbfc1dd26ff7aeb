"""Checks of what a run needs of this machine: memory, disk, outputs and services.

Every check says what it compared with what, so that a dry run can list them; what cannot be seen
from here is listed too.
"""

import importlib.util
import netrc
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from urllib.parse import urlparse

import torch

from cluster.inventory import memory_bytes
from cluster.paths import nearest_folder
from cluster.stores import store_address
from pipelines.config.recipe import DistillConfig
from pipelines.config.roles import DISCRIMINATOR, FAKE_SCORE, GENERATOR, TEACHER
from pipelines.planning.beside import bytes_beside, host_bytes_beside
from pipelines.planning.hardware import GB
from pipelines.planning.kept_bytes import kept_copies
from pipelines.planning.memory import discriminator_memory
from pipelines.planning.pool_maps import PoolMap, map_memory
from pipelines.planning.savings import savings
from pipelines.planning.search import PoolSplit, rank_memory
from pipelines.planning.stored_text import ENCODING, TEXT
from pipelines.planning.workload import Workload
from pipelines.run.folder import RunFolder
from pipelines.run.outputs import require_output_folder
from sgmd_core.errors import ConfigError
from sgmd_core.words import count_in_words
from workers.models.exporting import DTYPES
from workers.models.folder import ModelFolder

_FLOAT = 4
_WANDB_HOST = "https://api.wandb.ai"


@dataclass(frozen=True, slots=True)
class Readiness:
    """Checks that were made, in words.

    Attributes:
        checked: What was compared with what, by subject.
        not_checked: What the run needs that cannot be seen from here, by subject.
    """

    checked: Mapping[str, str]
    not_checked: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class ProcessNeed:
    """Bytes of one process where it computes, and the part of a GPU that it claims.

    Attributes:
        pool: Pool of Ray's that it belongs to.
        name: What it is, in words.
        num_bytes: Memory where it computes.
        gpus: GPUs that it claims.
        count: Processes of the kind.
        host_bytes: Main memory besides.
    """

    pool: str
    name: str
    num_bytes: float
    gpus: float
    count: int = 1
    host_bytes: float = 0.0

    @property
    def of_main_memory(self) -> "ProcessNeed":
        """Its bytes of main memory: offloads and copies for saves, and without a GPU all of it."""
        if self.gpus:
            return replace(self, name=f"{self.name}, beside the GPU", num_bytes=self.host_bytes)
        return replace(self, num_bytes=self.num_bytes + self.host_bytes)

    def in_words(self) -> str:
        """The kind of process, how many there are, and the bytes of one."""
        times = f"{self.count} x " if self.count > 1 else ""
        return f"{self.name} {times}{in_gb(self.num_bytes)}"


def check_machine(
    config: DistillConfig,
    model: ModelFolder,
    *,
    resume: bool = False,
    gpus: bool = True,
    encoding: Collection[str] = ENCODING,
) -> Readiness:
    """Checks what a run takes of this machine.

    Args:
        config: The run.
        model: Its networks.
        resume: Whether its folder is to be there already.
        gpus: Whether to look at GPUs, too; a run that starts learns of them from Ray.
        encoding: Sections of `topology` whose processes load a text encoder.

    Raises:
        ConfigError: Outputs cannot be written, memory or disk do not suffice, or W&B has no key.
    """
    checked = {"outputs": _outputs(config, model, resume=resume)}
    not_checked: dict[str, str] = {}
    if config.tracker.wandb != "off":
        checked["tracker"] = _tracker(config.tracker.wandb)
        if config.tracker.wandb == "online":
            not_checked["tracker"] = "whether W&B takes the key"
    needs = process_needs(config, model, encoding)
    if _is_elsewhere(config):
        words = ", ".join(need.in_words() for need in needs)
        not_checked["memory"] = (
            f"the cluster's machines, which a run compares before a role loads; a process needs: "
            f"{words}"
        )
        not_checked["cluster"] = f"whether {_address(config)} has the pools' CPUs and GPUs"
    else:
        kept = [need.of_main_memory for need in needs if not need.gpus or need.host_bytes]
        checked["memory"] = _main_memory(kept, Workload.of(config).at_largest)
        on_gpu = [need for need in needs if need.gpus]
        if on_gpu and gpus:
            checked["gpu_memory"] = _gpu_memory(on_gpu, Workload.of(config))
    return Readiness(checked, not_checked)


def _outputs(config: DistillConfig, model: ModelFolder, *, resume: bool) -> str:
    """Checks that the run's folder can be made and has room for what the run keeps."""
    if not resume:
        RunFolder(config.run_folder).require_free()
    require_output_folder(config.run_folder, "output")
    if address := store_address(config.run_folder):
        return f"{address} takes objects"
    folder = config.run_folder.absolute()
    attempted = f"checking the run's folder {folder}"
    there = nearest_folder(folder)
    free = shutil.disk_usage(there).free
    needed = _disk_bytes(config, model)
    if needed > free:
        raise ConfigError(
            attempted,
            f"{in_gb(free)} are free on its disk, and checkpoints and generators take "
            f"{in_gb(needed)}",
            "room for checkpoint.keep + checkpoint.keep_best + 1 states",
            "Lower these, or set output=... to a larger disk",
        )
    return (
        f"{there} takes files; {in_gb(free)} free, checkpoints and generators take {in_gb(needed)}"
    )


def _disk_bytes(config: DistillConfig, model: ModelFolder) -> float:
    """Of the states that are kept, of one that is written before an old one goes, and exports."""
    work = Workload.of(config)
    # Of both learners trained weights and moments; a decay of 0 has no first moment.
    learners = [role for role in config.roles if role != TEACHER]
    copies = {role: kept_copies(work, role) for role in learners}
    state = sum(
        _FLOAT * work.num_trained(role) * (1 + copies[role].moments + copies[role].averages)
        for role in learners
    )
    states = config.checkpoint.keep + config.checkpoint.keep_best + 1
    exports = 1 + int(config.checkpoint.keep_best > 0)
    denoiser = model.num_denoiser_parameters
    written = DTYPES[config.export.dtype].itemsize * denoiser
    if config.export.components == "copy":
        written += _FLOAT * (sum(model.num_parameters.values()) - denoiser)
    return states * state + exports * written


def _tracker(wandb: str) -> str:
    """Checks that W&B is installed and, online, has a key."""
    attempted = f"checking tracker.wandb={wandb}"
    if importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            attempted, "the package wandb is not installed", remedy="pip install wandb"
        )
    if wandb == "online" and not (os.environ.get("WANDB_API_KEY") or _in_netrc()):
        raise ConfigError(
            attempted,
            "no key of W&B in WANDB_API_KEY or in ~/.netrc",
            "a key",
            "Export WANDB_API_KEY, or set tracker.wandb=offline, which needs no account",
        )
    return "W&B is installed" + (", and there is a key" if wandb == "online" else "")


def _in_netrc() -> bool:
    host = urlparse(os.environ.get("WANDB_BASE_URL", _WANDB_HOST)).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def process_needs(
    config: DistillConfig, model: ModelFolder, encoding: Collection[str]
) -> list[ProcessNeed]:
    """Bytes of every process, by the planner's memory model; of encoders the weights."""
    topology, work = config.topology, Workload.of(config)
    if topology.shares_pools:
        needs = _needs_of_pools(config, work)
    elif topology.mode == "local" and work.adapters:
        needs = [_need_of_one_process(config, work)]
    else:
        needs = _needs_of_roles(config, work)
    return needs + _needs_beside(config, work, model, encoding)


def _needs_of_pools(config: DistillConfig, work: Workload) -> list[ProcessNeed]:
    topology = config.topology
    pools = topology.role_pools_of(config.roles)
    one = PoolMap(
        {name: pool.ranks for name, pool in pools.items()},
        topology.places_of(config.roles),
        config.batch.micro_batches,
        topology.depth,
    )
    return [
        ProcessNeed(
            name,
            "all roles" if one.roles_on(name) == config.roles else f"pool {name}",
            memory.total,
            pools[name].gpus,
            pools[name].ranks,
            memory.main_memory,
        )
        for name, memory in map_memory(work, one).items()
    ]


def _need_of_one_process(config: DistillConfig, work: Workload) -> ProcessNeed:
    """Need of a process whose roles share one base of adapters."""
    topology = config.topology
    places = dict.fromkeys(config.roles, ("local",))
    one = PoolMap({"local": 1}, places, config.batch.micro_batches)
    gpus = max(pool.gpus for pool in (topology.generator, topology.teacher))
    memory = map_memory(work, one)["local"]
    return ProcessNeed("local", "all roles", memory.total, gpus, 1, memory.main_memory)


def _needs_of_roles(config: DistillConfig, work: Workload) -> list[ProcessNeed]:
    topology = config.topology
    teams = topology.teams_of(config.roles)
    split = PoolSplit(
        teams[GENERATOR].ranks,
        teams[TEACHER].replicas,
        teams[FAKE_SCORE].ranks,
        config.batch.micro_batches,
        topology.depth,
        teams[TEACHER].ranks,
    )
    own = {GENERATOR: topology.generator, TEACHER: topology.teacher}
    own[FAKE_SCORE] = topology.fake_score
    memories = rank_memory(work, split)
    if DISCRIMINATOR in config.roles:
        own[DISCRIMINATOR] = topology.discriminator
        ranks = topology.discriminator.ranks
        samples = -(-config.batch.size // config.batch.micro_batches // ranks)
        memories[DISCRIMINATOR] = discriminator_memory(work, ranks, samples)
    return [
        ProcessNeed(
            role,
            role.replace("_", " "),
            memory.total,
            own[role].gpus,
            teams[role].size,
            memory.main_memory,
        )
        for role, memory in memories.items()
    ]


def _needs_beside(
    config: DistillConfig, work: Workload, model: ModelFolder, encoding: Collection[str]
) -> list[ProcessNeed]:
    sizes, denoiser = model.encoder_sizes, model.num_denoiser_parameters
    host = host_bytes_beside(config, work, sizes, encoding)
    return [
        ProcessNeed(
            section,
            "text encoder" if section == TEXT else section,
            needed,
            getattr(config.topology, section).gpus,
            host_bytes=host.get(section, 0.0),
        )
        for section, needed in bytes_beside(config, work, sizes, denoiser, encoding).items()
    ]


def _main_memory(needs: list[ProcessNeed], at_largest: str) -> str:
    total, free = memory_bytes()
    needed = sum(need.count * need.num_bytes for need in needs)
    words = ", ".join(need.in_words() for need in needs)
    if needed > total:
        raise ConfigError(
            "checking the memory of this machine",
            f"the run needs {in_gb(needed)}{at_largest} ({words}), and the machine has "
            f"{in_gb(total)}",
            "all processes that compute on the CPU to fit",
            "Use a smaller model, clips or micro-batches, give the pools GPUs "
            "(topology.pools.NAME.gpus), or more machines (topology.address); `sgmd plan` says "
            "what would fit",
        )
    short = "" if needed <= free else "; more than is free now"
    return f"{in_gb(needed)} needed ({words}), {in_gb(free)} free of {in_gb(total)}{short}"


def _gpu_memory(needs: list[ProcessNeed], work: Workload) -> str:
    sizes = [
        torch.cuda.get_device_properties(index).total_memory
        for index in range(torch.cuda.device_count())
    ]
    attempted = "checking the GPUs of this machine"
    words = ", ".join(need.in_words() for need in needs)
    if not sizes:
        raise ConfigError(
            attempted,
            f"none that torch can use, and these are to have one: {words}",
            "a GPU for every pool whose `gpus` (in topology) is above 0",
            "Set these to 0, or join a cluster that has GPUs: topology.address",
        )
    largest = max(sizes)
    too_large = [need for need in needs if need.num_bytes > largest]
    if too_large:
        raise ConfigError(
            attempted,
            f"{', '.join(need.in_words() for need in too_large)}{work.at_largest}, and a GPU has "
            f"{in_gb(largest)}",
            "a rank of each role to fit its GPU",
            ways_to_save(work),
        )
    claimed = sum(need.count * need.gpus for need in needs)
    needed = sum(need.count * need.num_bytes for need in needs)
    if claimed > len(sizes) or needed > sum(sizes):
        raise ConfigError(
            attempted,
            f"{count_in_words(claimed, 'GPU')} claimed and {in_gb(needed)} needed ({words}); the "
            f"machine has {count_in_words(len(sizes), 'GPU')} with {in_gb(sum(sizes))} in all",
            "no more than there is",
            "Lower `gpus` and ranks of the pools in topology, or join a larger cluster: "
            "topology.address",
        )
    return f"{words}; {count_in_words(len(sizes), 'GPU')} of {in_gb(largest)}"


def ways_to_save(work: Workload) -> str:
    """Remedy for a GPU that is too small: the settings that take less of it."""
    settings = [" ".join(saving.settings) for saving in savings(work)]
    cheaper = f"Set one or more of these, the cheapest first: {'; '.join(settings)}. " * bool(
        settings
    )
    return f"{cheaper}Or take more ranks or smaller clips; `sgmd plan --fit` says what would fit"


def _is_elsewhere(config: DistillConfig) -> bool:
    return config.topology.mode != "local" and _address(config) is not None


def _address(config: DistillConfig) -> str | None:
    return config.topology.address or os.environ.get("RAY_ADDRESS")


def in_gb(num_bytes: float) -> str:
    """Bytes as decimal gigabytes with three digits: `14.2 GB`."""
    return f"{num_bytes / GB:.3g} GB"
