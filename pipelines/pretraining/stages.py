"""Record what each stage is made from, and refuse to reuse one that was made from anything else.

    RUN/identity.json   {"vae": {"seed": 0, "vae.base_dim": 16, ...}, "denoiser": {...}}

A stage is recorded before it begins, so an interrupted one is compared like a finished one. Where
the shards lie does not count; every byte of those that are trained on does.
"""

import hashlib
from pathlib import Path
from typing import Any, cast

from cluster.storage import is_folder, read_json, write_json
from pipelines.data.making.source_clip import open_reading
from pipelines.pretraining.config import PretrainConfig, latent_problems
from pipelines.pretraining.data import TrainingClips
from pipelines.pretraining.loops import VAE_FOLDER
from pipelines.run.differences import value_differences
from pipelines.run.places import shared_place
from pipelines.shapes import FRAME_PX, NUM_FRAMES
from sgmd_core.errors import CheckpointError, ConfigError, DataError, ShapeError
from sgmd_core.worlds import WorldName
from workers.models.content import fingerprint
from workers.models.families import family_of
from workers.models.folder import require_autoencoder

VAE_STAGE = "vae"
DENOISER_STAGE = "denoiser"
TEACHER_FOLDER = "teacher"
RAY_FOLDER = "ray"
IN_PLACE = (VAE_FOLDER, TEACHER_FOLDER, RAY_FOLDER)
"""Folders that are written at the place of the run, and so are in no working copy of it."""
_IDENTITY_FILE = "identity.json"
_MADE = {VAE_STAGE: VAE_FOLDER, DENOISER_STAGE: TEACHER_FOLDER}


def stage_identities(config: PretrainConfig, clips: TrainingClips) -> dict[str, dict[str, Any]]:
    """Everything that decides the networks of each stage, by dotted key.

    Reads all shards that are trained on: about as long as a stage takes to load them.

    Raises:
        ModelFolderError: `vae.folder` cannot be used.
    """
    settings = config.model_dump(mode="json")

    def section(name: str, *keys: str) -> dict[str, Any]:
        return {f"{name}.{key}": settings[name][key] for key in keys or settings[name]}

    common = {
        "seed": config.seed,
        **section("world", "num_frames", "frame_px", "max_clips"),
        **section("ray", "num_workers"),
        **_shards(clips),
    }
    if config.vae.folder is None:
        made = section("vae", *(key for key in settings["vae"] if key != "folder"))
        vae = {**common, **made}
    else:
        vae = made = {"the content of vae.folder": autoencoder_of(config.vae.folder)}
    sampling = section("sampling", "guidance_scale", "flow_shift", "batch_size")
    denoiser = {**common, **made, **section("text"), **section("denoiser"), **sampling}
    # Runs of the first world were recorded before there was another one.
    if config.world.name is not WorldName.SHAPES:
        denoiser |= section("world", "name")
    return {VAE_STAGE: vae, DENOISER_STAGE: denoiser}


def autoencoder_of(folder: str) -> str:
    """Fingerprint of a model folder's autoencoder, as encoded shards name it.

    Raises:
        ModelFolderError: The folder cannot be used.
    """
    return fingerprint(folder, [family_of(folder).traits.layout.autoencoder])


