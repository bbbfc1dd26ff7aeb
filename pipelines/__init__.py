"""Programs: from video-caption shards to a few-step generator, and what is done with it."""
