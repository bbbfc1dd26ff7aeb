"""Load networks and tokenizer of a model folder from safetensors files, whole or not at all.

A library that misses a tensor draws new random weights and says so in a log line. Here that is an
error. Nothing is unpickled, no code that a folder brings along is run, and nothing is looked up on
the hub.
"""

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from sgmd_core.errors import ModelFolderError
from workers.models.architecture import CheckedComponent
from workers.models.configs import REMEDY

_MAX_NAMED = 4


def load_network(network: Any, part: CheckedComponent, **options: Any) -> Any:  # noqa: ANN401  (a class of diffusers or transformers)
    """Load a network in evaluation mode, every tensor of it from the files.

    Args:
        network: Class of diffusers or transformers.
        part: The component, as `check_network` returns it.
        **options: For `from_pretrained`.

    Raises:
        ModelFolderError: A file cannot be read, or the library has not taken every tensor from the
            files.
    """
    try:
        loaded, info = network.from_pretrained(
            part.path,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise unreadable(part.path, error) from error
    require_all_loaded(part, info)
    for name, value in loaded.named_parameters():
        require_finite_weights(part, name, value)
    return loaded.eval()


def load_tokenizer(tokens: Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer of transformers from its component's folder.

    Raises:
        ModelFolderError: A file is missing or cannot be read, or the tokenizer needs code.
    """
    if not (tokens / "tokenizer_config.json").is_file():
        raise ModelFolderError(
            f"loading the model {tokens.parent}",
            f"the file {tokens / 'tokenizer_config.json'} is missing",
            "a tokenizer of transformers",
            REMEDY,
        )
    try:
        # Code that a folder brings along is never run, and nothing is looked up elsewhere.
        found = AutoTokenizer.from_pretrained(
            tokens, trust_remote_code=False, local_files_only=True
        )
        # A tokenizer without a token to fill up with is read, and fails at its first captions.
        found(["one", "two words"], padding=True)
        return found
    except Exception as error:
        raise unreadable(tokens, error) from error


def require_tied_embeddings(part: Path) -> None:
    """Check that this version of transformers loads the embedding of a UMT5.

    A Wan's files hold it once, as `shared`, and its config.json says that nothing is tied: the
    versions 5.0 to 5.2 then leave the encoder's own copy as it was drawn.

    Raises:
        ModelFolderError: It is one of these.
    """
    installed = version("transformers")
    if installed.split(".")[:2] in (["5", "0"], ["5", "1"], ["5", "2"]):
        raise ModelFolderError(
            f"loading {part}",
            f"transformers {installed}, which does not load the embedding of UMT5",
            "transformers before 5.0, or 5.3 and later",
            "pip install --upgrade transformers",
        )


@torch.no_grad()
def require_telling_apart(
    part: Path, tokenizer: PreTrainedTokenizerBase, text_encoder: PreTrainedModel
) -> None:
    """Check on two captions of one token that a text encoder is whole and finite.

    Raises:
        ModelFolderError: It gives both the same embedding or a NaN, or has fewer embeddings than
            the tokenizer has tokens.
    """
    special = set(tokenizer.all_special_ids)
    size = text_encoder.config.vocab_size
    if len(tokenizer) > size:
        raise ModelFolderError(
            f"loading {part}",
            f"a tokenizer of {len(tokenizer)} tokens for embeddings of {size}",
            "the tokenizer of this text encoder",
            REMEDY,
        )
    words = [index for index in range(min(size, len(special) + 2)) if index not in special][:2]
    if len(words) < 2:
        return
    tokens = torch.tensor([[word] for word in words], device=text_encoder.device)
    first, second = text_encoder(tokens).last_hidden_state
    is_finite = bool(torch.isfinite(first).all() and torch.isfinite(second).all())
    if not is_finite or torch.equal(first, second):
        raise ModelFolderError(
            f"loading {part}",
            "the same embedding for two different captions" if is_finite else "NaN in embeddings",
            "embeddings that are finite and tell captions apart",
            "Download the text encoder again, and install the versions that constraints.txt pins",
        )


def require_all_loaded(part: CheckedComponent, info: Mapping[str, Any]) -> None:
    """Refuse a network of which not every tensor came from the files.

    Args:
        part: The component.
        info: Loading info of `from_pretrained`: names by problem.

    Raises:
        ModelFolderError: A tensor is new, unused, of another shape, or failed.
    """
    problems = {
        "newly initialised": sorted(info.get("missing_keys") or ()),
        "not used": [
            name
            for name in sorted(info.get("unexpected_keys") or ())
            if not part.architecture.ignores(name)
        ],
        "of another shape": [str(item) for item in info.get("mismatched_keys") or ()],
        "failed": [str(item) for item in info.get("error_msgs") or ()],
    }
    found = [
        f"{len(names)} tensors {kind} ({', '.join(names[:_MAX_NAMED])})"
        for kind, names in problems.items()
        if names
    ]
    if found:
        raise ModelFolderError(
            f"loading {part.path}",
            "; ".join(found),
            "every tensor of the network from the files, although their names are right",
            "Install the library versions that constraints.txt pins; transformers 5.0 to 5.2 lose "
            "the embedding of UMT5",
        )


def require_finite_weights(part: CheckedComponent, name: str, value: Tensor) -> None:
    """Refuse NaN and infinities, of the file or of a conversion to a narrower type.

    Raises:
        ModelFolderError: The tensor holds one; names it.
    """
    if not torch.isfinite(value).all():
        raise ModelFolderError(
            f"loading {part.path}",
            f"NaN or infinity in {name}",
            "finite weights",
            "Copy the files again, or go back to a state before the training diverged",
        )


def unreadable(part: Path, error: Exception) -> ModelFolderError:
    """Error for files of a component that could not be read."""
    files = ", ".join(sorted(file.name for file in part.glob("*.safetensors"))) or "its files"
    return ModelFolderError(
        f"loading {part}",
        f"{files} or the configuration could not be read ({error})",
        "complete, matching files",
        REMEDY,
    )
