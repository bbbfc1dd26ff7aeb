"""Captions are embedded once, alone, and the latest are remembered."""

import gc
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from workers.text_encoder import TextEncoder

LENGTH, WIDTH = 5, 3


class CountingEmbedder:
    """One row of numbers a word, then zeros; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def encode(self, captions: Sequence[str], max_length: int) -> Tensor:
        self.asked.append(list(captions))
        text = torch.zeros(len(captions), max_length, WIDTH)
        for row, caption in enumerate(captions):
            for place, word in enumerate(caption.split()[:max_length]):
                text[row, place] = torch.arange(1.0, 1 + WIDTH) * len(word)
        return text


def test_embeddings_keep_the_order_of_captions_and_their_places():
    embedder = CountingEmbedder()
    batch = TextEncoder(embedder, LENGTH).encode(["a bb", "ccc"], (4, 9))
    assert batch.sample_indices == (4, 9)
    assert batch.text.shape == (2, LENGTH, WIDTH)
    assert torch.equal(batch.text, CountingEmbedder().encode(["a bb", "ccc"], LENGTH))


def test_a_caption_is_embedded_alone_and_once():
    embedder = CountingEmbedder()
    encoder = TextEncoder(embedder, LENGTH)
    first = encoder.encode(["a", "b", "a"], (0, 1, 2))
    second = encoder.encode(["b", "a"], (3, 4))
    assert embedder.asked == [["a"], ["b"]]
    assert torch.equal(first.text[[1, 0]], second.text)


def test_the_least_recently_used_caption_is_forgotten():
    embedder = CountingEmbedder()
    encoder = TextEncoder(embedder, LENGTH, num_cached=2)
    for caption in ["a", "b", "a", "c", "a", "b"]:
        encoder.encode([caption], (0,))
    assert embedder.asked == [["a"], ["b"], ["c"], ["b"]]


def test_a_batch_larger_than_the_cache_is_still_whole():
    encoder = TextEncoder(CountingEmbedder(), LENGTH, num_cached=1)
    captions = ["a", "bb", "ccc", "a"]
    found = encoder.encode(captions, range(4)).text
    assert torch.equal(found, CountingEmbedder().encode(captions, LENGTH))


def test_a_result_can_be_written_into_without_harm_to_the_next():
    encoder = TextEncoder(CountingEmbedder(), LENGTH)
    encoder.encode(["a b c d e"], (0,)).text.zero_()
    encoder.encode_negative("a b c d e").zero_()
    assert encoder.encode(["a b c d e"], (0,)).text.abs().min() > 0


def test_the_negative_prompt_is_one_caption_and_may_be_empty():
    encoder = TextEncoder(CountingEmbedder(), LENGTH)
    assert encoder.encode_negative("bad").shape == (1, LENGTH, WIDTH)
    assert torch.equal(encoder.encode_negative(""), torch.zeros(1, LENGTH, WIDTH))


def test_stored_embeddings_of_dropped_rows_are_those_of_the_empty_caption():
    embedder = CountingEmbedder()
    encoder = TextEncoder(embedder, LENGTH)
    stored = torch.ones(4, LENGTH, WIDTH)
    assert encoder.place(stored, (0, 2)).text.min() == 1
    assert embedder.asked == []
    placed = encoder.place(stored, (1, 2, 3), 4, {2, 3})
    assert placed.sample_indices == (5, 6, 7)
    empty = torch.zeros(LENGTH, WIDTH)
    assert [torch.equal(text, empty) for text in placed.text] == [False, True, True]
    assert embedder.asked == [[""]]
    assert stored.min() == 1


@pytest.mark.slow
def test_a_network_that_is_loaded_on_demand_is_kept_for_no_caption_and_its_embeddings_are():
    loaded: list[CountingEmbedder] = []

    def load() -> CountingEmbedder:
        loaded.append(CountingEmbedder())
        return loaded[-1]

    encoder = TextEncoder(load, LENGTH, num_cached=2)
    assert not loaded
    stored = torch.ones(2, LENGTH, WIDTH)
    assert torch.equal(encoder.place(stored, (1,)).text, stored[1:])
    assert not loaded
    negatives = [encoder.encode_negative("") for _ in range(2)]
    assert torch.equal(*negatives)
    assert [embedder.asked for embedder in loaded] == [[[""]]]
    holders = gc.get_referrers(loaded[0])
    assert [holder for holder in holders if holder is not loaded] == []
