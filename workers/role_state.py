"""State of a role on disk: its files, and how they are written.

    FOLDER/ROLE/weights.safetensors     parameters by name
    FOLDER/ROLE/optimizer.safetensors   AdamW's moments, `exp_avg/NAME` and so on
    FOLDER/ROLE/role.json               role, number of updates, SHA-256 of the files beside it

FOLDER is one checkpoint, a local folder or an fsspec URL such as s3://bucket/run/step-000200. Every
tensor keeps its dtype and every bit, so a resumed run goes on with the same numbers. Nothing is
pickled. A checkpoint exists once its manifest does, which the controller writes after all roles
have returned; what a crash leaves behind before that is overwritten by the next attempt.
"""

import hashlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cluster.files import open_store, sha256_of, storage_errors, whole_file, write_whole
from sgmd_core.errors import CheckpointError, ConfigError
from workers.settings import LoraSettings
from workers.sharding import is_first_rank

_WEIGHTS = "weights.safetensors"
_OPTIMIZER = "optimizer.safetensors"
_COUNTERS = "role.json"
_REMEDY = "Resume from another checkpoint, or start a new run"


@dataclass(frozen=True, slots=True)
class RoleState:
    """All that a role must have back to go on as if it had never stopped.

    Attributes:
        updates: How often the weights have been updated.
        weights: Parameters by name.
        moments: State of the optimizer by `KIND/NAME`; empty for averaged weights.
        lora: Settings of the adapters that the weights are; None: they are those of a network.
        skipped: Updates that were skipped; with `updates` they make the iterations.
    """

    updates: int
    weights: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]
    lora: LoraSettings | None = None
    skipped: int = 0


def save_role(folder: str, role: str, state: RoleState) -> dict[str, str]:
    """Writes a role's state under `folder/role`; of several ranks only the first one does.

    Args:
        folder: The checkpoint: a local folder or an fsspec URL.
        role: Name of the subfolder.
        state: What to write; tensors on any device.

    Returns:
        SHA-256 of what was written, by path in the checkpoint; nothing on other ranks.

    Raises:
        StorageError: The disk is full or cannot be written to.
    """
    if not is_first_rank():
        return {}
    target = f"{folder.rstrip('/')}/{role}"
    with storage_errors(f"saving the {role} to {target}"):
        digests = _write(*open_store(target), role, state)
    return {f"{role}/{name}": digest for name, digest in digests.items()}


def _write(
    filesystem: AbstractFileSystem, path: str, role: str, state: RoleState
) -> dict[str, str]:
    """Writes the files of a role; returns their digests by name."""
    digests = {_WEIGHTS: _write_tensors(filesystem, f"{path}/{_WEIGHTS}", state.weights)}
    if state.moments:
        optimizer = f"{path}/{_OPTIMIZER}"
        digests[_OPTIMIZER] = _write_tensors(filesystem, optimizer, state.moments)
    counters = {
        "role": role,
        "updates": state.updates,
        "skipped": state.skipped,
        "has_optimizer": bool(state.moments),
        "sha256": digests,
    }
    if state.lora is not None:
        counters["lora"] = asdict(state.lora)
    text = (json.dumps(counters) + "\n").encode()
    write_whole(f"{path}/{_COUNTERS}", text, filesystem)
    return {**digests, _COUNTERS: hashlib.sha256(text).hexdigest()}


def load_role(folder: str, role: str) -> RoleState:
    """Reads what `save_role` wrote, and checks every byte of it.

    A role without digests was saved by an older version, and is read as it is.

    Raises:
        CheckpointError: A file is missing, torn, changed, or another role's; names it.
        StorageError: The server fails, or does not answer in time.
    """
    target = f"{folder.rstrip('/')}/{role}"
    filesystem, path = open_store(target)
    try:
        counters = json.loads(filesystem.cat_file(f"{path}/{_COUNTERS}"))
        saved_as, digests = counters.get("role", role), counters.get("sha256", {})
        if saved_as != role:
            raise ValueError(f"{_COUNTERS} is that of the {saved_as}")
        weights = _read_tensors(filesystem, path, _WEIGHTS, digests)
        has_optimizer = counters["has_optimizer"]
        moments = _read_tensors(filesystem, path, _OPTIMIZER, digests) if has_optimizer else {}
        lora = _lora_of(counters.get("lora"))
        skipped = int(counters.get("skipped", 0))
        return RoleState(int(counters["updates"]), weights, moments, lora, skipped)
    except OSError as error:
        if isinstance(filesystem, LocalFileSystem) or isinstance(error, FileNotFoundError):
            raise _broken(role, target, error) from error
        # A server that fails does not make a checkpoint a broken one.
        with storage_errors(f"loading the {role} from {target}"):
            raise
    except (
        SafetensorError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        ConfigError,
    ) as error:
        raise _broken(role, target, error) from error


