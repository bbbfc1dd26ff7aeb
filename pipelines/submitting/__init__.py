"""Commands of sgmd as Ray jobs: `sgmd submit`."""
