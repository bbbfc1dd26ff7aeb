"""Name of what made embeddings or latents: by a component's weights, or on the data's word.

    weights in the folder     digests of the components, combined
    no weights                what stored embeddings or latents name

Runs keep digests by component. One whose folder lacked an encoder has, in its place, the name that
its data gave, so that it goes on with a folder that was completed since, or the reverse.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Literal

Made = Literal["embeddings", "latents"]
"""Data that name their maker."""

_WORDS: Mapping[Made, str] = {
    "embeddings": "as embeddings name it: ",
    "latents": "as latents name it: ",
}


def combined_digest(digests: Sequence[str]) -> str:
    """One name for some components: 16 hexadecimal digits."""
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()[:16]


def named_by(made: Made, maker: str) -> str:
    """Entry among digests for an encoder that is not there."""
    return _WORDS[made] + maker


def maker_on_their_word(digests: Mapping[str, str], made: Made = "embeddings") -> str:
    """Name that data gave, where it stands among digests; empty where there is none."""
    words = _WORDS[made]
    return next((d.removeprefix(words) for d in digests.values() if d.startswith(words)), "")


def maker_of(digests: Mapping[str, str], components: Sequence[str]) -> str | None:
    """Name of what makes embeddings or latents; None where nothing says it.

    Args:
        digests: By component.
        components: Those that decide it, such as `FolderLayout.text`.
    """
    own = {name: digests[name] for name in components if name in digests}
    named = next(filter(None, (maker_on_their_word(own, made) for made in _WORDS)), "")
    if named or len(own) < len(components):
        return named or None
    return combined_digest([*own.values()])
