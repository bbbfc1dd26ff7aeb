"""`examine` on a cluster; a program, because a process joins one cluster only.

Prints the findings as JSON. Every core is reserved. Of four machines, one has another version of a
package, and one has no torch. All are this one: they share its disks and its clock. The interpreter
of those two is given, because this one may be forked off a process that has imported both.
"""

import json
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from cluster.ray.pools import Pool
from cluster.ray.topology import reserve
from cluster.runtime import start_ray
from pipelines.doctoring.examine import examine
from tests.cluster.toys import WAIT_S
from tests.cluster.two_machines import CPUS, leave_out_unused, two_machines

ROOT = Path(__file__).parents[3]
OLD = ("ftfy-0.1.dist-info/METADATA", "Metadata-Version: 2.1\nName: ftfy\nVersion: 0.1\n")
NO_TORCH = ("torch.py", "raise ImportError('no torch here')\n")


def with_file(folder: Path, name: str, text: str) -> dict[str, str]:
    """Environment of a machine whose Python finds a file before what is installed."""
    path = folder / name
    path.parent.mkdir(parents=True)
    path.write_text(text)
    return {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}


def main() -> None:
    """Looks at the cluster."""
    with TemporaryDirectory() as name, two_machines() as (cluster, _):
        folder, free = Path(name), {"num_cpus": 0, "object_store_memory": 100 * 2**20}
        with pytest.MonkeyPatch.context() as patch:
            # What these import is what counts.
            patch.setattr(sys, "executable", sys.argv[1])
            leave_out_unused(patch)
            cluster.add_node(**free, env_vars=with_file(folder / "old", *OLD))
            cluster.add_node(**free, env_vars=with_file(folder / "bare", *NO_TORCH))
        with start_ray(cluster.address), reserve([Pool("all", 2 * CPUS)], WAIT_S):
            found = examine(
                cluster.address,
                storage=str(folder / "runs"),
                model=str(ROOT / "assets" / "tiny-wan"),
            )
        left = sorted(each.name for each in folder.iterdir())
    rows = [[each.name, each.machine, each.status, each.found, each.remedy] for each in found]
    sys.stdout.write(json.dumps({"rows": rows, "left": left}) + "\n")


if __name__ == "__main__":
    main()
