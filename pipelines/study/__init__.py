"""`sgmd study`: the same budget for several methods and seeds, and what each makes of it."""
