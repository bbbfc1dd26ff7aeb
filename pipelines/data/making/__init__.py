"""Making shards: `prepare` from videos and captions, `encode` to latents and embeddings."""
