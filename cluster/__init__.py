"""Where it runs: Ray core and no diffusion. This package could run any SPMD program."""
