"""Distillation: one run from its recipe to the exported generator."""
