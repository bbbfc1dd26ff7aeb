"""Manifests of a cluster and of its program: for Kubernetes, Slurm and virtual machines."""
