"""Making shards of videos and captions."""
