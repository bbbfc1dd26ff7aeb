"""State of a role on disk: its files, and how they are written and read.

    FOLDER/ROLE/role.json               role, number of updates, number of ranks that wrote
    on one rank, beside it:
      weights.safetensors               parameters by name
      optimizer.safetensors             AdamW's moments, `exp_avg/NAME` and so on
    on several ranks, from each:
      rank-00001-of-00004.safetensors   its rows of the parameters
      rank-00001-of-00004.optimizer.safetensors
      rank-00001-of-00004.json          which rows of which whole; SHA-256 of the two files

FOLDER is one checkpoint, a local folder or an fsspec URL such as s3://bucket/run/step-000200. Every
tensor keeps its dtype and every bit, so a resumed run goes on with the same numbers. Nothing is
pickled. No rank ever holds more than its part: it writes its own rows, and reads its own rows out
of the files that have them, which another number of ranks may have written. A checkpoint exists
once its manifest does, which the controller writes after all roles are done; what a crash leaves
behind before that is overwritten by the next attempt.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass, field
from types import SimpleNamespace
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem
from safetensors import SafetensorError
from torch import Tensor

from cluster.files import write_whole
from cluster.storage_errors import storage_errors
from cluster.stores import open_store
from sgmd_core.errors import CheckpointError, ConfigError
from workers.network_settings import LoraSettings
from workers.rows import PartFile, RowRange, read_parts
from workers.sharding import is_first_rank, num_ranks, own_rank
from workers.tensor_files import write_tensors

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
        rows: By parameter, place of the part that the tensors above are; empty: they are whole.
    """

    updates: int
    weights: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]
    lora: LoraSettings | None = None
    skipped: int = 0
    rows: Mapping[str, RowRange] = field(default_factory=dict)

    @property
    def whole_shapes(self) -> dict[str, Any]:
        """By parameter, something with the shape of the whole."""
        return {
            name: SimpleNamespace(shape=self.rows[name].shape) if name in self.rows else value
            for name, value in self.weights.items()
        }


def save_role(folder: str, role: str, state: RoleState) -> dict[str, str]:
    """Writes a role's state under `folder/role`; of whole tensors only the first rank does.

    Args:
        folder: The checkpoint: a local folder or an fsspec URL.
        role: Name of the subfolder.
        state: What to write; tensors in main memory. Every rank writes the part that it has.

    Returns:
        SHA-256 of what this rank has written, by path in the checkpoint.

    Raises:
        StorageError: The disk is full or cannot be written to.
    """
    target = f"{folder.rstrip('/')}/{role}"
    digests: dict[str, str] = {}
    with storage_errors(f"saving the {role} to {target}"):
        filesystem, path = open_store(target)
        if state.rows:
            digests |= _write_part(filesystem, path, role, state)
        elif is_first_rank():
            digests |= _write_tensors(filesystem, path, state, _WEIGHTS, _OPTIMIZER)
        if is_first_rank():
            counters = {
                "role": role,
                "updates": state.updates,
                "skipped": state.skipped,
                "has_optimizer": bool(state.moments),
                "sha256": {} if state.rows else dict(digests),
            }
            counters |= {"ranks": num_ranks()} if state.rows else {}
            counters |= {} if state.lora is None else {"lora": asdict(state.lora)}
            digests[_COUNTERS] = _write_json(filesystem, f"{path}/{_COUNTERS}", counters)
    return {f"{role}/{name}": digest for name, digest in digests.items()}


def is_role_written(folder: str, role: str, iterations: int) -> bool:
    """Tells whether all ranks have written a role's state whole; its tensors are not looked at.

    What each rank writes last names what it has written before.

    Args:
        folder: The checkpoint, which was empty before.
        role: Name of the subfolder.
        iterations: Updates that the state has seen, skipped ones included.
    """
    filesystem, path = open_store(f"{folder.rstrip('/')}/{role}")
    filesystem.invalidate_cache()
    try:
        counters = json.loads(filesystem.cat_file(f"{path}/{_COUNTERS}"))
        stems = [_stem(rank, counters["ranks"]) for rank in range(counters.get("ranks", 0))]
        # Each is written whole or not at all.
        updates = {
            json.loads(filesystem.cat_file(f"{path}/{one}.json"))["updates"] for one in stems
        }
        seen = counters["updates"] + counters.get("skipped", 0)
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return seen == iterations and updates <= {counters["updates"]}


