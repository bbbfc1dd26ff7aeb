"""Prompts to video files, with the sampler of the model's family: what we show is what users get.

    prompt, seed -> ClipSampler (of Wan: diffusers' WanPipeline) -> frames -> mp4 (H.264) and GIF

Works on any folder of a known family, ours or not. A clip depends on its prompt and the seed alone,
not on the other prompts of the call.
"""

import itertools
import logging
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from cluster.files import write_whole
from cluster.folders import files_at
from cluster.inventory import memory_bytes
from cluster.storage_errors import storage_errors
from pipelines.data.making.manifest_rows import fault_of_text
from pipelines.data.shards.caption_rule import is_blank
from pipelines.media.inference import InferenceSettings, read_inference_settings
from pipelines.media.video import Pixels, encode_for_players, write_gif
from pipelines.run.generator_folder import model_folder
from pipelines.run.outputs import require_output_folder
from pipelines.run.places import shared_place
from sgmd_core.errors import ConfigError, ShapeError
from sgmd_core.schedule import MAX_STEPS, WHY_MAX_STEPS
from workers.models.families import family_of
from workers.models.family import ModelFamily
from workers.models.folder import require_encoders
from workers.models.sampling import ClipSampler, SampleRequest
from workers.models.weight_digests import require_same_weights

FORMATS = ("mp4", "gif")
OnProgress = Callable[[int, int], None]

