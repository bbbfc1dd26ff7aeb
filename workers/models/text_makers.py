"""Name of what made text embeddings: by the weights of a text encoder, or on the embeddings' word.

    text encoder and tokenizer in the folder    their digests, combined
    no weights of a text encoder                what stored embeddings name

Runs keep digests by component. One whose folder had no text encoder has, in its place, the name
that its embeddings gave, so that it goes on with a folder that was completed since, or the reverse.
"""

import hashlib
from collections.abc import Mapping, Sequence

_NAMED = "as embeddings name it: "


def combined_digest(digests: Sequence[str]) -> str:
    """One name for some components: 16 hexadecimal digits."""
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()[:16]


def named_by_embeddings(maker: str) -> str:
    """Entry among digests for a text encoder that is not there."""
    return _NAMED + maker


def maker_on_their_word(digests: Mapping[str, str]) -> str:
    """Name that embeddings gave, where it stands among digests; empty where there is none."""
    named = (value for value in digests.values() if value.startswith(_NAMED))
    return next(named, "").removeprefix(_NAMED)


def text_maker(digests: Mapping[str, str], text: Sequence[str]) -> str | None:
    """Name of what embeds text; None where nothing says it.

    Args:
        digests: By component.
        text: Components that an embedding depends on (`FolderLayout.text`).
    """
    own = {name: digests[name] for name in text if name in digests}
    named = maker_on_their_word(own)
    if named or len(own) < len(text):
        return named or None
    return combined_digest([*own.values()])
