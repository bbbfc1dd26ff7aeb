"""Search of settings with Ray Tune: space, trials, results, page."""
