"""Words that a tokenizer does not know are counted and named."""

from tests.helpers.tiny_wan import write_tiny_wan
from workers.models.vocabulary import unknown_words


def test_captions_with_unknown_words_are_counted_and_the_words_named(tmp_path):
    folder = write_tiny_wan(tmp_path / "model", ["a", "red", "circle"])
    captions = ["a red circle", "a zebra zebra", "a red unicorn", "zebra"]
    found = unknown_words(folder, captions)
    assert (found.num_captions, found.num_affected) == (4, 3)
    assert found.words == ("zebra", "unicorn")
    assert "3 of the 4 captions" in found.in_words()
    assert "'zebra', 'unicorn'" in found.in_words()
    assert unknown_words(folder, captions[:1]).num_affected == 0