def _write_part(
    filesystem: AbstractFileSystem, path: str, role: str, state: RoleState
) -> dict[str, str]:
    """Writes this rank's rows, and what all ranks have alike, such as a count of updates."""
    stem = _stem(own_rank(), num_ranks())
    names = (f"{stem}.safetensors", f"{stem}.optimizer.safetensors")
    digests = _write_tensors(filesystem, path, state, *names)
    index = {
        "role": role,
        "updates": state.updates,
        "rank": own_rank(),
        "ranks": num_ranks(),
        "rows": {name: astuple(rows) for name, rows in state.rows.items()},
        "sha256": dict(digests),
    }
    digests[f"{stem}.json"] = _write_json(filesystem, f"{path}/{stem}.json", index)
    return digests


def _stem(rank: int, ranks: int) -> str:
    return f"rank-{rank:05d}-of-{ranks:05d}"


def _write_tensors(
    filesystem: AbstractFileSystem, path: str, state: RoleState, weights: str, optimizer: str
) -> dict[str, str]:
    digests = {weights: write_tensors(f"{path}/{weights}", state.weights, filesystem)}
    if state.moments:
        digests[optimizer] = write_tensors(f"{path}/{optimizer}", state.moments, filesystem)
    return digests


def _write_json(filesystem: AbstractFileSystem, path: str, content: Mapping[str, Any]) -> str:
    text = (json.dumps(content) + "\n").encode()
    write_whole(path, text, filesystem)
    return hashlib.sha256(text).hexdigest()


def load_role(folder: str, role: str, rows: Mapping[str, RowRange] | None = None) -> RoleState:
    """Reads what `save_role` wrote, and checks every byte of the files that it reads.

    A role without digests was saved by an older version, and is read as it is.

    Args:
        folder: The checkpoint.
        role: Name of the subfolder.
        rows: By parameter, the part that is wanted; None: everything, whole.

    Raises:
        CheckpointError: A file is missing, torn, changed, or another role's; names it.
        StorageError: The server fails, or does not answer in time.
    """
    target = f"{folder.rstrip('/')}/{role}"
    filesystem, path = open_store(target)
    try:
        return _load(filesystem, path, role, rows or {})
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


def _load(
    filesystem: AbstractFileSystem, path: str, role: str, wanted: Mapping[str, RowRange]
) -> RoleState:
    counters = json.loads(filesystem.cat_file(f"{path}/{_COUNTERS}"))
    _require(
        counters.get("role", role) == role, f"{_COUNTERS} is that of the {counters.get('role')}"
    )
    updates, ranks = int(counters["updates"]), int(counters.get("ranks", 0))
    kinds: list[list[PartFile]] = [[], []]
    if not ranks:
        digests = counters.get("sha256", {})
        for kind, name in zip(kinds, (_WEIGHTS, _OPTIMIZER), strict=True):
            kind.append(PartFile(filesystem, path, name, digests.get(name), {}))
    for rank in range(ranks):
        stem = _stem(rank, ranks)
        index = json.loads(filesystem.cat_file(f"{path}/{stem}.json"))
        found = tuple(index[name] for name in ("role", "updates", "rank", "ranks"))
        expected = (role, updates, rank, ranks)
        _require(found == expected, f"{stem}.json is that of {found}, not of {expected}")
        places = {
            name: RowRange(int(first), int(num), tuple(shape))
            for name, (first, num, shape) in index["rows"].items()
        }
        names = (f"{stem}.safetensors", f"{stem}.optimizer.safetensors")
        for kind, name in zip(kinds, names, strict=True):
            if name in index["sha256"]:
                kind.append(PartFile(filesystem, path, name, index["sha256"][name], places))
    weights = read_parts(kinds[0], wanted)
    moments = read_parts(kinds[1], wanted) if counters["has_optimizer"] else {}
    own = {
        name: rows
        for name, rows in wanted.items()
        if name in weights and tuple(weights[name].shape) == (rows.num, *rows.shape[1:])
    }
    skipped = int(counters.get("skipped", 0))
    return RoleState(updates, weights, moments, _lora_of(counters.get("lora")), skipped, own)


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)


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
