"""Commands of ours as Ray jobs: `sgmd submit`."""
