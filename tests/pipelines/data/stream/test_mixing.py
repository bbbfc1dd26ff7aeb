"""Sets of captions by weight: draws by count, rows of each set as of that set alone."""

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipelines.data.stream.feed import Feed, FeedProgress, StreamSettings
from pipelines.data.stream.mixing import MixedFeed, build_feed, drawn_sets
from pipelines.data.stream.source import Source
from tests.helpers.shards import write_folder

WEIGHTS = (3.0, 1.0, 0.5)
SEED = 5


@pytest.fixture
def settings(tmp_path: Path) -> StreamSettings:
    sources: list[Source] = []
    for number, size in enumerate((7, 4, 5)):
        write_folder(tmp_path / str(number), [size])
        sources.append(Source(str(tmp_path / str(number))))
    first, *others = sources
    further = tuple(zip(others, WEIGHTS[1:], strict=True))
    return StreamSettings(first, SEED, weight=WEIGHTS[0], further=further)


def test_sets_are_drawn_by_weight_and_by_the_place_of_a_sample_alone():
    drawn = drawn_sets(SEED, 0, 40_000, WEIGHTS)
    shares = np.bincount(drawn) / len(drawn)
    # Three standard deviations of a share.
    assert shares == pytest.approx(np.array(WEIGHTS) / sum(WEIGHTS), abs=0.0075)
    parts = [drawn_sets(SEED, first, 700, WEIGHTS) for first in range(0, 7_000, 700)]
    assert np.array_equal(np.concatenate(parts), drawn[:7_000])
    assert not np.array_equal(drawn_sets(SEED + 1, 0, 700, WEIGHTS), drawn[:700])


@pytest.mark.slow
def test_each_set_comes_as_it_does_alone_in_epochs_of_its_own(settings: StreamSettings):
    sets = drawn_sets(SEED, 0, 60, WEIGHTS)
    with MixedFeed(settings, FeedProgress(further=(FeedProgress(), FeedProgress())), 60) as mixed:
        batches = [mixed.take(size) for size in (1, 9, 20, 30)]
    captions = [caption for batch in batches for caption in batch.captions]
    for number, alone in enumerate(settings.of_each_set):
        mine = [caption for caption, of in zip(captions, sets, strict=True) if of == number]
        with Feed(alone, FeedProgress(), 60) as feed:
            expected = feed.take(len(mine))
        assert tuple(mine) == expected.captions
        counts: dict[int, int] = {}
        for batch in batches:
            for epoch, rows in batch.of_set(number).epochs:
                counts[epoch] = counts.get(epoch, 0) + rows
        assert tuple(counts.items()) == expected.epochs
        assert batches[-1].of_set(number).cursor == expected.cursor
    assert [batch.position for batch in batches] == [1, 10, 30, 60]
    # As it travels from the process of the feed.
    sent = pickle.loads(pickle.dumps(batches[-1]))
    assert sent.captions == batches[-1].captions
    assert [part.sample_ids for part in sent.parts] == [
        part.sample_ids for part in batches[-1].parts
    ]


@pytest.mark.slow
def test_a_mixed_stream_goes_on_where_it_stood_whatever_the_batches(settings: StreamSettings):
    beginning = FeedProgress(further=(FeedProgress(), FeedProgress()))
    with MixedFeed(settings, beginning, 40) as mixed:
        whole = mixed.take(40).captions
    with MixedFeed(settings, beginning, 25) as mixed:
        first = mixed.take(13)
    ids: list[tuple[str, ...]] = []
    for part in first.parts:
        epoch = part.cursor.epoch
        before = sum(rows for number, rows in part.epochs if number < epoch)
        ids.append(part.sample_ids[before:])
    of_sets = [
        FeedProgress(cursor=part.cursor, rows=part.rows.num_rows, used_ids=used)
        for part, used in zip(first.parts, ids, strict=True)
    ]
    where = replace(of_sets[0], rows=first.position, further=tuple(of_sets[1:]))
    with MixedFeed(settings, where, 27) as mixed:
        rest = mixed.take(27).captions
    assert first.captions + rest == whole
    assert len({*whole[13:]} ^ {*rest}) == 0


def test_one_set_is_a_plain_feed(settings: StreamSettings):
    with build_feed(replace(settings, further=()), FeedProgress(), 5) as feed:
        assert isinstance(feed, Feed)
        assert feed.take(5).of_set(0).captions == feed.take(0).captions + feed_of(settings)


def feed_of(settings: StreamSettings) -> tuple[str, ...]:
    with Feed(replace(settings, further=()), FeedProgress(), 5) as feed:
        return feed.take(5).captions