_ATTEMPTED = "generating clips"
# Players show a clip of 32 px as a dot.
_SMALLEST_SIDE_PX = 256
_SLUG_LENGTH = 48
_LARGEST_SEED = 2**63 - 1
_LARGEST_ZOOM = 64
_BYTES_A_PIXEL = 12
_SIDE = "larger pictures do not fit into an H.264 file"
# Most that a setting may be, and why.
_MOST: Mapping[str, tuple[float, str]] = {
    "num_steps": (MAX_STEPS, WHY_MAX_STEPS),
    "guidance_scale": (1e4, "a clip is far beyond its colours long before"),
    "text_length": (2**14, "the text encoder's memory grows with its square"),
    "num_frames": (2**20, "a clip is made in memory"),
    "height": (2**14, _SIDE),
    "width": (2**14, _SIDE),
    "fps": (2**16 - 1, "mp4 and GIF count no more"),
}

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GeneratedClip:
    """One clip on disk.

    Attributes:
        prompt: What was asked for.
        seed: Seed of its initial noise.
        paths: Files, in the order of the formats; at an address, what
            `cluster.stores.store_address` reads.
        frames: Its pixels before any enlargement (frames, height, width, 3).
        seconds: Time from prompt to pixels; writing the files is not in it.
    """

    prompt: str
    seed: int
    paths: tuple[Path, ...]
    frames: Pixels
    seconds: float


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """Sampling settings that replace the folder's; None leaves them to the folder.

    Attributes:
        num_steps: Denoising steps.
        guidance_scale: s in `uncond + s * (cond - uncond)`; 1 is the conditional prediction alone.
        flow_shift: Shift of the noise levels.
        text_length: Text positions that the denoiser sees.
        negative_prompt: What guidance leads away from.
        num_frames: Video frames a clip.
        height: Pixels.
        width: Pixels.
        fps: Frames a second.
    """

    num_steps: int | None = None
    guidance_scale: float | None = None
    flow_shift: float | None = None
    text_length: int | None = None
    negative_prompt: str | None = None
    num_frames: int | None = None
    height: int | None = None
    width: int | None = None
    fps: int | None = None

    def __post_init__(self) -> None:
        """Checks the values."""
        changes = self.changes()
        for name, value in changes.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(_ATTEMPTED, f"{name} = {value}", "a finite number")
        for name, (most, why) in _MOST.items():
            value = changes.get(name, 1)
            if not 1 <= value <= most:
                expected = "at least 1" if value < 1 else f"at most {most:g}: {why}"
                raise ConfigError(_ATTEMPTED, f"{name} = {value}", expected, f"Correct {name}")
        if self.flow_shift is not None and self.flow_shift <= 0:
            raise ConfigError(_ATTEMPTED, f"flow_shift = {self.flow_shift}", "above 0")

    def changes(self) -> dict[str, Any]:
        """Returns the settings that are given, by their names in `InferenceSettings`."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def generate(
    run_or_model: str | Path,
    prompts: Sequence[str],
    *,
    output: str | Path,
    seed: int | Sequence[int] = 0,
    formats: Sequence[str] = FORMATS,
    zoom: int | None = None,
    device: str | None = None,
    options: SamplingOptions = SamplingOptions(),
    on_progress: OnProgress = lambda done, total: None,
) -> Iterator[GeneratedClip]:
    """Samples every prompt and writes one file for each format.

    The request is checked at once; a clip is sampled when the iterator comes to it, so that the
    pixels of many are never held together.

    Args:
        run_or_model: A model folder, or a finished run, whose generator is used.
        prompts: Captions; each gets one clip per seed.
        output: Folder of the files, a path or an address. Their names hold the number and words of
            the prompt, and the seed; it is made when missing, files of the same name are replaced.
        seed: Seed of the initial noise, the same for every prompt; or several.
        formats: File formats, some of `FORMATS`.
        zoom: Factor by which clips are enlarged, in whole pixels; None enlarges clips whose short
            side is under 256 px.
        device: Torch device; None takes a GPU where there is one.
        options: Sampling settings; the rest comes from the folder's `sgmd.json`, and without one
            from the family's defaults.
        on_progress: Called after every denoising step with (steps done, steps in all).

    Returns:
        One record per clip, in the order of the prompts and then of the seeds.

    Raises:
        ConfigError: No prompt, an empty one, no seed, or a zoom out of range.
        ModelFolderError: The folder is missing, incomplete or of no known family.
        ShapeError: The clip's size does not fit the networks.
    """
    require_output_folder(output, "--output")
    folder = model_folder(run_or_model)
    seeds = [seed] if isinstance(seed, int) else list(dict.fromkeys(seed))
    _require_request(prompts, seeds, formats, zoom, options.negative_prompt)
    family = family_of(folder)
    settings = _settings(family, folder, options.changes())
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    _require_device(device)
    require_same_weights(folder)
    unknown = family.load_tokenizer(folder).unknown_words(prompts)
    if unknown.num_affected:
        _log.warning("%s", unknown.in_words())
    sampler = family.open_sampler(folder, device)
    root = Path(output)
    with storage_errors(f"writing clips to {shared_place(root)}"), files_at(root):
        pass  # A folder that cannot be made is reported before anything is sampled.
    requests = list(itertools.product(enumerate(prompts), seeds))
    own_size = read_inference_settings(folder).size
    names_size = bool(settings.trained_sizes) or settings.size != own_size
    files = _ClipFiles(root, formats, zoom, settings, names_size)
    return _clips(sampler, requests, settings, files, on_progress)


@dataclass(frozen=True, slots=True)
class _ClipFiles:
    """Files of the clips of a call.

    Attributes:
        root: Their folder.
        formats: One file each.
        zoom: As in `generate`.
        settings: Size and rate of the clips.
        names_size: Whether names hold the size, so that clips of another size do not replace these.
    """

    root: Path
    formats: Sequence[str]
    zoom: int | None
    settings: InferenceSettings
    names_size: bool

    def write(self, stem: str, frames: Pixels) -> tuple[Path, ...]:
        """Writes one clip; returns its files in the order of the formats."""
        settings, root = self.settings, self.root
        if self.names_size:
            stem += f"-{settings.height}x{settings.width}x{settings.num_frames}"
        with storage_errors(f"writing clips to {shared_place(root)}"), files_at(root) as folder:
            for form in self.formats:
                _write(folder / f"{stem}.{form}", frames, settings.fps, self.zoom)
        return tuple(root / f"{stem}.{form}" for form in self.formats)


def _clips(
    sampler: ClipSampler,
    requests: Sequence[tuple[tuple[int, str], int]],
    settings: InferenceSettings,
    files: _ClipFiles,
    on_progress: OnProgress,
) -> Iterator[GeneratedClip]:
    """Samples and writes clip by clip; a request is a numbered prompt and a seed."""
    total = len(requests) * settings.num_steps
    digits = max(2, len(str(requests[-1][0][0])))
    for number, ((index, prompt), chosen) in enumerate(requests):
        before = number * settings.num_steps

        def on_step(step: int, before: int = before) -> None:
            on_progress(before + step, total)

        began = time.perf_counter()
        request = SampleRequest(
            prompt=prompt,
            seed=chosen,
            num_steps=settings.num_steps,
            guidance_scale=settings.guidance_scale,
            schedule=settings.schedule,
            text_length=settings.text_length,
            negative_prompt=settings.negative_prompt,
            num_frames=settings.num_frames,
            height=settings.height,
            width=settings.width,
        )
        frames = sampler.sample(request, on_step)
        seconds = time.perf_counter() - began
        paths = files.write(f"{index:0{digits}d}-{_slug(prompt)}-seed{chosen}", frames)
        yield GeneratedClip(prompt, chosen, paths, frames, seconds)


def _settings(family: ModelFamily, folder: Path, changes: Mapping[str, Any]) -> InferenceSettings:
    checked = family.inspect(folder)
    require_encoders(checked, f"sampling from {folder}")
    settings = read_inference_settings(folder).model_copy(update=changes)
    pixel_bytes = _BYTES_A_PIXEL * settings.num_frames * settings.height * settings.width
    memory, _ = memory_bytes()
    if pixel_bytes > memory:
        raise ConfigError(
            f"sampling from {folder}",
            f"clips of {settings.num_frames} frames of {settings.height}x{settings.width}: "
            f"{pixel_bytes / 1e9:.3g} GB of pixels in float32",
            f"what fits into the {memory / 1e9:.3g} GB of this machine's memory",
            "Lower num_frames, height or width",
        )
    checked.latent_shape(settings.num_frames, settings.height, settings.width)
    rules = family.traits.sampling
    if settings.height % rules.multiple_px or settings.width % rules.multiple_px:
        raise ShapeError(
            f"sampling from {folder}",
            f"frames of {settings.height}x{settings.width}",
            f"height and width to be multiples of {rules.multiple_px} ({rules.source}'s rule)",
            "Change height or width",
        )
    if settings.trained_sizes and settings.size not in settings.trained_sizes:
        trained = " or ".join(map(_size_in_words, settings.trained_sizes))
        own = _size_in_words(settings.size)
        _log.warning("%s was trained at %s; clips of %s may be worse", folder, trained, own)
    return settings


def _size_in_words(size: tuple[int, int, int]) -> str:
    num_frames, height, width = size
    return f"{num_frames} frames of {height}x{width}"


def _require_request(
    prompts: Sequence[str],
    seeds: Sequence[int],
    formats: Sequence[str],
    zoom: int | None,
    negative: str | None,
) -> None:
    if not prompts or any(map(is_blank, prompts)):
        raise ConfigError(
            _ATTEMPTED, f"the prompts {list(prompts)}", "at least one, none of them empty"
        )
    for text in (*prompts, negative or ""):
        if (fault := fault_of_text(text)) is not None:
            remedy = "Write it in UTF-8, or give --prompts a file"
            raise ConfigError(_ATTEMPTED, f"a prompt that is {fault}", "text", remedy)
    if not seeds or min(seeds) < 0 or max(seeds) > _LARGEST_SEED:
        raise ConfigError(
            _ATTEMPTED, f"the seeds {list(seeds)}", f"at least one, each from 0 to {_LARGEST_SEED}"
        )
    unknown = [form for form in formats if form not in FORMATS]
    if unknown or not formats:
        raise ConfigError(_ATTEMPTED, f"the formats {list(formats)}", f"some of {FORMATS}")
    if zoom is not None and not 1 <= zoom <= _LARGEST_ZOOM:
        raise ConfigError(_ATTEMPTED, f"zoom = {zoom}", f"a whole number from 1 to {_LARGEST_ZOOM}")


def _write(path: Path, frames: Pixels, fps: int, zoom: int | None) -> None:
    # Rounded up: 32 px becomes 256, 240 px becomes 480.
    repeats = zoom or -(-_SMALLEST_SIDE_PX // min(frames.shape[1:3]))
    if path.suffix == ".gif":
        write_gif(path, frames, fps, zoom=repeats)
    else:
        smallest_px = repeats * min(frames.shape[1:3])
        write_whole(path, encode_for_players(frames, fps, smallest_side_px=smallest_px))


def _slug(prompt: str) -> str:
    slug = re.sub(r"[\W_]+", "-", prompt.lower()).strip("-")
    return slug[:_SLUG_LENGTH].rstrip("-") or "clip"


def _require_device(device: str) -> None:
    """Checks that torch can compute there.

    Raises:
        ConfigError: It knows no such device, or this machine has none.
    """
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            _ATTEMPTED,
            f"the device {device}: {str(error).splitlines()[0]}",
            "a device of this machine that torch knows",
            "Leave --device out, or take cpu",
        ) from error
