"""Connection to a cluster that is to be examined, or the reason why there is none."""

from cluster.inventory import take_inventory
from cluster.runtime import start_ray
from pipelines.doctoring.findings import Finding, Status, Wanted
from sgmd_core.errors import SgmdError


def examine_cluster(address: str, wanted: Wanted) -> list[Finding]:
    """Looks at every machine of a cluster and tries what goes between them.

    Args:
        address: `auto`, or `HOST:PORT` of its control service.
        wanted: What to look for on each.

    Returns:
        The findings; one alone where the cluster cannot be reached.
    """
    name = f"Ray at {address}"
    if address.startswith(("http://", "https://")):
        remedy = (
            "Give HOST:PORT of the control service (6379) on a machine of the cluster. From "
            f"outside: ray job submit --address {address} --working-dir . -- python -m "
            "pipelines.cli doctor --address auto"
        )
        return [Finding(name, Status.MISSING, "the address of a dashboard", remedy)]
    try:
        with start_ray(address):
            found = take_inventory()
            words = (
                f"{found.num_nodes} machines, {found.free_cpus:g} of {found.cpus:g} CPUs and "
                f"{found.free_gpus:g} of {found.gpus:g} GPUs free"
            )
            # Here, because a refusal need not wait for torch and the codecs.
            from pipelines.doctoring.cluster import examine_machines

            return [Finding(name, Status.GOOD, words), *examine_machines(wanted)]
    except SgmdError as error:
        remedy = f"Expected {error.expected}. {error.remedy}"
        return [Finding(name, Status.MISSING, error.found, remedy)]
