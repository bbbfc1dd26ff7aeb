"""Export a generator: write a format, read it back as its users would, compare, describe.

    diffusers       a model folder; other components linked, copied or left out
    single-file     one file of weights, in the names of the original release
    comfyui         the same in the names that ComfyUI saves
    lora            the change from the base, of low rank, for diffusers
    lora-comfyui    the same for ComfyUI

The result is a folder with the file, sgmd.json (how to sample) and README.md (the model card). It
takes its place once everything in it was read back.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from cluster.folders import whole_folder_at
from cluster.paths import real_path
from cluster.stores import store_address
from pipelines.exporting.model_card import Figures, write_model_card
from pipelines.exporting.source import TrainedGenerator, open_source
from pipelines.exporting.target import EXPORTS, require_safe_target
from pipelines.run.folder import RunFolder
from pipelines.run.opened_copy import run_copy
from pipelines.run.outputs import require_inside
from pipelines.run.places import shared_place
from sgmd_core.errors import ConfigError, ModelFolderError
from workers.models.addresses import local_model, missing_folder
from workers.models.configs import INDEX_FILE
from workers.models.exchange import (
    LORA_FORMATS,
    LORA_STEM,
    WEIGHT_FORMATS,
    ExchangeFiles,
    part_path,
)
from workers.models.exporting import DTYPES, Components, narrowed
from workers.models.families import family_of
from workers.models.low_rank import LowRank, approximate_all, share_kept
from workers.models.weight_digests import SETTINGS_FILE, write_model_settings

DIFFUSERS = "diffusers"
FORMATS = (DIFFUSERS, *WEIGHT_FORMATS, *LORA_FORMATS)
OnProgress = Callable[[str, int, int], None]

# bfloat16 has 8 significant bits: half a unit of the last place.
_ROUNDING = {"fp32": 0.0, "fp16": 2.0**-11, "bf16": 2.0**-8}
_RANK = 64
# Rounding of both factors, in squares, far above that of bfloat16.
_LORA_ROUNDING = 1e-3


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """Form of an export.

    Attributes:
        form: One of `FORMATS`.
        dtype: Type of the weights: `bf16`, `fp16` or `fp32`.
        components: For `diffusers`: the other components are linked, copied or left out.
        rank: Of a LoRA of all weights; None: 64. Adapters keep their own.
    """

    form: str = DIFFUSERS
    dtype: str = "bf16"
    components: Components = "link"
    rank: int | None = None

    def __post_init__(self) -> None:
        """Checks the values."""
        for value, known, option in (
            (self.form, FORMATS, "--format"),
            (self.dtype, DTYPES, "--dtype"),
            (self.components, get_args(Components), "--components"),
        ):
            if value not in known:
                expected = f"one of {', '.join(known)}"
                raise ConfigError("exporting", f"{option} {value}", expected)
        if self.rank is not None and not 1 <= self.rank <= 2**14:
            raise ConfigError("exporting", f"--rank {self.rank}", "from 1 to 16384")


@dataclass(frozen=True, slots=True)
class ExportResult:
    """An export that was read back.

    Attributes:
        folder: Where it is.
        iteration: Updates that the weights have seen; None where this is not known.
        bytes: Of the weight files that were written; linked ones are not counted.
        figures: Its form and what the comparison has shown.
        takes_lora: The family can be exported as a LoRA too.
    """

    folder: Path
    iteration: int | None
    bytes: int
    figures: Figures
    takes_lora: bool


def export(
    run_or_model: str | Path,
    *,
    checkpoint: str | None = None,
    base: str | Path | None = None,
    output: str | Path | None = None,
    options: ExportOptions | None = None,
    on_progress: OnProgress = lambda what, done, total: None,
) -> ExportResult:
    """Exports a generator.

    Args:
        run_or_model: Folder of a run, or a model folder: a path or an address.
        checkpoint: `last`, `best` or an iteration; None: the newest one.
        base: Model folder that the weights were trained from; None: as the run says.
        output: Folder of the export, replaced whole; None: `exports/FORMAT` in the run.
        options: Its form; None: the defaults.
        on_progress: Called with (what, done, in all).

    Raises:
        ConfigError: An option is wrong, or the family has no such format.
        CheckpointError: The checkpoint does not exist or is not whole.
        ModelFolderError: A folder cannot be used, or what was read back is not what was written.
    """
    with run_copy(run_or_model) as run:
        return _export(run, checkpoint, base, output, options or ExportOptions(), on_progress)


def _export(
    run_or_model: Path,
    checkpoint: str | None,
    base: str | Path | None,
    output: str | Path | None,
    options: ExportOptions,
    on_progress: OnProgress,
) -> ExportResult:
    """Exports what is here."""
    _require_there(run_or_model)
    target = _target(run_or_model, output, options)
    if output is None:
        require_inside(Path(shared_place(run_or_model)), f"{EXPORTS}/{options.form}")
    attempted = f"exporting {shared_place(run_or_model)}"
    require_safe_target(target, "--output", (run_or_model,), attempted)
    steps = 4
    on_progress("reading the weights", 0, steps)
    source = open_source(run_or_model, checkpoint, base)
    require_safe_target(target, "--output", (run_or_model, source.base), attempted)
    _require_base(source, options, run_or_model)
    _require_rank(source, options)
    before = dict(source.family.load_denoiser(source.base).named_parameters())
    _require_same_shape(source, before)
    change = _difference(source.weights.items(), before)
    factors = _factors(source, options, before) if options.form in LORA_FORMATS else None
    kept = None if factors is None else _kept(source, factors, change)
    with whole_folder_at(target, (SETTINGS_FILE, INDEX_FILE)) as draft:
        on_progress(f"writing {options.form}", 1, steps)
        read_back = _write(source, options, draft, factors)
        on_progress("reading it back", 2, steps)
        found = read_back()
        _require_written(source, options, found, before, factors)
        difference = _difference(source.weights.items(), found)
        on_progress("describing it", 3, steps)
        figures = Figures(
            options.form,
            options.dtype,
            _rank(source, options),
            difference.largest,
            change.largest,
            lost=difference.energy / change.energy if change.energy else 0.0,
            share_kept=kept,
        )
        takes_lora = source.family.traits.exchange is not None
        result = ExportResult(target, source.iteration, _bytes_written(draft), figures, takes_lora)
        write_model_settings(draft, source.sampling.written)
        write_model_card(draft, source, figures)
    on_progress("describing it", steps, steps)
    return result


def _require_there(run_or_model: Path) -> None:
    """Refuses what is neither a run nor a model, before paths that are made of it are looked at."""
    if store_address(run_or_model):
        return
    if not local_model(run_or_model).is_dir():
        attempted = f"looking for the run or model {run_or_model}"
        raise missing_folder(run_or_model, attempted, "Check the path")
    if not RunFolder(run_or_model).config.exists():
        family_of(local_model(run_or_model))


Factors = Mapping[str, LowRank]
"""A change of low rank, by the name of its layer."""

ReadBack = Callable[[], Mapping[str, Tensor]]
"""Reads the weights as a user of the files would."""


def _write(
    source: TrainedGenerator, options: ExportOptions, draft: Path, factors: Factors | None
) -> ReadBack:
    """Writes the files of a format; returns what reads them."""
    if factors is not None:
        return _write_lora(source, options, draft, factors)
    if options.form == DIFFUSERS:
        return _write_diffusers(source, options, draft)
    return _write_single(source, options, draft)


def _write_diffusers(source: TrainedGenerator, options: ExportOptions, draft: Path) -> ReadBack:
    family = source.family
    # An expert that was not trained keeps the base's files.
    trained = {
        name: source.weights[name]
        for name in source.weights
        if name.startswith(source.trained_part)
    }
    weights = narrowed(trained, DTYPES[options.dtype], family.traits.keep_fp32)
    family.export(
        draft,
        source.base,
        weights,
        flow_shift=source.sampling.flow_shift,
        components=options.components,
    )
    return lambda: dict(family.load_denoiser(draft).named_parameters())


def _write_single(source: TrainedGenerator, options: ExportOptions, draft: Path) -> ReadBack:
    files = _files(source, options)
    paths = _paths(files, draft, f"{source.name}-{options.dtype}")
    weights = narrowed(source.weights, DTYPES[options.dtype], source.family.traits.keep_fp32)
    files.write_weights(options.form, paths, weights)
    return lambda: files.read_weights(paths, source.base)


def _write_lora(
    source: TrainedGenerator, options: ExportOptions, draft: Path, factors: Factors
) -> ReadBack:
    files = _files(source, options)
    paths = _paths(files, draft, LORA_STEM)
    files.write_low_rank(options.form, paths, factors, DTYPES[options.dtype])
    written = {part: path for part, path in paths.items() if path.exists()}
    return lambda: files.read_low_rank(written, source.base)


def _paths(files: ExchangeFiles, draft: Path, stem: str) -> dict[str, Path]:
    return {part: part_path(draft, stem, part) for part in files.parts}


@torch.no_grad()
def _factors(
    source: TrainedGenerator, options: ExportOptions, before: Mapping[str, Tensor]
) -> Factors:
    """The change from the base as what it is, for adapters, or its approximation."""
    found = source.adapters or approximate_all(before, source.weights, options.rank or _RANK)
    if not found:
        raise ModelFolderError(
            f"exporting {source.name} as a LoRA",
            f"no matrix that differs from those of {source.base}",
            "weights that were trained from this base",
            "Give the base that they were trained from with --base FOLDER",
        )
    return found


def _kept(source: TrainedGenerator, factors: Factors, change: "_Difference") -> float:
    """Share of the change that is kept: all of trained adapters."""
    return 1.0 if source.adapters else share_kept(factors, change.energy)


@dataclass(frozen=True, slots=True)
class _Difference:
    """Distance of two sets of weights: the largest difference, and the sum of squares."""

    largest: float
    energy: float


@torch.no_grad()
def _difference(one: Iterable[tuple[str, Tensor]], other: Mapping[str, Tensor]) -> _Difference:
    largest = energy = 0.0
    for name, value in one:
        apart = value.float() - other[name].float()
        largest = max(largest, float(apart.abs().max()))
        energy += float(apart.double().square().sum())
    return _Difference(largest, energy)


def _require_written(
    source: TrainedGenerator,
    options: ExportOptions,
    found: Mapping[str, Tensor],
    before: Mapping[str, Tensor],
    factors: Factors | None,
) -> None:
    """Refuses weights that differ from what was written by more than rounding."""
    if missing := sorted(source.weights.keys() - found.keys()):
        raise _lost(source, options, f"{len(missing)} weights are missing, {missing[0]} first")
    if factors is not None:
        apart = _difference(_merged(before, factors), found).energy
        whole = sum(each.energy * each.kept for each in factors.values())
        if apart > _LORA_ROUNDING * whole:
            raise _lost(source, options, f"{apart / whole:.1%} of the change is lost")
        return
    for name, value in source.weights.items():
        apart = _difference([(name, value)], found).largest
        allowed = float(value.detach().abs().max()) * _ROUNDING[options.dtype]
        if apart > allowed:
            words = f"{name} differs by {apart:.3g}, where rounding allows {allowed:.3g}"
            raise _lost(source, options, words)


def _merged(before: Mapping[str, Tensor], factors: Factors) -> Iterator[tuple[str, Tensor]]:
    """Weights of the base with a change of low rank, one after another."""
    for name, value in before.items():
        each = factors.get(name.removesuffix(".weight"))
        yield name, value if each is None else value.float() + each.up @ each.down


def _lost(source: TrainedGenerator, options: ExportOptions, found: str) -> ModelFolderError:
    return ModelFolderError(
        f"reading the export of {source.name} as {options.form} back",
        found,
        "the weights that were written",
        "Nothing was kept; please report this with the versions of diffusers and torch",
    )


def _files(source: TrainedGenerator, options: ExportOptions) -> ExchangeFiles:
    make = source.family.traits.exchange
    if make is None:
        raise ConfigError(
            f"exporting {source.name} as {options.form}",
            f"a {source.family.name} model, which no other program reads from such a file",
            f"--format {DIFFUSERS}",
        )
    return make()


def _rank(source: TrainedGenerator, options: ExportOptions) -> int:
    """Rank of a LoRA: that of the adapters, or of the approximation."""
    if source.adapters:
        return max(each.up.shape[1] for each in source.adapters.values())
    return options.rank or _RANK


def _require_rank(source: TrainedGenerator, options: ExportOptions) -> None:
    if source.adapters and options.form in LORA_FORMATS and options.rank is not None:
        raise ConfigError(
            f"exporting {source.name} as {options.form}",
            f"--rank {options.rank}, and the run trained adapters of {_rank(source, options)}",
            "no rank: adapters are exported as they are",
            "Leave --rank out",
        )


def _require_base(source: TrainedGenerator, options: ExportOptions, given: str | Path) -> None:
    """A LoRA of a model folder needs to know what it is a change of."""
    is_itself = source.run is None and real_path(source.base) == real_path(given)
    if options.form in LORA_FORMATS and is_itself:
        raise ConfigError(
            f"exporting {given} as {options.form}",
            "no base",
            "the model folder that its weights were trained from",
            "Give it with --base FOLDER",
        )


def _require_same_shape(source: TrainedGenerator, before: Mapping[str, Tensor]) -> None:
    """Refuses a base of another size, whose weights cannot be compared with the trained ones."""
    if source.adapters:
        return  # They were merged into the base, which has checked them.
    for name in sorted({*source.weights, *before}):
        own, theirs = (
            tuple(weights[name].shape) if name in weights else "not there"
            for weights in (source.weights, before)
        )
        if own != theirs:
            raise ModelFolderError(
                f"exporting {source.name}",
                f"{name} is {own} in what was trained, and {theirs} in the base {source.base}",
                "the model that it was trained from",
                "Give that with --base FOLDER, or leave --base out",
            )


def _target(run_or_model: str | Path, output: str | Path | None, options: ExportOptions) -> Path:
    place = Path(shared_place(run_or_model))
    return Path(output) if output is not None else place / EXPORTS / options.form


def _bytes_written(draft: Path) -> int:
    found = (path for path in draft.rglob("*.safetensors") if not path.is_symlink())
    return sum(stat.st_size for stat in map(Path.stat, found) if stat.st_nlink == 1)
