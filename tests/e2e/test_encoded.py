"""Embeddings that came with the data make the bits that the text encoder would have made."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem

from pipelines.data.shards.listing import QUARANTINE_NAME
from pipelines.data.shards.prompts import PROMPTS_NAME, read_stored_prompts, write_stored_prompts
from pipelines.data.stream.ledger import Ledger
from pipelines.distillation.run import distill, dry_run
from pipelines.run.folder import RunFolder, read_jsonl
from sgmd_core.errors import NonFiniteError
from tests.e2e.conftest import MakeRecipe, encode_captions
from tests.e2e.test_equivalence import MODES, history, moments, slow_but, state
from tests.helpers.moves import assert_moves
from workers.models.wan_family import WanFamily


def changed(encoded: Path, folder: Path, change: Callable[[str, np.ndarray], np.ndarray]) -> Path:
    """The shards again, each embedding as `change` makes it from its sample's id and itself."""
    folder.mkdir()
    for shard in encoded.glob("*.parquet"):
        if shard.name == QUARANTINE_NAME:
            continue
        table = pq.read_table(shard)
        texts = [
            change(name, np.frombuffer(text, np.float32)).astype(np.float32).tobytes()
            for name, text in zip(
                table["sample_id"].to_pylist(), table["text_embeds"].to_pylist(), strict=True
            )
        ]
        place = table.schema.get_field_index("text_embeds")
        pq.write_table(
            table.set_column(place, table.schema.field(place), [texts]), folder / shard.name
        )
    return folder


def reversed_words(encoded: Path, folder: Path) -> Path:
    """The shards again with embeddings of other texts."""
    return changed(encoded, folder, lambda name, text: text[::-1])


