"""Run folder: files that a run writes while it is under way, and the observers of its progress."""
