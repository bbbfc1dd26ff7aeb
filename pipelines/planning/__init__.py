"""Pool sizes, times and memory of a run before a GPU is taken."""
