"""Checks of `sgmd doctor`: of this machine, of every machine of a cluster, and between them."""
