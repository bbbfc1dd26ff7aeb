"""Checking shards: whether a set is usable, and what it holds."""