def count_loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Folders whose text encoder is loaded from now on."""
    loads: list[str] = []
    load = WanFamily.load_text

    def counted(self: WanFamily, folder: Path, *args: object, **options: object) -> object:
        loads.append(str(folder))
        return load(self, folder, *args, **options)

    monkeypatch.setattr(WanFamily, "load_text", counted)
    return loads


@pytest.mark.slow
@pytest.mark.parametrize("tracking", slow_but("shared", "fresh"))
def test_stored_embeddings_make_the_same_run_bitwise(
    make_recipe: MakeRecipe, encoded: Path, tmp_path: Path, tracking: str, monkeypatch
) -> None:
    tracked = f"fake_score.tracking={tracking}"
    computed = make_recipe("name=computed", tracked)
    stored = make_recipe("name=stored", tracked, f"data.train={encoded}")
    assert dry_run(stored)["stored_text"] is True
    distill(computed)
    loads = count_loads(monkeypatch)
    distill(stored)
    # For the negative prompt.
    assert loads == [stored.model.folder]
    train = reversed_words(encoded, tmp_path / "reversed")
    other = make_recipe("name=other", tracked, f"data.train={train}")
    distill(other)
    assert_moves(moments(computed, 5), moments(other, 5))
    assert history(stored) == history(computed)
    assert state(stored, 5) == state(computed, 5)
    busy = {
        key for line in read_jsonl(RunFolder(stored.run_folder).metrics) for key in line["seconds"]
    }
    assert "text.place" in busy
    assert "text.encode" not in busy


PROMPTS = ("", "a red circle moves left")
DROPPING = (
    "iterations=2",
    "checkpoint.every=2",
    "data.prompt_dropout=0.5",
    f"model.negative_prompt={PROMPTS[1]}",
    "validation.every=2",
    "validation.num_captions=2",
)


@pytest.mark.slow
def test_stored_prompts_make_the_same_run_bitwise_without_a_text_encoder(
    make_recipe: MakeRecipe, world: Path, wan_folder: Path, tmp_path: Path, monkeypatch
) -> None:
    places = {name: tmp_path / name for name in ("train", "held_out", "other")}
    for place in places.values():
        place.mkdir()
        split = "held_out" if place.name == "held_out" else "train"
        prompts = () if split == "held_out" else PROMPTS
        encode_captions(world / split, wan_folder, place, prompts)
    file = LocalFileSystem()
    right = read_stored_prompts(file, str(places["other"]))
    assert right is not None
    swapped = dict(zip(PROMPTS, reversed([right.packed[text] for text in PROMPTS]), strict=True))
    write_stored_prompts(file, str(places["other"]), replace(right, packed=swapped))
    runs = {
        name: make_recipe(
            f"name={name}",
            *DROPPING,
            f"data.train={places.get(name, places['train'])}",
            f"data.validation={places['held_out']}",
            f"data.stored_text={'false' if name == 'computed' else 'true'}",
        )
        for name in ("computed", "train", "other")
    }
    planned = {name: dry_run(config) for name, config in runs.items()}
    assert planned["computed"]["text_encoder_for"] == {
        "text": ["training captions"],
        "validator": ["validation captions", "the negative prompt"],
    }
    assert planned["train"]["text_encoder_for"] == {}
    distill(runs["computed"])
    loads = count_loads(monkeypatch)
    distill(runs["train"])
    distill(runs["other"])
    assert loads == []
    computed, stored, other = (runs[name] for name in ("computed", "train", "other"))
    assert_moves(moments(computed, 2), moments(other, 2))
    assert history(stored) == history(computed)
    assert state(stored, 2) == state(computed, 2)
    figures = [
        read_jsonl(RunFolder(config.run_folder).validation)[0]["figures"]
        for config in (computed, stored)
    ]
    assert figures[0] == figures[1]


@pytest.mark.slow
def test_what_a_set_lacks_is_named_and_embedded_by_a_text_encoder(
    make_recipe: MakeRecipe, world: Path, wan_folder: Path, tmp_path: Path
) -> None:
    train = tmp_path / "train"
    train.mkdir()
    encode_captions(world / "train", wan_folder, train, ("",))
    config = make_recipe(*DROPPING, f"data.train={train}")
    assert dry_run(config)["text_encoder_for"] == {
        "text": ["the negative prompt"],
        "validator": ["validation captions", "the negative prompt"],
    }
    # Without prompts the set is as those from before there were any.
    (train / PROMPTS_NAME).unlink()
    found = dry_run(config)
    assert found["stored_text"] is True
    assert found["text_encoder_for"]["text"] == [
        "the empty prompt (data.prompt_dropout)",
        "the negative prompt",
    ]


@pytest.mark.slow
def test_one_parquet_file_of_embeddings_is_a_set_as_its_folder_is(
    make_recipe: MakeRecipe, encoded: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "alone"
    folder.mkdir()
    shard, other = sorted(encoded.glob("shapes-*.parquet"))[:2]
    shutil.copy(shard, folder)
    runs = {
        name: make_recipe(f"name={name}", "iterations=2", f"data.train={train}")
        for name, train in (("file", shard), ("folder", folder), ("other", other))
    }
    planned = dry_run(runs["file"])
    assert (planned["stored_text"], planned["training_rows"]) == (True, 16)
    for config in runs.values():
        distill(config)
    assert_moves(moments(runs["file"], 2), moments(runs["other"], 2))
    assert history(runs["file"]) == history(runs["folder"])
    assert state(runs["file"], 2) == state(runs["folder"], 2)
    lines = read_jsonl(RunFolder(runs["file"].run_folder).metrics)
    assert "text.encode" not in {key for line in lines for key in line["seconds"]}


@pytest.mark.slow
@pytest.mark.parametrize("override", ["model.text_length=9", "data.stored_text=false"])
def test_embeddings_that_do_not_fit_the_recipe_are_computed_anew(
    make_recipe: MakeRecipe, encoded: Path, override: str
) -> None:
    assert dry_run(make_recipe(f"data.train={encoded}", override))["stored_text"] is False


@pytest.mark.slow
def test_embeddings_of_another_text_encoder_are_computed_anew(
    make_recipe: MakeRecipe, encoded: Path, tmp_path: Path
) -> None:
    for shard in encoded.glob("*.parquet"):
        table = pq.read_table(shard)
        metadata = dict(table.schema.metadata)
        key = b"sgmd.encoding"
        own = fingerprint_in(metadata[key])
        metadata[key] = metadata[key].replace(own, b"0123456789abcdef")
        pq.write_table(table.replace_schema_metadata(metadata), tmp_path / shard.name)
    assert dry_run(make_recipe(f"data.train={tmp_path}"))["stored_text"] is False


def fingerprint_in(metadata: bytes) -> bytes:
    import json

    return json.loads(metadata)["text_encoder"].encode()


@pytest.mark.slow
def test_the_size_of_the_cache_changes_no_bit(
    make_recipe: MakeRecipe, encoded: Path, tmp_path: Path
) -> None:
    large = make_recipe("name=large", "iterations=2")
    none = make_recipe("name=none", "iterations=2", "data.text_cache=0")
    # A cache that handed out the embedding of another caption would be noticed.
    train = reversed_words(encoded, tmp_path / "reversed")
    other = make_recipe("name=other", "iterations=2", f"data.train={train}")
    for config in (large, none, other):
        distill(config)
    assert_moves(moments(large, 2), moments(other, 2))
    assert history(none) == history(large)
    assert state(none, 2) == state(large, 2)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("mode", ["sgmd-shared-released", "dmd2"])
def test_a_sample_that_is_not_a_number_on_one_rank_of_two_is_skipped_by_all_or_stops_the_run(
    make_recipe: MakeRecipe, encoded: Path, tmp_path: Path, mode: str
) -> None:
    """No rank raises, or the other one would wait for it: NaN reaches the gradient of both."""
    healthy = make_recipe("name=healthy", f"data.train={encoded}", *MODES[mode])
    distill(healthy)
    used = [entry.sample_ids for entry in Ledger(RunFolder(healthy.run_folder).ledger).entries()]
    bad = {used[1][3], used[3][0]}
    train = changed(
        encoded, tmp_path / "bad", lambda name, text: text * np.nan if name in bad else text
    )
    pool = "ranks: 2, cpus: 0.2"
    teams = [f"topology.{role}={{{pool}}}" for role in ("generator", "fake_score")]
    settings = ["topology.mode=pools", "topology.teacher.cpus=0.2", "checkpoint.every=1", *teams]
    both = [f"data.train={train}", *MODES[mode]]
    # The first one is skipped, and the second one is one too many.
    run = make_recipe("name=pools", "guards.max_skipped=1", *settings, *both)
    with pytest.raises(NonFiniteError, match=r"iteration 3.*text embedding") as caught:
        distill(run)
    assert any("step-000003" in note for note in caught.value.__notes__)
    one = make_recipe("name=one", "topology.mode=local", *both)
    distill(one)
    lines, expected = (read_jsonl(RunFolder(config.run_folder).metrics) for config in (run, one))
    assert [bool(line.get("skipped")) for line in expected[:4]] == [False, True, False, True]
    assert [bool(line.get("skipped")) for line in lines] == [False, True, False]
    (ours,), (theirs,) = lines[1]["skipped"], expected[1]["skipped"]
    assert ours == theirs
    for ours, theirs in zip(lines, expected, strict=False):
        assert ours["grad_norms"] == pytest.approx(theirs["grad_norms"], rel=1e-3)
