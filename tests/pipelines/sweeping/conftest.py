"""A folder of captions, which the tiny recipe can be checked against."""

import pytest

from pipelines.shapes import ClipSplit, write_shards


@pytest.fixture(scope="session")
def shapes_recipe(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    folder = tmp_path_factory.mktemp("shapes")
    for split in ClipSplit:
        write_shards(str(folder / split.value), num_clips=64, shard_size=64, seed=0, split=split)
    return (
        f"data.train={folder}/train",
        f"data.validation={folder}/held_out",
        f"output={folder / 'runs'}",
    )
