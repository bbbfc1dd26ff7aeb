"""Run folder: what a run writes while it is under way, and who hears of it."""
