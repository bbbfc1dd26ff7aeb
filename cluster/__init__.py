"""Ray core without diffusion: worker groups, schedules, pools. It could run any SPMD program."""

import os

# Ray reads these when it is imported. A lost process is reported by our own errors and events; Ray
# would print a paragraph about it on standard output, among a command's JSON, and a traceback for
# every call that was given up.
os.environ.setdefault(
    "RAY_DEDUP_LOGS_SKIP_REGEX",
    "A worker died or was killed while executing|Raylet is terminated. Termination is unexpected|"
    "has been marked dead because the detector|PYTHON worker processes have been started",
)
os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
