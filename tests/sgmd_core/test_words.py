"""Numbers in sentences: one of a thing, or several."""

import pytest

from sgmd_core.words import count_in_words


@pytest.mark.parametrize(
    ("number", "words"),
    [(0, "0 GPUs"), (1, "1 GPU"), (1.0, "1 GPU"), (0.5, "0.5 GPUs"), (2_097_152, "2097152 GPUs")],
)
def test_a_number_and_its_noun_agree(number, words):
    assert count_in_words(number, "GPU") == words