def require_fitting_autoencoder(config: PretrainConfig, clips: TrainingClips) -> None:
    """Checks that `vae.folder` fits the clips, and has made them if they are encoded.

    Raises:
        ConfigError: The clips are encoded, and `vae.folder` is not set; or the denoiser cannot take
            its latents.
        DataError: It is another autoencoder, or clips of `world` have latents of another shape.
        ModelFolderError: `vae.folder` cannot be used.
        ShapeError: Its autoencoder cannot encode clips of the size in `world`.
    """
    attempted = f"training on the latents in {clips.source.url}"
    encoding, folder = clips.source.encoding, config.vae.folder
    if folder is None:
        if encoding is None:
            return
        raise ConfigError(
            attempted,
            "no vae.folder, and no videos to train an autoencoder on",
            "the autoencoder that made the latents",
            "Set vae.folder to the model folder that `sgmd encode` has used, or world.train to the"
            " videos",
        )
    size = (config.world.num_frames, config.world.frame_px, config.world.frame_px)
    geometry = family_of(folder).inspect(Path(folder))
    require_autoencoder(geometry, f"taking the autoencoder of {folder}")
    expected = geometry.latent_shape(*size)
    problems = list(latent_problems(expected, config.denoiser.patch_size))
    if problems:
        raise ConfigError(f"encoding clips with {folder}", "; ".join(problems))
    try:
        geometry.latent_shape(NUM_FRAMES, FRAME_PX, FRAME_PX)
    except ShapeError as error:
        raise ConfigError(
            "checking the clips that the teacher is measured with",
            error.found,
            error.expected,
            "Set vae.folder to another model folder, or to null to train an autoencoder",
        ) from error
    if encoding is None:
        return
    found = autoencoder_of(folder)
    if found != encoding.vae:
        raise DataError(
            attempted,
            f"latents of the autoencoder {encoding.vae}",
            f"those of {folder}, {found}",
            "Set vae.folder to the model folder that `sgmd encode` has used, or encode again",
        )
    if encoding.latent_shape != expected:
        raise DataError(
            attempted,
            f"latents of {encoding.latent_shape}",
            f"{expected}, of clips of (frames, height, width) {size}",
            "Set world.num_frames and world.frame_px to those of the encoded clips",
        )


def require_same_stages(run_dir: Path, now: dict[str, dict[str, Any]]) -> None:
    """Refuses to reuse or continue a stage that was made from something else.

    Args:
        run_dir: Folder of the run on this disk.
        now: What `stage_identities` returns now.

    Raises:
        CheckpointError: A stage differs; names every difference with both values.
    """
    recorded = _recorded(run_dir)
    found: list[str] = []
    begun: list[str] = []
    for stage, made in _MADE.items():
        places = (run_dir / made, run_dir / RAY_FOLDER / stage)
        paths = [place for place in map(shared_place, places) if is_folder(place)]
        if not paths:
            continue
        before = recorded.get(stage)
        different = (
            value_differences(before, now[stage])
            if before is not None
            else [f"no record of what it was made from in {_IDENTITY_FILE}"]
        )
        if different:
            found.append(f"stage {stage}: {'; '.join(different)}")
            begun += paths
    if found:
        raise CheckpointError(
            f"reusing what an earlier run has made in {shared_place(run_dir)}",
            ". ".join(found),
            "the settings and the shards that it was made from",
            "Set them back, choose another run_dir, or delete what is to be made again: "
            + ", ".join(begun),
        )


def record_stage(run_dir: Path, stage: str, identity: dict[str, Any]) -> None:
    """Writes down what a stage is made from, before it begins."""
    write_json(str(run_dir / _IDENTITY_FILE), {**_recorded(run_dir), stage: identity})


def _recorded(run_dir: Path) -> dict[str, Any]:
    path = run_dir / _IDENTITY_FILE
    if not path.exists():
        return {}
    content = read_json(str(path))
    if not isinstance(content, dict) or not all(isinstance(v, dict) for v in content.values()):
        raise CheckpointError(
            f"reading {path}",
            "no table of stages and what they were made from",
            "what `sgmd pretrain` wrote",
            "Restore the file from a copy, or choose another run_dir",
        )
    return content


def _shards(clips: TrainingClips) -> dict[str, str]:
    """Digest of each training shard, by a key that leaves its folder out."""
    place = clips.source.open(probe=False)
    found: dict[str, str] = {}
    for path in clips.paths:
        with open_reading(place.filesystem, f"{place.root}/{path}") as file:
            digest = hashlib.file_digest(cast("Any", file), "sha256")
        found[f"the content of {path} in world.train"] = digest.hexdigest()[:16]
    return found
