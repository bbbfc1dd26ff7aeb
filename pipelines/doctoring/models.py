"""Look at a model that a run would load: is it there, whole, and text-to-video."""

from cluster.stores import opened_store
from pipelines.config.model_folders import model_on_this_machine
from pipelines.doctoring.findings import Finding, Status
from sgmd_core.errors import SgmdError
from workers.models.addresses import is_address
from workers.models.configs import INDEX_FILE
from workers.models.families import family_of


def look_at_model(model: str) -> Finding:
    """Reads a model's configurations and the headers of its weights; at an address, lists it.

    Args:
        model: Folder, hub id or address.
    """
    name = f"model {model}"
    try:
        found = _listed(model) if is_address(model) else _inspected(model)
    except SgmdError as error:
        return Finding(name, Status.MISSING, error.found, error.remedy)
    except OSError as error:
        return Finding(name, Status.MISSING, f"{type(error).__name__}: {error}")
    return found


def _inspected(model: str) -> Finding:
    folder = model_on_this_machine(model)
    family = family_of(folder)
    parts = family.inspect(folder).num_parameters
    sizes = ", ".join(f"{part} {count / 1e6:,.3g} M" for part, count in parts.items())
    lacking = ", ".join(name for name in family.traits.layout.dispensable if name not in parts)
    found = f"{family.name}: {sizes} parameters" + f"; without weights: {lacking}" * bool(lacking)
    return Finding(f"model {model}", Status.GOOD, found)


def stored_sizes(model: str) -> dict[str, int]:
    """Bytes of each object of a model at an address, in the order of their names.

    Raises:
        StorageError: It cannot be listed.
    """
    with opened_store(model, f"listing {model}") as (files, root):
        objects = files.find(root, detail=True)
    return {name: facts["size"] for name, facts in sorted(objects.items())}


def _listed(model: str) -> Finding:
    sizes = stored_sizes(model)
    found = f"{len(sizes)} objects, {sum(sizes.values()) / 1e9:.3g} GB; not read"
    if any(path.endswith(f"/{INDEX_FILE}") for path in sizes):
        return Finding(f"model {model}", Status.GOOD, found)
    remedy = "Name the prefix of a diffusers folder"
    return Finding(f"model {model}", Status.MISSING, f"{found}: no {INDEX_FILE}", remedy)
