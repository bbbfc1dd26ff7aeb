"""Words that a tokenizer does not know are counted and named."""

from tests.helpers.tiny_wan import write_tiny_wan
from workers.models.families import family_of


def test_captions_with_unknown_words_are_counted_and_the_words_named(tmp_path):
    folder = write_tiny_wan(tmp_path / "model", ["a", "red", "circle"])
    tokenizer = family_of(folder).load_tokenizer(folder)
    captions = ["a red circle", "a zebra zebra", "a red unicorn", "zebra"]
    found = tokenizer.unknown_words(captions)
    assert (found.num_captions, found.num_affected) == (4, 3)
    assert found.words == ("zebra", "unicorn")
    assert "3 of the 4 captions" in found.in_words()
    assert "'zebra', 'unicorn'" in found.in_words()
    assert tokenizer.unknown_words(captions[:1]).num_affected == 0
