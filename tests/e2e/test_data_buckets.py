"""Latents of several sizes: a folder for each, and an iteration learns from the size it draws."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.config.recipe import DistillConfig
from pipelines.data.checking.check import CheckOptions, check_shards
from pipelines.data.clips.clip_format import ClipFormat
from pipelines.data.encoding.encode import encode
from pipelines.data.encoding.encode_options import EncodeOptions
from pipelines.data.shards.schema import encoding_of
from pipelines.data.shards.stored_buckets import StoredBucket, read_buckets, write_buckets
from pipelines.data.stream.ledger import Ledger
from pipelines.distillation.audit import audit
from pipelines.distillation.run import distill, dry_run
from pipelines.media.video import encode_mp4
from pipelines.pretraining.config import WorldSettings
from pipelines.pretraining.data import open_clips
from pipelines.run.folder import RunFolder
from sgmd_core.errors import ConfigError, DataError
from tests.e2e.conftest import MakeRecipe
from tests.e2e.latents import write_encoded
from tests.e2e.test_adversarial import GAN
from tests.e2e.test_buckets import OWN, SEED, SIZES, labels
from tests.e2e.test_consistency import RCM
from tests.e2e.test_equivalence import drop_checkpoint, history, moments, state
from tests.e2e.test_transition import STRIDES
from tests.e2e.test_transition import tmd as tmd
from tests.helpers import tiny_wan
from tests.helpers.moves import assert_moves
from workers.models.families import family_of

TRAINED = ((9, 16, 16), (5, 16, 32), (9, 32, 16))


def label(size: tuple[int, int, int]) -> str:
    num_frames, height, width = size
    return f"{height}x{width}x{num_frames}"


def write_sizes(folder: Path, wan: Path, seed: int) -> Path:
    """A set as `sgmd encode --bucket` leaves it, with random latents."""
    folder.mkdir()
    geometry = family_of(wan).inspect(wan)
    for number, size in enumerate(TRAINED):
        shape = geometry.latent_shape(*size)
        write_encoded(folder / label(size), wan, 10 * seed + number, latent_shape=shape)
    buckets = [StoredBucket(label(size), *size, 32) for size in TRAINED]
    write_buckets(LocalFileSystem(), str(folder), buckets)
    return folder


@pytest.fixture(scope="module")
def sized(tmp_path_factory: pytest.TempPathFactory, wan_folder: Path) -> list[Path]:
    folder = tmp_path_factory.mktemp("sized")
    return [write_sizes(folder / str(seed), wan_folder, seed) for seed in range(2)]


def iterations_of_sets(config: DistillConfig) -> Iterator[list[int]]:
    """Iterations that took samples of each size."""
    folder = RunFolder(config.run_folder)
    for number in range(len(TRAINED)):
        entries = Ledger(folder.of_set(number).ledger).entries()
        yield [entry.iteration for entry in entries if entry.sample_ids]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rcm", "gan", "meanflow"])
def test_iterations_learn_from_latents_of_their_size_and_a_resumed_run_keeps_its_bits(
    make_recipe: MakeRecipe, sized: list[Path], tmd: list[str], method: str
) -> None:
    settings = {"rcm": RCM, "gan": GAN, "meanflow": [*tmd, STRIDES]}[method]
    settings = [*settings, SEED, SIZES, f"data.train={sized[0]}"]
    whole = make_recipe("name=whole", *settings, "iterations=3", "checkpoint.every=1")
    planned = dry_run(whole)
    assert planned["data_latents"] is True
    assert [each["weight"] for each in planned["further_sets"]] == [1.5, 0.5]
    distill(whole)
    assert [label(TRAINED[number]) for number in (2, 1, 0)] == labels(whole)
    assert list(iterations_of_sets(whole)) == [[2], [1], [0]]
    assert audit(whole.run_folder).is_clean
    other = make_recipe("name=other", *settings, "iterations=3", f"data.train={sized[1]}")
    distill(other)
    assert_moves(moments(whole, 3), moments(other, 3))
    distill(make_recipe("name=parts", *settings, "iterations=2", "checkpoint.every=1"))
    parts = make_recipe("name=parts", *settings, "iterations=3", "checkpoint.every=1")
    drop_checkpoint(parts, 2)
    distill(parts, resume=True)
    assert history(parts) == history(whole)
    assert state(parts, 3) == state(whole, 3)


@pytest.mark.ray
@pytest.mark.slow
def test_roles_on_ray_make_the_bits_of_one_process_with_latents_of_several_sizes(
    make_recipe: MakeRecipe, ray_cluster: None, sized: list[Path]
) -> None:
    settings = [*RCM, SEED, SIZES, f"data.train={sized[0]}", "iterations=3"]
    local = make_recipe("name=local", *settings)
    distill(local)
    for mode in ("pools", "fused"):
        placed = make_recipe(f"name={mode}", f"topology.mode={mode}", *settings)
        distill(placed)
        assert history(placed) == history(local), mode
        assert state(placed, 3) == state(local, 3), mode


class TestChecks:
    @pytest.mark.slow
    def test_a_size_that_the_data_lack_is_refused_with_the_command_that_makes_it(
        self, make_recipe: MakeRecipe, sized: list[Path], wan_folder: Path, tmp_path: Path
    ):
        more = f"video.buckets=[{OWN}, {{num_frames: 5, height: 16, width: 48}}]"
        words = r"asks for 16x48x5.*--bucket 16x16x9 --bucket 16x48x5"
        with pytest.raises(ConfigError, match=words):
            dry_run(make_recipe(*RCM, more, f"data.train={sized[0]}"))
        plain = write_encoded(tmp_path / "plain", wan_folder, 0)
        with pytest.raises(ConfigError, match="one size, or none; video"):
            dry_run(make_recipe(*RCM, SIZES, f"data.train={plain}"))

    def test_one_size_is_learnt_from_its_own_folder(
        self, make_recipe: MakeRecipe, sized: list[Path]
    ):
        with pytest.raises(ConfigError, match=rf"Set data.train={sized[0]}/16x16x9, or train all"):
            dry_run(make_recipe(*RCM, f"data.train={sized[0]}"))
        planned = dry_run(make_recipe(*RCM, f"data.train={sized[0]}/16x16x9"))
        assert (planned["training_rows"], planned["further_sets"]) == (32, [])

    def test_further_sets_are_refused_beside_several_sizes(
        self, make_recipe: MakeRecipe, sized: list[Path]
    ):
        also = f"data.also=[{{source: {sized[1]}}}]"
        with pytest.raises(ConfigError, match=r"video\.buckets of 3 sizes and data\.also"):
            dry_run(make_recipe(*RCM, SIZES, f"data.train={sized[0]}", also))

    def test_a_run_from_captions_takes_all_sizes_as_one_set(
        self, make_recipe: MakeRecipe, sized: list[Path]
    ):
        planned = dry_run(make_recipe(SIZES, f"data.train={sized[0]}"))
        assert (planned["training_rows"], planned["data_latents"]) == (96, False)

    def test_a_pretraining_of_one_size_is_refused_and_check_names_the_sizes(
        self, sized: list[Path]
    ):
        world = WorldSettings(train=str(sized[0]), held_out=str(sized[0]))
        with pytest.raises(DataError, match=rf"latents of 3 sizes.*{sized[0]}/16x16x9"):
            open_clips(str(sized[0]), world)
        report = check_shards(str(sized[0]), CheckOptions(num_processes=0))
        assert report.buckets == {label(size): 32 for size in TRAINED}
        assert not [each for each in report.problems if "encodings" in each]

    @pytest.mark.slow
    def test_a_size_that_is_none_or_beside_one_of_all_clips_is_refused(self, tmp_path: Path):
        for options, words in (
            (["--bucket", "16x16"], "height x width x frames"),
            (["--bucket", "16x16x9", "--height", "16"], "16x16x9 with --height"),
            (["--bucket", "16x16x9", "--bucket", "16x16x9"], "each of them once"),
            (["--bucket", "16x16x9", "--text-only"], "--text-only with --bucket"),
        ):
            command = ["encode", "src", "dst", "--model", "assets/tiny-wan", *options]
            done = CliRunner().invoke(app, command)
            assert words in " ".join(done.output.split()), done.output


class StoppedError(Exception):
    """Ends an encoding in the middle."""


def stop_after_a_part(unit: str, done: int, total: int) -> None:
    if done > 8:
        raise StoppedError


def write_films(folder: Path) -> dict[str, int]:
    """Clips of three sizes and one that is too short; how many fit each."""
    folder.mkdir()
    shapes = [(9, 16, 16), (6, 16, 32), (12, 64, 32), (3, 16, 16)]
    random = np.random.default_rng(0)
    rows = [
        {
            "sample_id": f"clip-{number:02d}",
            "caption": "a red circle moves left",
            "video": encode_mp4(
                random.integers(0, 256, (*shapes[number % 4], 3), dtype=np.uint8), 8
            ),
            "fps": 8.0,
        }
        for number in range(24)
    ]
    for shard in range(2):
        table = pa.Table.from_pylist(rows[12 * shard : 12 * shard + 12])
        pq.write_table(table, folder / f"films-{shard}.parquet", row_group_size=4)
    return {label(size): 6 for size in TRAINED}


@pytest.mark.ray
@pytest.mark.slow
def test_clips_are_encoded_into_the_sizes_they_fit_each_once_and_trained_on(
    make_recipe: MakeRecipe, ray_cluster: None, wan_folder: Path, tmp_path: Path
) -> None:
    fitting = write_films(tmp_path / "films")
    buckets = tuple(ClipFormat(*size, 8) for size in TRAINED)
    options = EncodeOptions(
        buckets[0],
        tiny_wan.TEXT_LENGTH,
        shard_clips=4,
        max_bad_fraction=1.0,
        buckets=buckets,
    )
    place = (str(tmp_path / "films"), str(tmp_path / "sized"), str(wan_folder), options)
    with pytest.raises(StoppedError):
        encode(*place, stop_after_a_part)
    assert not (tmp_path / "sized" / "_buckets.json").exists()
    report = encode(*place)
    assert report.buckets == fitting
    assert report.rejected == {"too_short": 6}
    stored = read_buckets(LocalFileSystem(), str(tmp_path / "sized"))
    assert {each.folder: each.num_rows for each in stored} == fitting
    geometry = family_of(wan_folder).inspect(wan_folder)
    names: list[str] = []
    for size in TRAINED:
        folder = tmp_path / "sized" / label(size)
        index = json.loads((folder / "_index.json").read_text())
        assert index["num_rows"] == fitting[label(size)]
        for path in folder.glob("part-*.parquet"):
            table = pq.read_table(path)
            encoding = encoding_of(table.schema)
            assert encoding is not None
            assert encoding.latent_shape == geometry.latent_shape(*size)
            names += table["sample_id"].to_pylist()
    assert sorted(names) == [f"clip-{number:02d}" for number in range(24) if number % 4 < 3]
    checked = check_shards(str(tmp_path / "sized"), CheckOptions(num_processes=0))
    assert (checked.problems, checked.num_rows, checked.buckets) == ([], 18, fitting)
    config = make_recipe(*RCM, SEED, SIZES, f"data.train={tmp_path / 'sized'}", "iterations=3")
    assert dry_run(config)["stored_text"] is True
    distill(config)
    assert len({*labels(config)}) == 3
