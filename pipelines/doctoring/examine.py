"""`sgmd doctor`: what is there, what is missing, and how to get it."""

from typing import TYPE_CHECKING

from cluster.redaction import has_user, without_secrets
from pipelines.doctoring.findings import Finding, Status, Wanted

if TYPE_CHECKING:
    from pipelines.config.recipe import DistillConfig


def examine(
    address: str | None = None,
    storage: str | None = None,
    model: str | None = None,
    config: "DistillConfig | None" = None,
) -> list[Finding]:
    """Looks at everything that a run needs, here or on every machine of a cluster.

    Args:
        address: Ray cluster to look at: `auto` or `HOST:PORT`; None: this machine alone.
        storage: Folder or `s3://bucket/prefix` to try besides the recipe's output.
        model: Folder or address of a model to look at, and to compare, besides the recipe's.
        config: A recipe, for its output and models.

    Returns:
        The findings, machine by machine where there are several.
    """
    places = [storage] if storage else []
    models = [model] if model else []
    if config is not None:
        config = config.with_absolute_paths()
        places.append(config.output)
        models += [config.model.folder, *([config.teacher.model] if config.teacher.model else [])]
    refused = [_with_user("storage", place) for place in places if has_user(place)]
    refused += [_with_user("model", each) for each in models if has_user(each)]
    places = [place for place in places if not has_user(place)]
    models = [each for each in models if not has_user(each)]
    return [*_examine(address, places, models), *refused]


def _examine(address: str | None, places: list[str], models: list[str]) -> list[Finding]:
    if address is None:
        from pipelines.doctoring.machine import examine_machine
        from pipelines.doctoring.models import look_at_model
        from pipelines.doctoring.storage import try_storage

        looked = [look_at_model(model) for model in dict.fromkeys(models)]
        return [*examine_machine(), *map(try_storage, places), *looked]
    # One machine needs no Ray; and a cluster that refuses is reported before torch is loaded.
    from pipelines.doctoring.connection import examine_cluster

    wanted = Wanted(tuple(dict.fromkeys(places)), tuple(dict.fromkeys(models)))
    return examine_cluster(address, wanted)


def _with_user(what: str, place: str) -> Finding:
    """A place that is not tried: its address would take a key into lists of processes and logs."""
    return Finding(
        f"{what} {without_secrets(place)}",
        Status.MISSING,
        "a user or a key in the address",
        "Put keys into the environment: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY",
    )
