"""Media: clips as files, contact sheets and charts."""