def _lora_of(record: Mapping[str, Any] | None) -> LoraSettings | None:
    if record is None:
        return None
    return LoraSettings(**{**record, "targets": tuple(record["targets"])})


def _broken(role: str, target: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"loading the {role} from {target}",
        f"{type(error).__name__}: {error}",
        f"{_COUNTERS}, {_WEIGHTS} and {_OPTIMIZER}, whole",
        _REMEDY,
    )


def require_same_tensors(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], attempted: str
) -> None:
    """Checks that saved weights belong to this network.

    Raises:
        CheckpointError: Names or shapes differ; names the first one that does.
    """
    for name in sorted({*found, *expected}):
        shapes = [
            str(tuple(tensors[name].shape)) if name in tensors else "missing"
            for tensors in (found, expected)
        ]
        if shapes[0] != shapes[1]:
            raise CheckpointError(
                attempted,
                f"{name} is {shapes[0]} where it comes from and {shapes[1]} in the network",
                "weights of the same network",
                "Point model.folder at the model that the run was started with",
            )


def require_same_adapters(
    found: LoraSettings | None, expected: LoraSettings | None, attempted: str
) -> None:
    """Checks that saved weights are adapters of the same settings, or a whole network's as well.

    Raises:
        CheckpointError: They are not; names what differs.
    """
    if found != expected:
        raise CheckpointError(
            attempted,
            f"{_adapters_in_words(found)}, and the run has {_adapters_in_words(expected)}",
            "the same settings of lora as when it was saved",
            "Set lora of the role as it was, or start a new run",
        )


def _adapters_in_words(lora: LoraSettings | None) -> str:
    if lora is None:
        return "weights of a whole network"
    targets = ", ".join(lora.targets) or "all projections"
    return f"adapters of rank {lora.rank} and alpha {lora.alpha:g} on {targets}"


def _write_tensors(filesystem: AbstractFileSystem, path: str, tensors: Mapping[str, Tensor]) -> str:
    """Writes a file of tensors; returns its digest."""
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    if isinstance(filesystem, LocalFileSystem):
        with whole_file(path) as draft:
            save_file(whole, draft)
            return sha256_of(draft)
    with tempfile.TemporaryDirectory() as scratch:
        save_file(whole, Path(scratch) / _WEIGHTS)
        filesystem.put_file(str(Path(scratch) / _WEIGHTS), path)
        return sha256_of(Path(scratch) / _WEIGHTS)


def _read_tensors(
    filesystem: AbstractFileSystem, folder: str, name: str, digests: Mapping[str, str]
) -> dict[str, Tensor]:
    """Reads a file of tensors whose digest agrees with what was written."""
    path = f"{folder}/{name}"
    if isinstance(filesystem, LocalFileSystem):
        _require_digest(Path(path), name, digests)
        return load_file(path)
    with tempfile.TemporaryDirectory() as scratch:
        local = Path(scratch) / _WEIGHTS
        filesystem.get_file(path, str(local))
        _require_digest(local, name, digests)
        # Copied, because safetensors maps the file, which is about to be deleted.
        return {name: tensor.clone() for name, tensor in load_file(local).items()}


def _require_digest(path: Path, name: str, digests: Mapping[str, str]) -> None:
    expected = digests.get(name)
    if expected is not None and (found := sha256_of(path)) != expected:
        raise ValueError(
            f"{name} is not what was written (sha256 {found[:12]}..., expected {expected[:12]}...)"
        )
