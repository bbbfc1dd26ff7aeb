"""A Slurm batch script: Ray on the nodes of one allocation, and the program beside its head."""

import shlex

from cluster.manifests.deployment import FILE_PATH, Deployment, commented, dns_name, filled_in

_PORT = 6379
_WARN_S = 120
# Beside what Ray hands out: its own processes, and the program.
_CPUS_OF_RAY = 2


def slurm_script(deployment: Deployment, time: str) -> str:
    """The script, for nodes that are all equal.

    Args:
        deployment: What runs; its head stands for every node.
        time: Limit of one part of the run, in Slurm's form; the job goes back to the queue then.
    """
    node = deployment.head
    words = ['"$recipe"' if word == FILE_PATH else shlex.quote(word) for word in deployment.program]
    # The template makes a shell script; what is put into it is quoted here.
    return filled_in(
        "slurm.sh.j2",
        made_by=commented(deployment.made_by),
        name=dns_name(deployment.name),
        nodes=1 + sum(group.count for group in deployment.workers),
        cpus=node.cpus + _CPUS_OF_RAY,
        cpus_of_ray=node.cpus,
        gpus=node.gpus,
        memory_gb=node.memory_gb,
        time=time,
        warn_s=deployment.stop_after_s + _WARN_S,
        port=_PORT,
        environment={key: shlex.quote(value) for key, value in deployment.environment.items()},
        file=deployment.file,
        program=" ".join(words),
    )
