"""Adapters of diffusion families to the words of `sgmd_core`."""
