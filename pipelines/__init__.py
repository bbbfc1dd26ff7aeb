"""The story: from video-caption shards to a few-step generator, and what one can do with it."""
