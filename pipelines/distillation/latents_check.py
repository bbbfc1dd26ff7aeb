"""Check that training data bring the latents that a method learns from.

They must be of the clips' size, and of the autoencoder that the networks belong to: others would
teach nothing, and no loss would say so.
"""

from pipelines.config.recipe import DistillConfig
from pipelines.data.stream.inspect import FolderFacts
from sgmd_core.errors import ConfigError
from workers.models.content import fingerprint
from workers.models.folder import LatentShape, ModelFolder


def require_latents(
    config: DistillConfig,
    data: FolderFacts,
    model: ModelFolder,
    latent_shape: LatentShape,
) -> None:
    """Checks that training data bring the latents that a method learns from.

    Args:
        config: The run.
        data: A first look at its training data.
        model: The generator's model.
        latent_shape: Shape (channels, frames, rows, columns) of a sample of this set.

    Raises:
        ConfigError: They bring none, or those of other clips or another autoencoder.
    """
    encoding = data.encoding
    expected = f"latents of shape {latent_shape}, made by the autoencoder of {model.path}"
    if encoding is None or not encoding.latent_shape:
        found = f"shards of {data.kind.value}, without latents"
    elif encoding.latent_shape != latent_shape:
        found = f"latents of shape {encoding.latent_shape}"
    elif encoding.vae != fingerprint(model.path, (model.layout.autoencoder,)):
        found = f"latents of another autoencoder (fingerprint {encoding.vae})"
    else:
        return
    raise ConfigError(
        f"reading data for objective.method {config.objective.method} from {config.data.train}",
        found,
        expected,
        f"Encode videos with `sgmd encode SRC DST --model {config.model.folder}` and set "
        "data.train to DST, or choose a method that needs no data",
    )
