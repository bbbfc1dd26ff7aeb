"""Output of processes of Ray that end as they start.

A worker writes its log once it has reached Ray. One that ends before, as with a library that aborts
or an interpreter that does not run, writes to its raylet's standard error, and Ray starts another
one later, for ever.
"""

from pathlib import Path

from ray._private import worker as ray_worker

from cluster.redaction import printable, without_secrets

_MOST_BYTES, _MOST_LINES = 4000, 5


def printed_at_start() -> str:
    """Returns the last lines that processes of this machine printed before they had their own log.

    Returns:
        A sentence with the file and the lines, secrets removed; empty if there are none, or if no
        node of Ray runs on this machine.
    """
    node = ray_worker._global_node
    if node is None:
        return ""
    path = Path(node.get_logs_dir_path(), "raylet.err")
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _MOST_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    lines = [printable(without_secrets(line)) for line in text.splitlines() if line.strip()]
    if not lines:
        return ""
    return f"The log of failed starts, {path}, ends in: {' | '.join(lines[-_MOST_LINES:])}"
